"""State in columns: combined or not, grown or not, written and loaded, it is the same state."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossrep.columnar.aggregates import Aggregates, combine
from crossrep.columnar.algebra import NEVER
from crossrep.columnar.records import RecordLayout
from crossrep.columnar.rows import ColumnRows, Rows
from crossrep.keys import KeyIndex
from tests.crossrep.columnar.wire_samples import raw_rows, space

SPACE = space()
USER = RecordLayout(SPACE, "user")
SEEDS = st.integers(0, 2**32 - 1)


def some_rows(seed: int, n: int = 40, keys: int = 9) -> Rows:
    rng = np.random.default_rng(seed)
    return raw_rows(SPACE, "user", [b"u%d" % key for key in rng.integers(0, keys, n)], rng)


def fold(batches: list[Rows], capacity: int = 64) -> tuple[Aggregates, KeyIndex]:
    index, state = KeyIndex(capacity), Aggregates(USER, capacity)
    for rows in batches:
        slots = index.find(rows.keys)
        index.insert(rows.keys, slots)
        state.fold(slots, rows)
    return state, index


def by_key(state: Aggregates, index: KeyIndex) -> dict[bytes, np.void]:
    slots = index.slots()
    return dict(zip(index.keys(slots).tolist(), state.records(slots)))


def assert_same(one: dict[bytes, np.void], other: dict[bytes, np.void], tolerance: float) -> None:
    assert set(one) == set(other)
    for key, a in one.items():
        b = other[key]
        for name in a.dtype.names:
            if name in ("cr", "fast", "clicks"):
                assert np.abs(a[name] - b[name]).max() <= tolerance * 10, (key, name)
            elif name.endswith("_weight"):
                assert a[name] == pytest.approx(b[name], rel=1e-12), (key, name)
            elif name == "ur":
                assert a[name].tolist() == b[name].tolist(), (key, name)
            elif name not in ("header", "source_offset"):
                assert a[name] == b[name], (key, name)


@given(SEEDS, st.integers(1, 5))
def test_combined_batches_lead_to_the_state_of_raw_rows(seed: int, batches: int) -> None:
    """Also where every batch's vectors become float32 means on the way."""
    given_rows = [some_rows(seed + i) for i in range(batches)]
    assert_same(by_key(*fold(given_rows)), by_key(*fold([combine(SPACE, rows) for rows in given_rows])), 1e-6)


@given(SEEDS)
def test_combine_has_one_row_a_key_in_order_of_appearance(seed: int) -> None:
    rows = some_rows(seed)
    combined = combine(SPACE, rows)
    assert combined.keys.tolist() == list(dict.fromkeys(rows.keys.tolist()))
    assert combined.entity == "user"
    assert combined.counts.sum() == len(rows)
    assert set(combined.columns) == set(SPACE.entities["user"].columns)


@given(SEEDS)
def test_combine_is_idempotent(seed: int) -> None:
    once = combine(SPACE, some_rows(seed))
    twice = combine(SPACE, once)
    assert twice.keys.tolist() == once.keys.tolist()
    for name, column in once.columns.items():
        assert np.array_equal(column.vectors, twice.columns[name].vectors)
        assert np.array_equal(column.weights, twice.columns[name].weights)


def test_combine_of_no_rows_and_of_one() -> None:
    assert len(combine(SPACE, some_rows(1, n=0))) == 0
    assert combine(SPACE, some_rows(1, n=1)).counts.tolist() == [1]


def test_a_column_sees_only_its_events() -> None:
    rows = some_rows(3, n=200, keys=20)
    clicked = rows.columns["clicks"].present
    state = by_key(*fold([rows]))
    for key, record in state.items():
        own = np.array([k == key for k in rows.keys.tolist()])
        assert record["count"] == own.sum()
        if (own & clicked).any():
            assert record["clicks_time"] == rows.times[own & clicked].max()
            assert record["rate_weight"] > 0
        else:
            assert (record["clicks_weight"], record["clicks_time"], record["rate_weight"]) == (0, NEVER, 0)
            assert (record["clicks"] == 0).all()


def test_a_column_that_no_row_touched_stays_absent_in_combined_rows() -> None:
    rows = some_rows(5, n=30, keys=3)
    nobody = ColumnRows(rows.columns["clicks"].vectors, rows.columns["clicks"].weights, rows.times, np.zeros(30, np.bool_))
    combined = combine(SPACE, Rows("user", rows.keys, rows.times, rows.counts, {**rows.columns, "clicks": nobody}))
    assert not combined.columns["clicks"].present.any()
    assert combined.columns["cr"].present.all()


