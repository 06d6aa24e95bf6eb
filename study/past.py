"""What was known of a user or item at each impression: earlier impressions alone, folded by the stream's kernels
(`crossrep.training.sweep`).

A click has its impression's time and vectors, so the two events are one row here whose weight is the sum of theirs: that is what the
stream's combiner makes of them. Rows are strictly earlier than the moment that is asked about; equal times are not.

Beside what a space can declare (decayed means and latest values) there are three aggregates of others, to compare with. They depend on
the order of events, so no stream that may be late or repeat itself can keep them:

    count_sum    a' = r·a + x, the sum of the authors' public code (r = .99)
    count_ema    the same divided by the sum of its weights: a mean
    convex       a' = β·a + (1 - β)·x, β = 2^(-dt/h), dt the time since the last event; the first x is taken whole
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numba
import numpy as np
from numpy.typing import NDArray

from crossrep.columnar.algebra import decay
from crossrep.columnar.rows import ColumnRows
from crossrep.spec import Column, parse_duration
from crossrep.training.sweep import column_at, spans

FOR_EVER = "52000w"  # the longest half-life there is: a plain mean

Ints = NDArray[np.int64]
Times = NDArray[np.float64]


@dataclass(frozen=True)
class Aggregate:
    """How vectors of earlier impressions become one.

    Args:
        half_life: such as "7d"; of decayed_mean and convex.
        impression: what one weighs; 0: only those that were clicked count.
        click: what its click adds to that. -impression: only those that were not clicked count.
        rate: of count_sum and count_ema.
    """

    kind: Literal["decayed_mean", "latest", "count_sum", "count_ema", "convex"] = "decayed_mean"
    half_life: str | None = None
    impression: float = 1.0
    click: float = 0.0
    rate: float = 0.99


@dataclass(frozen=True)
class Known:
    """n answers."""

    vectors: NDArray[np.float32]  # [n, dim], 0 where nothing was known
    weights: NDArray[np.float64]  # [n], what was folded weighs at the moment; count_*: the weights' sum; latest, convex: 1
    present: NDArray[np.bool_]  # [n]


class Past:
    """The impressions before each of some moments.

    Args:
        key, time: of all N impressions: whose they are, and when, seconds since 1970.
        asked_key, asked_time: of n moments, in any order.
    """

    def __init__(self, key: NDArray[np.int32], time: Times, asked_key: NDArray[np.int32], asked_time: Times):
        self.order = np.lexsort((time, key))
        self.asked = np.lexsort((asked_time, asked_key))
        self.times, self.at = time[self.order], asked_time[self.asked]
        starts = np.searchsorted(key[self.order], np.arange(max(key.max(), asked_key.max()) + 2)).astype(np.int64)
        self.begins, self.ends = np.empty(len(self.asked), np.int64), np.empty(len(self.asked), np.int64)
        single = np.ones(len(key), np.int64)
        spans(starts, self.times, single, asked_key[self.asked], self.at, self.at, np.inf, self.begins, self.ends)

    def counts(self) -> Ints:
        """[n]: impressions before each moment."""
        return self._as_asked(self.ends - self.begins)

    def known(self, how: Aggregate, vectors: NDArray[np.float32], clicked: NDArray[np.bool_]) -> Known:
        """Args: vectors: float32 [N, dim], of all impressions, or dim 0 for the weight alone; clicked: [N]."""
        weights: Times = np.float64(how.impression) + how.click * clicked[self.order]
        half_life = parse_duration(how.half_life) if how.half_life else None
        rows = ColumnRows(np.ascontiguousarray(vectors[self.order]), weights, self.times, weights > 0)
        if how.kind in ("decayed_mean", "latest"):
            column = Column.model_validate({"source": "x", "dim": vectors.shape[1], "aggregate": how.kind, "half_life": how.half_life})
            found = column_at(column, rows, self.begins, self.ends)
            sums = found.present.astype(np.float64)
            if half_life:
                sums[found.present] = decay(found.weights[found.present], (self.at - found.times)[found.present], half_life)
            return Known(self._as_asked(found.vectors), self._as_asked(sums), self._as_asked(found.present))
        out, sums = np.zeros((len(self.asked), vectors.shape[1]), np.float32), np.zeros(len(self.asked))
        spread = (self.begins, self.ends, rows.vectors, rows.weights, out, sums)
        if how.kind == "convex":
            assert half_life is not None
            _convex(*spread, self.times, half_life)
        else:
            _counted(*spread, how.rate, how.kind == "count_ema")
        return Known(self._as_asked(out), self._as_asked(sums), self._as_asked(sums > 0))

    def _as_asked(self, found: NDArray[Any]) -> NDArray[Any]:
        back = np.empty_like(found)
        back[self.asked] = found
        return back


@numba.njit(cache=True, nogil=True)
def _counted(begins, ends, vectors, weights, out, sums, rate, mean):  # type: ignore[no-untyped-def]
    state = np.zeros(vectors.shape[1])
    begin = i = -1
    total = 0.0
    for q in range(len(begins)):
        if begins[q] != begin:
            begin = i = begins[q]
            state[:], total = 0.0, 0.0
        while i < ends[q]:
            if weights[i] > 0:
                state = rate * state + weights[i] * vectors[i]
                total = rate * total + weights[i]
            i += 1
        sums[q] = total
        if total > 0:
            out[q] = state / total if mean else state


@numba.njit(cache=True, nogil=True)
def _convex(begins, ends, vectors, weights, out, sums, times, half_life):  # type: ignore[no-untyped-def]
    state = np.zeros(vectors.shape[1])
    begin = i = -1
    last = -np.inf  # nothing: β is 0
    for q in range(len(begins)):
        if begins[q] != begin:
            begin = i = begins[q]
            last = -np.inf
        while i < ends[q]:
            if weights[i] > 0:
                beta = 2.0 ** ((last - times[i]) / half_life)
                state = beta * state + (1 - beta) * vectors[i]
                last = times[i]
            i += 1
        if last > -np.inf:
            sums[q] = 1.0
            out[q] = state
