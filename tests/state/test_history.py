"""The history brings back every rewind point, whatever was folded, expired, forgotten, evicted and flushed since."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossrep.columnar.algebra import NEVER
from crossrep.columnar.records import RecordLayout
from crossrep.columnar.rows import ColumnRows, Rows
from crossrep.keys import Keys
from crossrep.spec import Space
from state import history, progress
from state.history import Undo
from state.progress import Point, Progress
from state.slab import Slab
from state.writes import Writes

SPACE = Space.parse("""
name = "history"
partitions = 1
[entities.user.columns.cr]
source = "cr"
dim = 2
aggregate = "decayed_mean"
half_life = "1h"
""")
LAYOUT = RecordLayout(SPACE, "user")
EXPIRE_AFTER = 3.0


class World:
    """A slab of eight slots over a dict, flushed as a partition does it: the store follows some flushes behind."""

    def __init__(self) -> None:
        self.flushed_records: dict[bytes, bytes] = {}
        self.stored: dict[bytes, bytes] = {}
        self.slab = Slab(LAYOUT, lambda keys: [self.stored.get(key) for key in keys], 8)
        self.offset, self.flushed, self.stream_time = 0, 0, NEVER
        self.point = Point(0)
        self.messages: list[bytes] = []
        self.points: dict[int, dict[bytes, bytes]] = {0: {}}
        self.forgotten: list[tuple[int, bytes]] = []

    def fold(self, ids: list[int], time: float) -> None:
        n = len(ids)
        times = np.full(n, time)
        column = ColumnRows(np.ones((n, 2), np.float32) * time, np.ones(n), times, np.ones(n, np.bool_))
        rows = Rows("user", Keys.of(ids), times, np.ones(n, np.int64), {"cr": column})
        if not self.slab.has_room(rows):
            self.flush(catch_up=True)
        self.slab.fold(rows, self.stream_time - EXPIRE_AFTER)
        self.stream_time = max(self.stream_time, time)
        self.offset += 1

    def forget(self, id: int) -> None:
        self.slab.forget(b"%d" % id, self.offset)
        self.forgotten.append((self.offset, b"%d" % id))
        self.offset += 1

    def flush(self, new_point: bool = False, catch_up: bool = False) -> None:
        if new_point:
            if self.slab.behind:
                self.flush(catch_up=True)
            self.point = Point(self.flushed, 1.0, self.stream_time)
            self.points[self.flushed] = dict(self.flushed_records)
        self.slab.expire(self.stream_time - EXPIRE_AFTER)
        old = [key for key, record in self.stored.items() if LAYOUT.decode([record])["event_time"][0] < self.stream_time - EXPIRE_AFTER]
        expired = self.slab.lacks(old)
        behind, is_all = self.slab.copy_behind(100)
        assert is_all
        copy = self.slab.copy_dirty(self.offset - 1, self.point.offset)
        assert not any(key in self.stored for key in copy.keys(copy.new))
        changed = copy.keys(copy.first) + expired
        self.messages += history.encode(Undo("user", self.point, changed, [self.stored.get(key) for key in changed]))
        put(self.flushed_records, copy.writes)
        for key in expired:
            del self.flushed_records[key], self.stored[key]
        self.slab.flushed(copy)
        if catch_up:
            put(self.stored, behind.writes)
            put(self.stored, copy.writes)
            self.slab.stored(behind)
            self.slab.stored(copy)
            assert self.stored == self.flushed_records
        self.flushed = self.offset

    def back_at(self, offset: int) -> dict[bytes, bytes]:
        former: dict[bytes, bytes | None] = {}
        for undo in map(history.decode, self.messages):
            if undo.point.offset >= offset:
                for key, record in zip(undo.keys, undo.records):
                    former.setdefault(key, record)
        state = {**self.flushed_records, **former}
        return {key: record for key, record in state.items() if record is not None}


def put(records: dict[bytes, bytes], writes: Writes) -> None:
    for key, value in zip(writes.keys.tolist(), writes.values(), strict=True):
        if value:
            records[key] = value
        else:
            records.pop(key, None)


FOLD = st.tuples(st.just("fold"), st.lists(st.integers(0, 20), min_size=1, max_size=6), st.integers(0, 12))
OTHERS = (st.just((name,)) for name in ("flush", "catch up", "point"))
STEPS = st.lists(st.one_of(FOLD, FOLD, FOLD, *OTHERS, st.tuples(st.just("forget"), st.integers(0, 20))))


@given(STEPS)
def test_every_point_can_be_brought_back(steps: list[tuple]) -> None:  # type: ignore[type-arg]
    world = World()
    for step in steps:
        match step:
            case ("fold", ids, time):
                world.fold(ids, float(time))
            case ("forget", id):
                world.forget(id)
            case ("flush",):
                world.flush()
            case ("catch up",):
                world.flush(catch_up=True)
            case ("point",):
                world.flush(new_point=True)
    world.flush()
    for offset, expected in world.points.items():
        found = world.back_at(offset)
        for order, key in world.forgotten:
            if order >= offset:  # it will be met again on the way from the point, so what it has before that does not matter
                expected.pop(key, None)
                found.pop(key, None)
        assert found == expected, offset


def test_messages_are_cut_before_they_are_too_large() -> None:
    keys = [b"%d" % i for i in range(5000)]
    records: list[bytes | None] = [None if i % 7 == 0 else bytes([i % 256]) * 500 for i in range(5000)]
    point = Point(17, 1.5, 2.5)
    messages = list(history.encode(Undo("user", point, keys, records)))
    assert len(messages) > 2
    assert max(map(len, messages)) < 1 << 20
    back = [history.decode(message) for message in messages]
    assert all(undo.point == point and undo.entity == "user" for undo in back)
    assert [key for undo in back for key in undo.keys] == keys
    assert [record for undo in back for record in undo.records] == records
    assert list(history.encode(Undo("user", point, [], []))) == []


@pytest.mark.parametrize(
    "given",
    [
        Progress(0),
        Progress(7, 1.7e9, 1.6e9, Point(5, 1.69e9, 1.59e9), ((1, 2), (5, 7))),
        Progress(2**53, 1.7e9, NEVER, Point(), ()),
    ],
)
def test_progress_travels_in_the_metadata(given: Progress) -> None:
    assert progress.decode(given.offset, progress.encode(given)) == given
    assert len(progress.encode(Progress(1, 1.7e9, 1.6e9, Point(1, 1.6e9, 1.5e9), ((10**13, 10**13 + 1),) * progress.MOST_SKIPPED))) < 4096


@pytest.mark.parametrize("metadata", [None, "", "x", "{}", "[]", "null", '{"point": []}', '{"point": [1, 2, 3]}'])
def test_metadata_of_others_is_told_apart(metadata: str | None) -> None:
    assert progress.decode(7, metadata) is None