def test_half_lives_of_one_source_differ_only_in_their_weights() -> None:
    """The example of the design: one vector now, one a minute (fast's half-life) earlier."""
    early, late = some_rows(1, n=1, keys=1), some_rows(2, n=1, keys=1)

    def at(rows: Rows, time: float) -> Rows:
        times = np.array([time])
        columns = {name: ColumnRows(c.vectors, np.ones(1), times, np.ones(1, np.bool_)) for name, c in rows.columns.items()}
        return Rows("user", rows.keys, times, rows.counts, columns)

    (record,) = by_key(*fold([at(early, 1e9), at(late, 1e9 + 60)])).values()
    a, b = early.columns["cr"].vectors[0].astype(float), late.columns["cr"].vectors[0].astype(float)
    assert record["fast_weight"] == 1.5
    assert record["fast"] == pytest.approx(a / 3 + b * 2 / 3, rel=1e-6)
    assert record["cr_weight"] == pytest.approx(1 + 2 ** (-60 / 259200))
    assert record["rate_weight"] == pytest.approx(1 + 2 ** (-60 / 21600))
    assert record["ur"].tolist() == late.columns["ur"].vectors[0].tolist()


@given(SEEDS)
def test_records_loaded_give_the_same_bytes(seed: int) -> None:
    state, index = fold([some_rows(seed)])
    records = state.records(index.slots())
    other = Aggregates(USER, 64)
    places = np.random.default_rng(seed).permutation(64)[: len(records)].astype(np.int32)
    other.load(places, USER.decode([r.tobytes() for r in records]))
    assert other.records(places).tobytes() == records.tobytes()


@given(SEEDS, st.integers(0, 5))
def test_state_goes_on_after_being_written_and_loaded(seed: int, cut: int) -> None:
    """A restore or an eviction costs float32 rounding of the means, and nothing else."""
    batches = [some_rows(seed + i) for i in range(6)]
    whole, whole_index = fold(batches)
    state, index = fold(batches[:cut])
    slots = index.slots()
    restored = Aggregates(USER, 64)
    restored.load(slots, state.records(slots))
    for rows in batches[cut:]:
        places = index.find(rows.keys)
        index.insert(rows.keys, places)
        restored.fold(places, rows)
    assert_same(by_key(whole, whole_index), by_key(restored, index), 1e-6)


def test_records_carry_the_offset_up_to_which_they_are_true() -> None:
    state, index = fold([some_rows(1, n=20, keys=9)])
    assert (state.records(index.slots(), 17)["source_offset"] == 17).all()


def test_cleared_slots_are_as_new() -> None:
    state, index = fold([some_rows(1)])
    slots = index.slots()
    kept, gone = slots[::2], slots[1::2]
    before = state.records(kept).tobytes()
    state.clear(gone)
    assert state.records(gone).tobytes() == Aggregates(USER, 64).records(gone).tobytes()
    assert state.records(kept).tobytes() == before


def test_growing_keeps_every_slot_and_adds_empty_ones() -> None:
    batches = [some_rows(i) for i in range(3)]
    state, index = fold(batches, capacity=9)
    before = state.records(index.slots()).tobytes()
    state.grow(31)
    assert state.capacity == 31
    assert state.records(index.slots()).tobytes() == before
    fresh = np.setdiff1d(np.arange(31), index.slots()).astype(np.int32)
    assert state.records(fresh).tobytes() == Aggregates(USER, 31).records(fresh).tobytes()
    rows = some_rows(9)
    state.fold(np.full(len(rows), 30, np.int32), rows)
    assert state.records(np.array([30]))["count"] == len(rows)


def test_counts_are_exact_beyond_float32() -> None:
    state = Aggregates(USER, 1)
    rows = some_rows(1, n=1)
    many = Rows("user", rows.keys, rows.times, np.array([2**40 + 1]), rows.columns)
    for _ in range(3):
        state.fold(np.zeros(1, np.int32), many)
    record = state.records(np.zeros(1, np.int32))
    assert record["count"] == 3 * (2**40 + 1)
    again = Aggregates(USER, 1)
    again.load(np.zeros(1, np.int32), record)
    assert again.count[0] == 3 * (2**40 + 1)
