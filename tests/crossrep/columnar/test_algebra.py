"""The algebra against its closed form: whatever the order and grouping, the state is the decayed weighted mean."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from crossrep.columnar import algebra

# Why 1e-10: a fold adds at most a few ulp of the largest |x|, and an error of a weight of about ulp · Δt / h. Beyond Δt / h = 1400
# a row of weight 1e100 is nothing beside one of 1e-100, so a weight is off by 1400 · 1e-16 a fold at worst, and there are at most 30 folds.
TOLERANCE = 1e-10
DIM = 3


@dataclass(frozen=True)
class Event:
    time: float
    weight: float
    vector: tuple[float, ...]


YEAR = 365 * 86400.0
TIMES = st.one_of(
    st.sampled_from([0.0, 1.7e9, 1.7e9 + 1e-3, 1.7e9 + 1, 1.7e9 + YEAR]),
    st.floats(0, 4e9),
    st.floats(1.7e9, 1.7e9 + 60),
    st.floats(0, 1e-6),
)
WEIGHTS = st.one_of(st.just(1.0), st.floats(0.1, 10), st.floats(-100, 100).map(lambda e: 10.0**e))
VALUES = st.one_of(st.floats(-10, 10, width=32), st.floats(-(2.0**127), 2.0**127, width=32))
EVENTS = st.lists(st.builds(Event, TIMES, WEIGHTS, st.tuples(*[VALUES] * DIM)), min_size=1, max_size=12)
HALF_LIVES = st.one_of(st.sampled_from([1.0, 60.0, 3 * 86400.0, 100 * YEAR]), st.floats(-3, 10).map(lambda e: 10.0**e))


class State:
    """Some slots of (mean, weight, time)."""

    def __init__(self, slots: int = 1, dim: int = DIM):
        self.mean, self.weight, self.time = np.zeros((slots, dim)), np.zeros(slots), np.full(slots, algebra.NEVER)

    def fold(self, slots: list[int], events: list[Event], half_life: float, present: list[bool] | None = None) -> State:
        vectors = np.array([e.vector for e in events], np.float32).reshape(len(events), self.mean.shape[1])
        self.merge(slots, vectors, [e.weight for e in events], [e.time for e in events], half_life, present)
        return self

    def merge(self, slots, vectors, weights, times, half_life, present=None) -> None:  # type: ignore[no-untyped-def]
        taken = np.ones(len(slots), np.bool_) if present is None else np.array(present, np.bool_)
        columns = np.array(weights, np.float64), np.array(times, np.float64)
        algebra.fold_decayed(self.mean, self.weight, self.time, np.array(slots, np.int32), vectors, *columns, taken, half_life)


def closed_form(events: list[Event], half_life: float) -> tuple[np.ndarray, float, float]:
    """Independent of the fold: all rows at once, in 80-bit floats."""
    wide = np.longdouble
    times = np.array([e.time for e in events], wide)
    shares = np.array([e.weight for e in events], wide) * np.exp2(-(times.max() - times) / wide(half_life))
    vectors = np.array([np.float32(e.vector) for e in events], wide)
    return (shares[:, None] * vectors).sum(axis=0) / shares.sum(), shares.sum(), float(times.max())


def check(state: State, slot: int, events: list[Event], half_life: float) -> None:
    mean, weight, time = closed_form(events, half_life)
    largest = max(abs(x) for e in events for x in e.vector)
    assert state.time[slot] == time
    assert abs(state.weight[slot] - weight) <= TOLERANCE * weight
    assert np.abs(state.mean[slot] - mean).max() <= TOLERANCE * largest


@given(EVENTS, HALF_LIVES)
@example([Event(0.0, 1e100, (1.0, 2.0, 3.0)), Event(4e9, 1e-100, (-1.0, 0.0, 5.0))], 1.0)  # 127 years against a second
@example([Event(1.7e9, 1e100, (1.0, 2.0, 3.0)), Event(1.7e9 + 664, 1e-100, (-1.0, 0.0, 5.0))], 1.0)  # both weigh the same now
@example([Event(0.0, 1.0, (1.0, 2.0, 3.0)), Event(4e9, 1.0, (-1.0, 0.0, 5.0))], 1e300)
@example([Event(1.0, 1.0, (1.0, 2.0, 3.0)), Event(0.0, 1.0, (-1.0, 0.0, 5.0))], 1e-300)
def test_one_by_one_equals_all_at_once(events: list[Event], half_life: float) -> None:
    check(State().fold([0] * len(events), events, half_life), 0, events, half_life)


@given(EVENTS, HALF_LIVES, st.randoms(use_true_random=False))
def test_any_order_gives_the_same_state(events: list[Event], half_life: float, random) -> None:  # type: ignore[no-untyped-def]
    shuffled = random.sample(events, len(events))
    check(State().fold([0] * len(events), shuffled, half_life), 0, events, half_life)
    late_first_and_last = sorted(events, key=lambda e: -e.time)
    check(State().fold([0] * len(events), late_first_and_last, half_life), 0, events, half_life)


@given(EVENTS, HALF_LIVES, st.data())
def test_any_grouping_into_partials_gives_the_same_state(events: list[Event], half_life: float, data: st.DataObject) -> None:
    """Every tree of merges: two partials are merged, and the result put back, until one is left."""
    partials = [State().fold([0], [event], half_life) for event in events]
    while len(partials) > 1:
        a = partials.pop(data.draw(st.integers(0, len(partials) - 1)))
        b = partials.pop(data.draw(st.integers(0, len(partials) - 1)))
        a.merge([0], b.mean, b.weight, b.time, half_life)
        partials.append(a)
    check(partials[0], 0, events, half_life)


@given(EVENTS, HALF_LIVES, st.data())
def test_slots_do_not_touch_each_other_and_absent_rows_touch_nothing(events: list[Event], half_life: float, data: st.DataObject) -> None:
    slots = data.draw(st.lists(st.integers(0, 2), min_size=len(events), max_size=len(events)))
    present = data.draw(st.lists(st.booleans(), min_size=len(events), max_size=len(events)))
    state = State(4).fold(slots, events, half_life, present)
    for slot in range(4):
        own = [event for event, s, p in zip(events, slots, present) if s == slot and p]
        if own:
            check(state, slot, own, half_life)
        else:
            assert (state.mean[slot] == 0).all()
            assert (state.weight[slot], state.time[slot]) == (0, algebra.NEVER)


def test_garbage_in_absent_rows_touches_nothing() -> None:
    state = State()
    state.merge([0, 0], np.full((2, DIM), np.nan, np.float32), [np.nan, -1], [np.nan, np.inf], 60.0, [False, False])
    assert (state.mean == 0).all()
    assert (state.weight[0], state.time[0]) == (0, algebra.NEVER)


@given(st.builds(Event, TIMES, WEIGHTS, st.tuples(*[VALUES] * DIM)), HALF_LIVES)
def test_the_first_event_is_taken_exactly(event: Event, half_life: float) -> None:
    state = State().fold([0], [event], half_life)
    assert state.mean[0].tolist() == list(event.vector)
    assert (state.weight[0], state.time[0]) == (event.weight, event.time)


@given(st.lists(st.tuples(TIMES, WEIGHTS), min_size=1, max_size=12), HALF_LIVES, st.tuples(*[VALUES] * DIM))
def test_a_mean_stays_within_what_it_is_of(pairs: list[tuple[float, float]], half_life: float, vector: tuple[float, ...]) -> None:
    events = [Event(time, weight, vector) for time, weight in pairs]
    assert State().fold([0] * len(events), events, half_life).mean[0].tolist() == list(vector)


def test_without_a_vector_the_weight_alone_decays() -> None:
    state = State(dim=0)
    state.merge([0, 0], np.empty((2, 0), np.float32), [1.0, 1.0], [0.0, 60.0], 60.0)
    assert (state.weight[0], state.time[0]) == (1.5, 60.0)


def test_a_hot_key_keeps_moving() -> None:
    """300,000 events of one key within its half-life: the mean is still exact, where a float32 state would long have frozen."""
    rng, n, half_life = np.random.default_rng(7), 300_000, 86400.0
    times, vectors = (
        1.7e9 + np.sort(rng.random(n)) * 3600,
        (rng.standard_normal((n, DIM)) + np.linspace(0, 1, n)[:, None]).astype(np.float32),
    )
    state = State()
    state.merge(np.zeros(n), vectors, np.ones(n), times, half_life)
    shares = np.exp2(-(np.longdouble(times.max()) - times.astype(np.longdouble)) / half_life)
    assert np.abs(state.mean[0] - (shares[:, None] * vectors).sum(axis=0) / shares.sum()).max() < 1e-12
    assert abs(state.weight[0] / shares.sum() - 1) < 1e-12


# --- latest ---

TIED = st.builds(
    Event,
    st.sampled_from([0.0, 1.0, 1.7e9, 1.7e9 + 1]),
    st.just(1.0),
    st.tuples(*[st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.1, 256.5])] * DIM),
)


def latest(events: list[Event], present: list[bool] | None = None) -> tuple[bytes, float]:
    vector, time = np.zeros((1, DIM), np.float32), np.full(1, algebra.NEVER)
    vectors, times = np.array([e.vector for e in events], np.float32), np.array([e.time for e in events])
    algebra.fold_latest(vector, time, np.zeros(len(events), np.int32), vectors, times, np.array(present or [True] * len(events)))
    return vector.tobytes(), time[0]


@given(st.lists(TIED, min_size=1, max_size=4))
def test_latest_does_not_depend_on_order(events: list[Event]) -> None:
    time, vector = max((e.time, np.float32(e.vector).tobytes()) for e in events)
    for order in itertools.permutations(events):
        assert latest(list(order)) == (vector, time)


def test_latest_skips_absent_rows() -> None:
    old, new = Event(1.0, 1.0, (1, 2, 3)), Event(2.0, 1.0, (4, 5, 6))
    assert latest([old, new], [True, False]) == (np.float32(old.vector).tobytes(), 1.0)
    assert latest([new], [False]) == (bytes(4 * DIM), algebra.NEVER)


# --- counts and times of an entity ---


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 2**40), st.floats(0, 4e9)), max_size=30))
def test_counts_are_exact_and_times_are_the_newest(rows: list[tuple[int, int, float]]) -> None:
    count, newest = np.zeros(3, np.int64), np.full(3, algebra.NEVER)
    slots, counts, times = (np.array(column) for column in zip(*rows)) if rows else (np.empty(0), np.empty(0), np.empty(0))
    algebra.fold_entity(count, newest, slots.astype(np.int32), counts.astype(np.int64), times.astype(np.float64))
    for slot in range(3):
        own = [row for row in rows if row[0] == slot]
        assert count[slot] == sum(row[1] for row in own)
        assert newest[slot] == max((row[2] for row in own), default=algebra.NEVER)


# --- decay ---


@pytest.mark.parametrize(("since", "left"), [(0, 8.0), (60, 4.0), (120, 2.0), (-1e9, 8.0), (1e12, 0.0)])
def test_decay(since: float, left: float) -> None:
    assert algebra.decay(8.0, since, 60.0) == left


def test_decay_takes_columns() -> None:
    assert algebra.decay([8.0, 4.0], np.array([60.0, -1.0]), 60.0).tolist() == [4.0, 4.0]


# --- widen ---


def test_every_half_is_widened_exactly() -> None:
    halves = np.arange(65536, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)]
    floats, finite = algebra.widen(halves)
    assert finite
    assert floats.dtype == np.float32
    assert np.array_equal(floats.view(np.uint32), halves.astype(np.float32).view(np.uint32))  # by bits, so -0.0 counts as well


def test_every_half_that_is_not_finite_is_seen() -> None:
    halves = np.arange(65536, dtype=np.uint16).view(np.float16)
    wrong = halves[~np.isfinite(halves)]
    assert len(wrong) == 2 * 1024
    assert not any(algebra.widen(np.array([0.5, half], np.float16))[1] for half in wrong)
    assert all(algebra.widen(np.array([half], np.float16))[1] for half in halves[np.isfinite(halves)][::97])


@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5), (0, 4), (7, 64)])
def test_widen_keeps_the_shape(shape: tuple[int, ...]) -> None:
    halves = np.random.default_rng(0).standard_normal(shape).astype(np.float16)
    floats, finite = algebra.widen(halves)
    assert finite
    assert np.array_equal(floats, halves.astype(np.float32))
