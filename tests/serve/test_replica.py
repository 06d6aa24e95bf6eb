"""The replica beside a LocalView: the same answers bit for bit, from memory or disk, live, restarted, and rebuilt when it must be."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import numpy as np
import pytest
from served import NOW, Records, replica

from crossrep import CrossrepError, LocalView, kafka
from crossrep.columnar.records import RecordLayout
from crossrep.keys import MISSING, Keys
from crossrep.spec import Space
from crossrep.views.answers import Representations
from serve.nearest import nearest
from serve.recent import Recent
from serve.replica import Replica
from serve.shredding import Shredder
from state.store import Memory, Meta, open_store
from streams import topics
from tests.cluster import new_space, wait_for


def assert_same(mine: Representations, theirs: Representations) -> None:
    for field in ("found", "counts", "event_times", "source_offsets"):
        np.testing.assert_array_equal(getattr(mine, field), getattr(theirs, field))
    assert mine.at == theirs.at and set(mine) == set(theirs)
    for name in theirs:
        for part in ("vectors", "weights", "times"):
            assert getattr(mine[name], part).tobytes() == getattr(theirs[name], part).tobytes(), (name, part)


def in_step(mine: Replica, view: LocalView) -> None:
    """Wait until both have applied all that is visible now."""
    now = time.monotonic()
    wait_for(lambda: max(mine.staleness, view.staleness) < time.monotonic() - now, "both have applied it")


@pytest.mark.parametrize("slots", [1024, 20_000])
def test_it_answers_as_a_view_does(bootstrap: str, space: Space, tmp_path: Path, slots: int) -> None:
    records = Records(space, bootstrap)
    many = [f"k{i}" for i in range(5000)]
    records.put(["a", 17, "ünï", *many])
    everybody = ["a", "nobody", 17, "17", "ünï", *many, "a", "never"]
    with replica(space, bootstrap, tmp_path / "disk", slots) as mine, LocalView("user", space.name, bootstrap) as view:
        view.wait(60)
        assert mine.recent.whole == (slots > 5003) and len(mine.recent) <= slots
        assert_same(mine.get(everybody), view.get(everybody))
        for at in (NOW, NOW + 3600.5, 0.0):
            assert_same(mine.get(everybody, at), view.get(everybody, at))
        for turn in (2, 3):  # followed while they are looked up
            records.put([*many[turn::7], f"new{turn}"], turn)
            records.delete([many[turn], "a", "never"])
            records.put([many[0]], 10 * turn)
            wait_for(lambda turn=turn: mine.get([many[0]]).counts[0] == 10 * turn, "it follows", every=0.001)
            in_step(mine, view)
            assert_same(mine.get(everybody), view.get(everybody))
            records.put(["a"], turn)
        in_step(mine, view)
        assert mine.get(["a"]).counts[0] == 3 and not mine.get(["never"]).found[0]
        assert (mine.disk_reads == 0) == (slots > 5003)
        expected = view.nearest("cr", "a", 5)
        found = nearest(mine, "cr", b"a", 5)
        assert found is not None and [key.decode() for key, _ in found] == [name for name, _ in expected]
        assert nearest(mine, "cr", b"never", 5) is None


def test_a_restart_goes_on_where_it_was(bootstrap: str, space: Space, tmp_path: Path) -> None:
    records = Records(space, bootstrap)
    ids = [f"k{i}" for i in range(2000)]
    records.put(ids)
    with replica(space, bootstrap, tmp_path / "disk") as mine:
        assert mine.applied == 2000 and mine.resumed == 0
        newest = mine.stream_time
    with replica(space, bootstrap, tmp_path / "disk") as mine:
        assert mine.applied == 0 and mine.resumed == 2000 and mine.stream_time == newest
    records.put(ids[:7], 2)
    records.delete(ids[7:10])
    with replica(space, bootstrap, tmp_path / "disk", 1024) as mine, LocalView("user", space.name, bootstrap) as view:
        assert mine.applied == 10 and not mine.recent.whole
        view.wait(60)
        assert_same(mine.get(ids), view.get(ids))
    with replica(space, bootstrap, tmp_path / "other") as anew:  # and so does one with an empty disk
        assert anew.applied >= 2000 and anew.get(ids).found.sum() == 1997


def in_files(folder: Path, secret: bytes) -> bool:
    for file in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError, IsADirectoryError):  # RocksDB has just merged it into another
            if secret in file.read_bytes():
                return True
    return False


def test_deleted_keys_leave_the_files(bootstrap: str, space: Space, tmp_path: Path) -> None:
    records, disk = Records(space, bootstrap), tmp_path / "disk"
    records.put(["a", "b", "c"])
    with replica(space, bootstrap, disk) as mine:
        a, b, c = (mine.get([name])["cr"].vectors.tobytes() for name in "abc")
    with replica(space, bootstrap, disk) as mine:  # they are in a file of RocksDB's by now, not in its log alone
        assert in_files(disk, a) and in_files(disk, b) and in_files(disk, c)
        records.delete(["a"])
        wait_for(lambda: not in_files(disk, a), "a is gone from the files", 10)
        records.delete(["b"])
        wait_for(lambda: not in_files(disk, b), "b is, a little later", 10)
        assert mine.get(["c"]).found[0] and in_files(disk, c)


def test_deletions_that_a_killed_process_left_in_the_files(tmp_path: Path) -> None:
    secret, other = os.urandom(200), os.urandom(200)
    meta = Meta("hash", {"users": "id"}, {"0": 3}, deletions=True)
    store = open_store(tmp_path / "s", meta, {"0": (0, 3)}, Memory.of(16 << 20), 1e6, ["user"])
    store.write({"user": ([b"17", b"18"], [secret, other])}, meta)
    store.close()  # what is written later is in another file
    store = open_store(tmp_path / "s", meta, {"0": (0, 3)}, Memory.of(16 << 20), 1e6, ["user"])
    store.write({"user": ([b"17"], [b""])})
    store.close()
    store = open_store(tmp_path / "s", meta, {"0": (0, 3)}, Memory.of(16 << 20), 1e6, ["user"])
    assert in_files(tmp_path / "s", secret)
    shredder = Shredder(store, "user")
    assert shredder.pending
    shredder.look()
    assert shredder.close(10) and not shredder.pending
    assert not in_files(tmp_path / "s", secret) and in_files(tmp_path / "s", other)
    store.close()


def test_the_disk_of_another_topic_is_rebuilt(bootstrap: str, space: Space, tmp_path: Path) -> None:
    Records(space, bootstrap).put(["a", "b"])
    with replica(space, bootstrap, tmp_path / "disk") as mine:
        assert mine.get(["a"]).found[0]
        topic = space.representations_topic("user")
        admin = kafka.admin(bootstrap)
        admin.delete_topics([topic])[topic].result(30)

        def ended() -> bool:
            try:
                return not mine.caught_up
            except CrossrepError as error:
                return "deleted" in str(error)

        wait_for(ended, "it says that the topic is gone", 20)
        with pytest.raises(CrossrepError):
            mine.get(["a"])
    topics.create(space, bootstrap)
    Records(space, bootstrap).put(["b", "c"], 3)
    with replica(space, bootstrap, tmp_path / "disk") as mine:
        assert mine.applied == 2 and mine.get(["a", "b", "c"]).counts.tolist() == [0, 3, 3]
    other, _ = new_space(bootstrap, tmp_path)
    with replica(other, bootstrap, tmp_path / "disk") as mine:
        assert mine.applied == 0 and not mine.get(["b"]).found[0]


def test_a_record_of_something_else_ends_it(bootstrap: str, space: Space, tmp_path: Path) -> None:
    with replica(space, bootstrap, tmp_path / "disk") as mine:
        Records(space, bootstrap).send_garbage()
        with pytest.raises(CrossrepError, match=r"representations\.user.* 7 bytes"):
            wait_for(lambda: not mine.get(["x"]).found[0] and False, "it ends", 20)


def test_memory_keeps_what_is_asked_for(tmp_path: Path) -> None:
    """Against a dict: random writes, deletions, reads and admissions, with far more keys than slots."""
    space = Space.parse('name = "s"\npartitions = 1\n[entities.user.columns.cr]\nsource = "cr"\ndim = 2\naggregate = "latest"')
    layout, random = RecordLayout(space, "user"), np.random.default_rng(0)
    recent, disk = Recent(layout, 1024), dict[int, int]()

    def made(counts: list[int]) -> np.ndarray:
        records = layout.empty(len(counts))
        records["count"] = counts
        return records

    for turn in range(300):
        some = random.choice(4000, 50, replace=False).tolist()
        if turn % 3 == 0:
            disk |= dict.fromkeys(some[:40], turn)
            for key in some[40:]:
                disk.pop(key, None)
            recent.renew(Keys.of(some[:40]), made([turn] * 40), Keys.of(some[40:]))
        held = recent.get(Keys.of(some))
        for key, slot, record in zip(some, held.slots.tolist(), held.records):
            assert slot == MISSING or record["count"] == disk[key]
            assert slot != MISSING or not held.whole or key not in disk
        missing = [key for key, slot in zip(some, held.slots.tolist()) if slot == MISSING and key in disk]
        if turn % 5 == 0 and missing:  # what was read before a write must not come in after it
            stale = missing[0]
            disk[stale] = turn
            recent.renew(Keys.of([stale]), made([turn]), Keys.of([]))
            recent.admit(Keys.of([stale]), made([-1]), held.generation)
        else:
            recent.admit(Keys.of(missing), made([disk[key] for key in missing]), held.generation)
        assert len(recent) <= 1024
    assert len(recent) > 900 and not recent.whole
    recent.get(Keys.of([some[0]]))
    assert set(recent.column("cr", recent.slots())[0].tolist()) <= {str(key).encode() for key in disk}
