"""The slab with eight slots: eviction is constant, and nothing is ever lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crossrep.columnar.aggregates import Aggregates
from crossrep.columnar.records import RecordLayout
from crossrep.columnar.rows import ColumnRows, Rows
from crossrep.errors import BadRecord
from crossrep.keys import KeyIndex, Keys
from crossrep.spec import Space
from state.slab import Copy, Slab
from state.store import Memory, Meta, Store, open_store

SPACE = Space.parse("""
name = "slab"
partitions = 1
[entities.user.columns]
cr = { source = "cr", dim = 3, aggregate = "decayed_mean", half_life = "1h" }
clicks = { source = "cr", dim = 0, aggregate = "decayed_mean", half_life = "1h", events = ["click"] }
ur = { source = "ur", dim = 2, aggregate = "latest" }
""")
LAYOUT = RecordLayout(SPACE, "user")
SLOTS = 8


def frame(ids: list[int], seed: int) -> Rows:
    rng = np.random.default_rng(seed)
    n = len(ids)
    times, weights, all_rows = 1.7e9 + rng.integers(0, 5, n) * 1800.0, rng.uniform(0.5, 5, n), np.ones(n, np.bool_)
    columns = {
        "cr": ColumnRows(rng.standard_normal((n, 3)).astype(np.float32), weights, times, all_rows),
        "clicks": ColumnRows(np.empty((n, 0), np.float32), weights, times, rng.random(n) < 0.4),
        "ur": ColumnRows(rng.integers(-2, 3, (n, 2)).astype(np.float32), np.ones(n), times, all_rows),
    }
    return Rows("user", Keys.of(ids), times, rng.integers(1, 4, n), columns)


class Harness:
    """A slab over a store that is some flushes behind, one flush at a time as in production, beside aggregates that never evict.

    The store fails the test if it is asked for a key whose last copy it does not hold: then the slab has evicted what was not safe.
    """

    def __init__(self, get: Callable[[list[bytes]], list[bytes | None]], put: Callable[[dict[bytes, bytes]], None]):
        self._get, self._put = get, put
        self.slab = Slab(LAYOUT, self._read, SLOTS)
        self.dirty: set[bytes] = set()
        self.behind: dict[bytes, bytes] = {}  # flushed, but not yet in the store
        self.flight: Copy | None = None
        self.offset = -1
        self._index, self._model = KeyIndex(512), Aggregates(LAYOUT, 512)
        self.reads = 0

    def _read(self, keys: list[bytes]) -> list[bytes | None]:
        unsafe = self.dirty | set(self.behind) | set(self.flight.writes.keys.tolist() if self.flight else [])
        assert not unsafe & set(keys), "evicted before the store held it"
        assert len(set(keys)) == len(keys)
        self.reads += len(keys)
        return self._get(keys)

    def copy(self) -> None:
        if self.flight is None:
            self.flight = self.slab.copy_dirty(self.offset)
            assert set(self.flight.writes.keys.tolist()) == self.dirty
            assert len(self.flight.writes) == len(self.dirty)
            self.dirty = set()

    def write(self) -> None:
        if self.flight is not None:
            self.behind.update(records(self.flight))
            self.slab.flushed(self.flight)
            self.flight = None
        assert self.slab.behind == bool(self.behind)

    def catch_up(self, most: int = SLOTS) -> None:
        copy, is_all = self.slab.copy_behind(most)
        found = records(copy)
        assert len(found) <= most
        assert found.items() <= self.behind.items(), "what is copied late is what was flushed"
        waiting = self.behind.keys() - self.dirty - set(self.flight.writes.keys.tolist() if self.flight else [])
        assert is_all == (found.keys() == waiting)
        self._put(found)
        self.slab.stored(copy)
        for key in found:
            del self.behind[key]

    def flush(self) -> None:
        self.write()
        self.copy()
        self.write()
        self.catch_up(1000)

    def fold(self, rows: Rows) -> None:
        if not self.slab.has_room(rows):
            assert self.dirty or self.behind or self.flight is not None, "no room, though nothing waits for a flush"
            self.flush()
            assert self.slab.has_room(rows), "no room after a completed flush"
        before = self.slab.capacity
        self.offset += 1
        self.slab.fold(rows)
        self.dirty |= set(rows.keys.tolist())
        if len(rows) <= SLOTS:
            assert self.slab.capacity <= max(SLOTS, before)
        slots = self._index.find(rows.keys)
        self._index.insert(rows.keys, slots)
        self._model.fold(slots, rows)

    def check(self) -> None:
        """Everything flushed: the store agrees with the aggregates that never evict."""
        self.flush()
        assert not self.slab.behind and not self.slab.unflushed
        slots = self._index.slots()
        keys = self._index.keys(slots).tolist()
        stored = self._get(keys)
        assert None not in stored
        got, expected = LAYOUT.decode(stored), self._model.records(slots)
        for name in ("count", "event_time", "cr_time", "clicks_time", "ur_time", "ur"):
            assert np.array_equal(got[name], expected[name]), name
        for name in ("cr_weight", "clicks_weight"):
            assert np.allclose(got[name], expected[name], rtol=1e-12, atol=0), name
        assert np.abs(got["cr"] - expected["cr"]).max() < 1e-5


def records(copy: Copy) -> dict[bytes, bytes]:
    return dict(zip(copy.writes.keys.tolist(), copy.writes.values(), strict=True))


CATCH_UP = st.tuples(st.just("catch up"), st.integers(1, 8))
FRAMES = st.tuples(st.just("fold"), st.lists(st.integers(0, 30), min_size=1, max_size=8), st.integers(0, 2**32 - 1))
LARGE = st.tuples(st.just("fold"), st.lists(st.integers(0, 30), min_size=9, max_size=25), st.integers(0, 2**32 - 1))
STEPS = st.lists(st.one_of(FRAMES, FRAMES, FRAMES, st.just(("copy",)), st.just(("write",)), CATCH_UP, LARGE), max_size=40)
SMALL_STEPS = st.lists(st.one_of(FRAMES, FRAMES, st.just(("copy",)), st.just(("write",)), CATCH_UP), max_size=60)


def run(harness: Harness, steps: list[tuple]) -> None:  # type: ignore[type-arg]
    for step in steps:
        match step:
            case ("fold", ids, seed):
                harness.fold(frame(ids, seed))
            case ("copy",):
                harness.copy()
            case ("write",):
                harness.write()
            case ("catch up", most):
                harness.catch_up(most)
    if harness.offset >= 0:
        harness.check()


def over_a_dict() -> Harness:
    stored: dict[bytes, bytes] = {}
    return Harness(lambda keys: [stored.get(key) for key in keys], stored.update)


@settings(max_examples=150)
@given(SMALL_STEPS)
def test_frames_that_fit_lose_nothing_whenever_flushed(steps: list[tuple]) -> None:  # type: ignore[type-arg]
    run(over_a_dict(), steps)


@settings(max_examples=100)
@given(STEPS)
def test_frames_larger_than_the_slab_lose_nothing(steps: list[tuple]) -> None:  # type: ignore[type-arg]
    run(over_a_dict(), steps)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = open_store(tmp_path / "store", Meta("h", {}), {"user": (0, 0)}, Memory.of(8 << 20), 3600)
    yield opened
    opened.close()


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(STEPS)
def test_nothing_is_lost_over_rocksdb(store: Store, steps: list[tuple]) -> None:  # type: ignore[type-arg]
    everything = [b"%d" % i for i in range(31)]
    store.write({"user": (everything, [b""] * 31)})

    def put(found: dict[bytes, bytes]) -> None:
        store.write({"user": (list(found), list(found.values()))})

    run(Harness(lambda keys: store.get("user", keys), put), steps)


def test_long_run_with_zipf_keys_evicts_and_reads_constantly() -> None:
    harness, rng = over_a_dict(), np.random.default_rng(5)
    for step in range(600):
        harness.fold(frame((rng.zipf(1.3, rng.integers(1, 9)) % 200).tolist(), step))
        if step % 3 == 0:
            harness.write()
        if step % 5 == 0:
            harness.copy()
        if step % 7 == 0:
            harness.catch_up(3)
    assert harness.reads > 1000
    assert harness.slab.misses == harness.reads
    assert harness.slab.capacity == SLOTS
    harness.check()


def test_a_fold_between_copy_and_flushed_stays_dirty() -> None:
    harness = over_a_dict()
    harness.fold(frame([1, 2], 0))
    harness.copy()
    harness.fold(frame([2, 3], 1))
    harness.write()
    again = harness.slab.copy_dirty(0)
    assert sorted(again.writes.keys.tolist()) == [b"2", b"3"]


def test_a_copy_does_not_change_while_folding_goes_on() -> None:
    harness = over_a_dict()
    harness.fold(frame([1, 2], 0))
    harness.copy()
    assert harness.flight is not None
    before = harness.flight.writes.records.tobytes()
    harness.fold(frame([1, 2], 1))
    assert harness.flight.writes.records.tobytes() == before


def test_nothing_dirty_gives_an_empty_copy() -> None:
    copy = over_a_dict().slab.copy_dirty(0)
    assert copy.writes.keys.tolist() == []
    assert len(copy.writes) == 0


def test_dirty_rows_bounds_the_dirty_keys() -> None:
    harness = over_a_dict()
    harness.fold(frame([1, 1, 2], 0))
    assert harness.slab.dirty_rows == 3
    harness.copy()
    assert harness.slab.dirty_rows == 0


def test_has_room_counts_what_is_held_dirty_and_wanted() -> None:
    harness = over_a_dict()
    slab = harness.slab
    assert slab.has_room(frame(list(range(20)), 0))  # nothing dirty: a frame is never split
    harness.fold(frame([0, 1, 2, 3, 4], 0))
    assert slab.has_room(frame([5, 6, 7], 1))
    assert slab.has_room(frame([0, 1, 2, 5, 6, 7], 1))
    assert not slab.has_room(frame([5, 6, 7, 8], 1))
    harness.copy()
    assert not slab.has_room(frame([5, 6, 7, 8], 1))  # flushing is not clean
    harness.write()
    assert not slab.has_room(frame([5, 6, 7, 8], 1))  # nor is what the store does not hold
    harness.catch_up()
    assert slab.has_room(frame([5, 6, 7, 8], 1))
    harness.fold(frame([5, 6, 7], 1))
    assert slab.has_room(frame([8, 9, 10, 11, 12], 2))  # five clean ones can go
    assert not slab.has_room(frame([8, 9, 10, 11, 12, 13], 2))
    assert not slab.has_room(frame([0, 8, 9, 10, 11, 12], 2))  # but not the one the frame needs


@pytest.mark.parametrize("flushing", [False, True])
def test_folding_without_room_grows_rather_than_evicts_what_is_not_safe(flushing: bool) -> None:
    """A caller that forgets has_room costs memory, never a count."""
    harness = over_a_dict()
    harness.fold(frame(list(range(8)), 0))
    if flushing:
        harness.copy()
    rows = frame(list(range(100, 108)), 1)
    assert not harness.slab.has_room(rows)
    harness.slab.fold(rows)
    assert len(harness.slab) == 16
    harness.slab.fold(frame(list(range(8)), 2))  # the harness's store refuses to be asked for them
    assert harness.slab.misses == 16


def test_a_slab_is_crowded_when_little_can_be_evicted() -> None:
    harness = over_a_dict()
    harness.fold(frame([0, 1, 2, 3, 4, 5], 0))
    assert not harness.slab.crowded
    harness.fold(frame([6], 1))
    assert harness.slab.crowded
    harness.flush()
    assert not harness.slab.crowded and len(harness.slab) == 7


def test_the_least_recently_used_go_first() -> None:
    slab, asked = Slab(LAYOUT, lambda keys: asked.extend(keys) or [None] * len(keys), SLOTS), list[bytes]()  # type: ignore[func-returns-value]
    for key in range(8):
        slab.fold(frame([key], key))
    slab.fold(frame([0], 9))
    slab.flushed(slab.copy_dirty(0))
    slab.stored(slab.copy_behind(8)[0])
    slab.fold(frame([20], 10))  # evicts 1, the oldest
    asked.clear()
    slab.fold(frame([0, 2, 3, 4, 5, 6, 7], 11))
    assert asked == []


def test_the_slab_grows_to_its_limit_and_keeps_everything() -> None:
    asked: list[bytes] = []
    slab = Slab(LAYOUT, lambda keys: asked.extend(keys) or [None] * len(keys), 5000)  # type: ignore[func-returns-value]
    for start in range(0, 5000, 500):
        rows = frame(list(range(start, start + 500)), start)
        assert slab.has_room(rows)
        slab.fold(rows)
    assert (len(slab), slab.capacity) == (5000, 5000)
    assert not slab.has_room(frame([5000], 1))
    assert len(asked) == 5000
    assert sorted(slab.copy_dirty(0).writes.keys.tolist()) == sorted(b"%d" % i for i in range(5000))


def test_a_stored_record_of_another_spec_is_refused() -> None:
    slab = Slab(LAYOUT, lambda keys: [b"x" * LAYOUT.size] * len(keys), SLOTS)
    with pytest.raises(BadRecord, match="stored record 0 was written with another spec"):
        slab.fold(frame([1], 1))
