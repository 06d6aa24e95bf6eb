"""What happened to a key: frames, orders and refusals in their order, and the state each leads to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from confluent_kafka import TopicPartition

from crossrep import FrameWriter, LocalView, SpaceError, kafka
from crossrep.archive.archiving import archive
from crossrep.archive.store import Archive
from crossrep.cli import cli
from crossrep.columnar import forget, frames
from crossrep.columnar.forget import Forget
from crossrep.snapshots.key_history import EXPIRED, FOLDED, FORGOTTEN, WAITS, KeyHistory, history
from crossrep.spec import Space
from crossrep.writer import rows_of
from tests.cluster import SPEC, Workers, free_port, new_space, settled, wait_for

EXPIRING = SPEC.replace("[entities.item.columns.cr]", '[entities.item]\nexpire_after = "1d"\n[entities.item.columns.cr]')
DAY = 86_400.0


def sources(n: int) -> dict[str, np.ndarray[Any, Any]]:
    random = np.random.default_rng(n)
    return {name: random.normal(size=(n, dim)).astype("f4") for name, dim in (("cr", 8), ("ur", 4), ("ir", 4))}


def send(space: Space, bootstrap: str, value: bytes, key: bytes) -> None:
    producer = kafka.producer(bootstrap)
    producer.produce(space.frames_topic, value, partition=forget.partition_of(space, key))
    assert producer.flush(30) == 0


def what(found: KeyHistory) -> list[str]:
    return [happened.what for happened in found.happened]


def test_all_that_can_happen(bootstrap: str, workers: Workers, tmp_path: Path) -> None:
    space, path = new_space(bootstrap, tmp_path, EXPIRING, partitions=2)
    with FrameWriter(space.name, "w", bootstrap) as writer:
        for time, ids in ((1e9, ["17", "18", "17"]), (1e9 + 60, ["17", "x17"]), (1e9 + 120, ["x17"])):
            writer.write("user", ids, ["click", *["impression"] * (len(ids) - 1)], np.full(len(ids), time), sources(len(ids)))
            writer.commit()
        send(space, bootstrap, forget.encode(space, Forget("user", b"17")), b"17")
        rows = rows_of(space, "user", ["17"], "click", [1e9 + 200], sources(1))
        ((_, good),) = frames.encode(space, rows)
        send(space, bootstrap, good.replace(space.hash, b"otherspc"), b"17")
        writer.write("user", ["17", "17"], "impression", [1e9 + 300, 1e9 + 400], sources(2))
        writer.commit()
        for time, ids in ((1e9, ["17"]), (1e9 + 2 * DAY, ["17"])):  # the second: it has not expired, since nothing was newer
            writer.write("item", ids, "impression", np.full(len(ids), time), sources(len(ids)))
            writer.commit()
    waiting = history(space, "user", b"17", bootstrap)
    assert what(waiting) == [WAITS, WAITS, WAITS, "refused: spec", WAITS] and waiting.record is None

    workers.fold(path, port=free_port())
    wait_for(lambda: settled(space, bootstrap), "all frames are folded")
    with LocalView("user", space.name, bootstrap) as view:
        wait_for(lambda: int(view.get(["17"]).counts[0]) == 2, "it has begun anew")
        seen = view.get(["17"])
    told: list[int] = []
    found = history(space, "user", b"17", bootstrap, told.append)
    assert what(found) == [FOLDED, FOLDED, FORGOTTEN, "refused: spec", FOLDED] and sum(told) <= found.end
    counts = [None if h.after is None else int(h.after["count"][0]) for h in found.happened]
    assert counts == [2, 3, None, None, 2] and found.older == 0
    last = found.happened[-1]
    assert last.row is not None and last.after is not None and found.record is not None
    assert (last.row.counts[0], last.row.times[0]) == (2, 1e9 + 400) and last.offset <= found.record["source_offset"][0]
    held = found.record.copy()
    held["source_offset"] = last.offset
    assert last.after.tobytes() == held.tobytes() and (last.after["cr"][0] == seen["cr"].vectors[0]).all()
    assert not last.row.columns["clicks"].present[0]

    # An item that expires: something else in its partition has been newer for over a day.
    partition = forget.partition_of(space, b"17")
    other = next(f"o{i}" for i in range(100) if forget.partition_of(space, f"o{i}".encode()) == partition)
    with FrameWriter(space.name, "w", bootstrap) as writer:
        for id, days in ((other, 4), ("17", 4)):
            writer.write("item", [id], "impression", [1e9 + days * DAY], sources(1))
            writer.commit()
    wait_for(lambda: settled(space, bootstrap), "all frames are folded")
    item = history(space, "item", b"17", bootstrap)
    assert what(item) == [FOLDED, FOLDED, EXPIRED]
    assert [int(h.after["count"][0]) for h in item.happened if h.after is not None] == [1, 2, 1]

    def run(*command: str) -> str:
        done = CliRunner().invoke(cli, [*command, "--space", space.name, "--bootstrap", bootstrap], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    shown = run("history", "user", "17")
    assert "+2 → 2" in shown and "+1 → 3" in shown and "refused: spec" in shown and "forgotten" in shown and "has 2 events now" in shown
    assert "the last 2 of them" in run("history", "user", "17", "-n", "2")
    assert "0 entries" in run("history", "user", "nobody") and "not held now" in run("history", "user", "nobody")
    with pytest.raises(SpaceError, match="no entity 'advertiser'"):
        history(space, "advertiser", b"17", bootstrap)

    store = Archive(str(tmp_path / "archive"), space.name)
    archive(space.name, bootstrap, store)

    # Frames that retention has deleted.
    admin, place = kafka.admin(bootstrap), TopicPartition(space.frames_topic, partition, last.offset + 1)
    admin.delete_records([place])[place].result(30)
    late = history(space, "user", b"17", bootstrap)
    assert late.first == last.offset + 1 and late.happened == [] and late.older == 2
    assert "2 of them are of frames that are not retained" in run("history", "user", "17")
    # The archive has them still, but for those from before the order to forget.
    assert "+2 → 2" in run("history", "user", "17", "--archive", store.url)
    whole = history(space, "user", b"17", bootstrap, earlier=lambda number, before: store.of_key("user", b"17", number, before))
    assert what(whole) == [FOLDED] and whole.older == 0 and whole.first == last.offset
    assert whole.happened[0].after is not None and whole.happened[0].after["cr"].tobytes() == held["cr"].tobytes()
