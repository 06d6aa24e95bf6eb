"""An archive's files: overlaps are read once, small ones become large, the forgotten is gone, the old is removed."""

from __future__ import annotations

import os
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from crossrep.archive import upkeep
from crossrep.archive.store import Archive, Order
from crossrep.control.cuts import Cut, InFront
from crossrep.control.lineage import Source, encode
from crossrep.errors import DataError
from crossrep.rollout import replay_archive, replay_tables
from crossrep.spec import Space
from tests.cluster import SPEC
from tests.crossrep.archive_world import HOUR, put, samples, store_of

SPACE = Space.parse(SPEC.format(name="s", partitions=2))


def held(store: Archive, entity: str) -> Counter[tuple[int, int, bytes]]:
    """Partition, offset and key of every row, in the order in which they are read."""
    found: Counter[tuple[int, int, bytes]] = Counter()
    last = (-1, -1)
    for run in store.rows(entity):
        for offset, key in zip(run.offsets.tolist(), run.rows.keys.tolist()):
            assert (run.partition, offset) >= last
            last = (run.partition, offset)
            found[run.partition, offset, key] += 1
    return found


def test_frames_that_two_runs_wrote_are_read_once(tmp_path: Path) -> None:
    once, twice = store_of(SPACE, tmp_path / "a"), store_of(SPACE, tmp_path / "b")
    given = samples(SPACE, 1000)
    put(once, SPACE, given)
    put(twice, SPACE, {name: values[:400] for name, values in given.items()})  # one run got so far, the other further
    put(twice, SPACE, given)
    for entity in SPACE.entities:
        assert len(twice.listed(entity)) == 4 and len(twice.files(entity)) == 2
        assert held(twice, entity) == held(once, entity)
        assert twice.progress(entity) == once.progress(entity)


def test_an_overlap_in_the_middle(tmp_path: Path) -> None:
    store, whole, given = store_of(SPACE, tmp_path / "a"), store_of(SPACE, tmp_path / "b"), samples(SPACE, 1000)
    put(whole, SPACE, given)
    put(store, SPACE, {name: values[:600] for name, values in given.items()}, batch=50)  # offsets 0 to 12
    put(store, SPACE, {name: values[400:] for name, values in given.items()}, first=8, batch=50)  # 8 to 20
    assert [file.start for file in store.files("user")] == [0, 12, 0, 12]
    assert held(store, "user") == held(whole, "user") and store.gaps("user") == []
    assert upkeep.compact(store) == 4
    assert held(store, "user") == held(whole, "user")
    # What a killed run has left is read by nobody, and goes when nobody can be writing it any more.
    stray = [Path(f"{store.files('user')[0].path}.{n}.part") for n in range(2)]
    for path in stray:
        path.write_bytes(b"half")
    os.utime(stray[0], (HOUR, HOUR))
    upkeep.compact(store)
    assert [path.exists() for path in stray] == [False, True]
    assert len(store.listed("user")) == 2 and held(store, "user") == held(whole, "user")


@pytest.mark.parametrize("url", ["", "memory://archive-of-a-test"])  # an object store has no folders and no rename
def test_hours_that_are_over_become_one_file(tmp_path: Path, url: str) -> None:
    store = store_of(SPACE, url or tmp_path)
    for number in range(6):
        put(store, SPACE, samples(SPACE, 200, seed=number), first=4 * number, hour=HOUR + 3600 * (number // 3))
    put(store, SPACE, samples(SPACE, 200, seed=9), first=24, hour=time.time())
    before = {entity: held(store, entity) for entity in SPACE.entities}
    assert upkeep.compact(store) == 2 * 2 * 2 * (3 - 1)
    assert {entity: held(store, entity) for entity in SPACE.entities} == before
    assert len(store.listed("user")) == 14 + 4  # the small ones are still there, for who reads them
    assert upkeep.compact(store) == 0
    assert len(store.listed("user")) == len(store.files("user")) == 2 * 3
    assert {entity: held(store, entity) for entity in SPACE.entities} == before


def test_what_is_to_be_forgotten_is_read_no_more_and_then_gone(tmp_path: Path) -> None:
    store, given = store_of(SPACE, tmp_path), samples(SPACE, 1000, keys=5)
    put(store, SPACE, given)
    before = held(store, "user")
    (partition,) = {place[0] for place in before if place[2] == b"u1"}
    store.keep_order(Order(entity="user", key=b"u1".hex(), partition=partition, offset=10, append_time=HOUR))
    left = Counter({place: n for place, n in before.items() if place[2] != b"u1" or place[1] >= 10})
    assert 0 < sum(left.values()) < sum(before.values())
    assert held(store, "user") == left
    tables = replay_tables.fold(SPACE, replay_archive.of_archive(store, SPACE, None).tasks, 2)
    assert int(tables["user"].state.count.sum()) == sum(left.values())
    items = held(store, "item")
    ahead = Order(entity="user", key=b"u2".hex(), partition=partition, offset=10**6, append_time=HOUR)
    store.keep_order(ahead)  # while an archiver runs: frames in front of it are not archived yet
    assert upkeep.erase(store) == sum(before.values()) - sum(left.values())
    assert store.orders() == [ahead] and upkeep.erase(store) == 0
    store.drop_order(ahead)
    assert held(store, "user") == left and held(store, "item") == items


def test_gaps_are_named_and_old_files_removed(tmp_path: Path) -> None:
    store = store_of(SPACE, tmp_path)
    put(store, SPACE, samples(SPACE, 100), batch=50)
    put(store, SPACE, samples(SPACE, 100), first=7, batch=50, hour=time.time())
    assert store.gaps("user") == [(0, 2, 7), (1, 2, 7)]
    with pytest.raises(DataError, match=r"lacks user frames that were deleted before they were archived .*\[0\] 2 to 7, \[1\] 2 to 7"):
        replay_archive.of_archive(store, SPACE, None)
    store.keep_order(Order(entity="user", key="00", partition=0, offset=3, append_time=HOUR))
    assert len(store.retain(timedelta(days=1))) == 4 and store.orders() == []
    assert store.gaps("user") == [] and {file.first for file in store.files("user")} == {7}


def test_a_batch_across_a_cut_or_of_an_unknown_group_is_refused() -> None:
    cut = Cut(id="c", groups={"infer.s": {"a": {0: 10, 1: 5}}}, ends={0: 4}, skipped={0: [(1, 2)]})

    def header(group: str, **ends: tuple[int, int]) -> str:
        ((_, value),) = encode(Source(group, {("a", int(number[1:])): span for number, span in ends.items()}))
        return value.decode()

    def rows(*headers: str, sources: list[int]) -> list[bool]:
        return InFront(cut).rows(0, np.arange(len(sources)), np.array(sources, np.int32), list(headers)).tolist()

    inside, behind = header("infer.s", p0=(3, 10), p1=(0, 5)), header("infer.s", p0=(10, 12))
    # Offset 1 was left out by a rewind, 4 lies behind the end; a frame without a header counts by its offset alone.
    assert rows(inside, behind, sources=[0, 0, 1, -1, 0]) == [True, False, False, True, False]
    across = header("infer.s", p0=(3, 10), p1=(4, 6))
    assert rows(inside, across, sources=[0, 1]) == [True, False]  # a rewind left it out, and made its events again in other batches
    with pytest.raises(DataError, match="a batch lies across cut c"):
        rows(across, sources=[0])
    with pytest.raises(DataError, match=r"frames of group 'frame.s' are archived, but cut c does not know"):
        rows(header("frame.s", p0=(3, 10)), sources=[0])
