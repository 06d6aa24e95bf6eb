"""The archive: what was sent is there bit by bit and once, however often the archiver is killed, repeated or doubled."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from confluent_kafka import TopicPartition

from crossrep import FrameWriter, kafka
from crossrep.archive.archiving import Report, archive
from crossrep.archive.store import Archive
from crossrep.columnar import forget, frames
from crossrep.errors import DataError, TopicError
from crossrep.spec import Space
from tests.cluster import ROOT, SPEC, Load, new_space

# Two half-lives of one source share its vectors in raw rows, and have their own in combined ones.
TWO = SPEC.replace(
    "[entities.item.columns.cr]",
    '[entities.user.columns.slow]\nsource = "cr"\ndim = 8\naggregate = "decayed_mean"\nhalf_life = "7d"\n[entities.item.columns.cr]',
)


def sent(space: Space, bootstrap: str) -> dict[str, list[tuple[int, int, Any]]]:
    """By entity: partition, offset and rows of every valid frame on the topic, in plain Python."""
    found: dict[str, list[tuple[int, int, Any]]] = {entity: [] for entity in space.entities}
    for message in kafka.messages(bootstrap, space.frames_topic, kafka.bounds(bootstrap, space.frames_topic)):
        if not forget.is_order(message.value()):
            rows = frames.decode(space, message.value(), message.timestamp()[1] / 1000, message.partition())
            found[rows.entity].append((message.partition(), message.offset(), rows))
    return {entity: sorted(rows, key=lambda one: one[:2]) for entity, rows in found.items()}


def read(store: Archive, entity: str) -> list[tuple[int, int, Any]]:
    """The same of an archive."""
    found = []
    for run in store.rows(entity):
        for offset in np.unique(run.offsets).tolist():
            found.append((run.partition, offset, run.take(np.flatnonzero(run.offsets == offset)).rows))
    return found


def refuse_differences(space: Space, bootstrap: str, store: Archive) -> None:
    expected = sent(space, bootstrap)
    for entity in space.entities:
        found = read(store, entity)
        assert [one[:2] for one in found] == [one[:2] for one in expected[entity]]
        for (*_, a), (*_, b) in zip(found, expected[entity]):
            assert a.keys.tolist() == b.keys.tolist()
            for x, y in [(a.times, b.times), (a.counts, b.counts)] + [
                (getattr(a.columns[name], part), getattr(b.columns[name], part))
                for name in space.entities[entity].columns
                for part in ("vectors", "weights", "times", "present")
            ]:
                assert x.shape == y.shape and x.tobytes() == y.tobytes()


def test_bit_by_bit_combined_and_raw_and_of_both_types(bootstrap: str, tmp_path: Path) -> None:
    space, _ = new_space(bootstrap, tmp_path, TWO, partitions=2)
    store = Archive(str(tmp_path / "archive"), space.name)
    load = Load(space, bootstrap)
    load.send(500)
    archive(space.name, bootstrap, store)
    vectors = [pq.read_table(file.path, partitioning=None)["slow"] for file in store.files("user")]
    assert sum(map(len, vectors)) == 500 == sum(column.null_count for column in vectors)  # they are those of `cr`, which are there once
    with FrameWriter(space.name, "w", bootstrap) as writer:  # combined, each commit a transaction
        for n in range(3):
            ids: list[Any] = ["a", "b", "a", b"\xff", "ü"]
            sources = {"cr": np.random.default_rng(n).normal(size=(5, 8)), "ur": np.ones((5, 4))}
            writer.write("user", ids, "click", 1.6e9 + np.arange(5) / 3, sources)
            writer.commit()
    report = archive(space.name, bootstrap, store)
    assert report.rows["item"] == 0 and report.rows["user"] == 3 * 4
    refuse_differences(space, bootstrap, store)
    # A writer of float32 in a space of float16: from here on nothing may be narrowed.
    wide = space.model_copy(update={"vectors": "float32"})
    wide.__dict__["hash"] = space.hash
    Load(wide, bootstrap, seed=1).send(100)
    archive(space.name, bootstrap, store)
    refuse_differences(space, bootstrap, store)


def kill_at(space: Space, bootstrap: str, store: Archive, nth: int) -> None:
    """An archiver that dies when it has put `nth` of the run's files."""
    code = f"""
import os, signal
from crossrep.files import places
from crossrep.archive.store import Archive
from crossrep.archive.archiving import archive
left, put = [{nth}], places.put
def counted(fs, path, data):
    put(fs, path, data)
    left[0] -= path.endswith(".parquet")
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
places.put = counted
archive({space.name!r}, {bootstrap!r}, Archive({store.url!r}, {space.name!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_once_however_often_it_is_killed_or_doubled(bootstrap: str, tmp_path: Path) -> None:
    space, _ = new_space(bootstrap, tmp_path, partitions=2)
    load, store = Load(space, bootstrap), Archive(str(tmp_path / "archive"), space.name)
    for nth in (1, 2, 3):  # between the files of a partition's entities, and between partitions
        load.send(200)
        kill_at(space, bootstrap, store, nth)
    load.send(200)
    both: list[threading.Thread] = []
    reports: list[Report] = []
    for _ in range(2):
        one = Archive(store.url, space.name)
        both.append(threading.Thread(target=lambda one=one: reports.append(archive(space.name, bootstrap, one))))
        both[-1].start()
        load.send(100)
    for thread in both:
        thread.join()
    assert len(reports) == 2
    last = archive(space.name, bootstrap, store)
    assert last.cut is not None and store.cut() == last.cut and last.cut.groups == {}
    refuse_differences(space, bootstrap, store)
    assert archive(space.name, bootstrap, store).files == 0


def test_orders_refused_frames_aborted_ones_and_gaps(bootstrap: str, tmp_path: Path) -> None:
    space, _ = new_space(bootstrap, tmp_path, partitions=1)
    load, store = Load(space, bootstrap), Archive(str(tmp_path / "archive"), space.name)
    load.send(100, keys=5)
    producer = kafka.transactional_producer(bootstrap, f"t.{space.name}", 30.0)
    producer.init_transactions(30)
    for value, abort in ((b"no frame", False), (forget.encode(space, forget.Forget("user", b"1")), False), (b"aborted", True)):
        producer.begin_transaction()
        producer.produce(space.frames_topic, value, partition=0)
        producer.flush(30)
        (producer.abort_transaction if abort else producer.commit_transaction)(30)
    load.send(50, keys=5)
    report = archive(space.name, bootstrap, store)
    assert (report.refused, report.orders, report.rows) == (1, 1, {"user": 150, "item": 150})
    (order,) = store.orders()
    kept = {offset for run in store.rows("user") for offset, key in zip(run.offsets.tolist(), run.rows.keys.tolist()) if key == b"1"}
    assert kept and min(kept) > order.offset
    # Retention takes what was archived, and then what was not.
    admin = kafka.admin(bootstrap)

    def delete_up_to_end() -> None:
        _, end = kafka.bounds(bootstrap, space.frames_topic)[0]
        for deleted in admin.delete_records([TopicPartition(space.frames_topic, 0, end)]).values():
            deleted.result(30)

    delete_up_to_end()
    load.send(50)
    assert archive(space.name, bootstrap, store).rows["user"] == 50
    assert store.gaps("user") == []
    load.send(50)
    delete_up_to_end()
    with pytest.raises(DataError, match=r"were deleted before they were archived .*To go on behind the gap"):
        archive(space.name, bootstrap, store)
    load.send(50)
    assert archive(space.name, bootstrap, store, accept_gap=True).rows["user"] == 50
    assert len(store.gaps("user")) == len(store.gaps("item")) == 1
    other, _ = new_space(bootstrap, tmp_path, partitions=1)
    with pytest.raises(TopicError, match="is the archive of another"):
        archive(other.name, bootstrap, Archive(store.url, space.name))
