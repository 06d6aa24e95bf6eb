"""Rows in columns: what a frame holds, what a fold takes, what a combiner gives, and what was known of a key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crossrep.keys import Keys


@dataclass(frozen=True)
class ColumnRows:
    """One column's part of n rows. Where `present` is False the row does not touch the column."""

    vectors: NDArray[np.float32]  # [n, dim]; dim 0: the column has weights only
    weights: NDArray[np.float64]  # [n], decayed to `times`; meaningless for `latest`
    times: NDArray[np.float64]  # [n], seconds since 1970
    present: NDArray[np.bool_]  # [n]

    def part(self, rows: slice) -> ColumnRows:
        """Some of the rows, nothing copied."""
        return ColumnRows(self.vectors[rows], self.weights[rows], self.times[rows], self.present[rows])


@dataclass(frozen=True)
class Rows:
    """n partials of one entity; a key may occur more than once."""

    entity: str
    keys: Keys
    times: NDArray[np.float64]  # [n], newest event time in the row, seconds since 1970
    counts: NDArray[np.int64]  # [n], events in the row
    columns: Mapping[str, ColumnRows]  # every column of the entity's spec

    def __len__(self) -> int:
        return len(self.times)

    def take(self, rows: NDArray[np.int64]) -> Rows:
        """The given rows, in that order."""
        vectors = {id(column.vectors): column.vectors[rows] for column in self.columns.values()}  # what columns share they still share
        columns = {
            name: ColumnRows(vectors[id(column.vectors)], column.weights[rows], column.times[rows], column.present[rows])
            for name, column in self.columns.items()
        }
        return Rows(self.entity, self.keys.take(rows), self.times[rows], self.counts[rows], columns)


@dataclass(frozen=True)
class Known:
    """What was known of n keys, each at a moment of its own."""

    counts: NDArray[np.int64]  # [n], events; 0: nothing was known
    event_times: NDArray[np.float64]  # [n], of the newest; -inf
    columns: dict[str, ColumnRows]  # not `present`: nothing had touched it

    def part(self, rows: slice) -> Known:
        """Some of them, nothing copied."""
        return Known(self.counts[rows], self.event_times[rows], {name: column.part(rows) for name, column in self.columns.items()})
