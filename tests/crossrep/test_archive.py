"""The archive: what was sent is there bit by bit and once, however often the archiver is killed, repeated or doubled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from crossrep import forget, frames, kafka
from crossrep.archive import Archive
from crossrep.archiving import archive
from crossrep.spec import Space
from tests.cluster import SPEC, Load, new_space

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
    from crossrep import FrameWriter

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
