"""Aggregation state in columns: numpy arrays over slots, folded by the kernels of `crossrep.columnar.algebra`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossrep.columnar import algebra
from crossrep.columnar.records import RecordLayout
from crossrep.columnar.rows import ColumnRows, Rows
from crossrep.keys import MISSING, KeyIndex
from crossrep.spec import Column, Space


class DecayedMean:
    """mean float64 [capacity, dim], weight and time float64 [capacity]."""

    def __init__(self, column: Column, capacity: int):
        assert column.half_life is not None
        self.half_life = column.half_life
        self.mean = np.zeros((capacity, column.dim))
        self.weight = np.zeros(capacity)
        self.time = np.full(capacity, algebra.NEVER)

    def fold(self, slots: NDArray[np.int32], rows: ColumnRows) -> None:
        algebra.fold_decayed(self.mean, self.weight, self.time, slots, rows.vectors, rows.weights, rows.times, rows.present, self.half_life)

    def rows(self, slots: NDArray[np.int32]) -> ColumnRows:
        return ColumnRows(self.mean[slots].astype(np.float32), self.weight[slots], self.time[slots], self.weight[slots] > 0)

    def write(self, slots: NDArray[np.int32], records: Any, name: str) -> None:
        records[f"{name}_weight"], records[f"{name}_time"] = self.weight[slots], self.time[slots]
        if self.mean.shape[1]:
            algebra.narrow(self.mean, slots, records[name])

    def read(self, slots: NDArray[np.int32], records: Any, name: str) -> None:
        self.weight[slots], self.time[slots] = records[f"{name}_weight"], records[f"{name}_time"]
        if self.mean.shape[1]:
            self.mean[slots] = records[name]

    def clear(self, slots: NDArray[np.int32]) -> None:
        self.mean[slots], self.weight[slots], self.time[slots] = 0.0, 0.0, algebra.NEVER

    def arrays(self) -> list[str]:
        return ["mean", "weight", "time"]


class Latest:
    """vector float32 [capacity, dim], time float64 [capacity]."""

    def __init__(self, column: Column, capacity: int):
        self.vector = np.zeros((capacity, column.dim), np.float32)
        self.time = np.full(capacity, algebra.NEVER)

    def fold(self, slots: NDArray[np.int32], rows: ColumnRows) -> None:
        algebra.fold_latest(self.vector, self.time, slots, rows.vectors, rows.times, rows.present)

    def rows(self, slots: NDArray[np.int32]) -> ColumnRows:
        present = self.time[slots] > algebra.NEVER
        return ColumnRows(self.vector[slots], present.astype(np.float64), self.time[slots], present)

    def write(self, slots: NDArray[np.int32], records: Any, name: str) -> None:
        records[f"{name}_time"], records[name] = self.time[slots], self.vector[slots]

    def read(self, slots: NDArray[np.int32], records: Any, name: str) -> None:
        self.time[slots], self.vector[slots] = records[f"{name}_time"], records[name]

    def clear(self, slots: NDArray[np.int32]) -> None:
        self.vector[slots], self.time[slots] = 0.0, algebra.NEVER

    def arrays(self) -> list[str]:
        return ["vector", "time"]


# A new aggregate is a class with these methods and a line here.
AGGREGATES: dict[str, Any] = {"decayed_mean": DecayedMean, "latest": Latest}


class Aggregates:
    """All columns of one entity over `capacity` slots. Which key has which slot is the caller's business."""

    def __init__(self, layout: RecordLayout, capacity: int):
        self.layout = layout
        self.count = np.zeros(capacity, np.int64)
        self.event_time = np.full(capacity, algebra.NEVER)
        self.columns = {name: AGGREGATES[column.aggregate](column, capacity) for name, column in layout.columns.items()}

    @property
    def capacity(self) -> int:
        return len(self.count)

    def fold(self, slots: NDArray[np.int32], rows: Rows) -> None:
        """Fold rows into the slots given for them."""
        algebra.fold_entity(self.count, self.event_time, slots, rows.counts, rows.times)
        for name, column in self.columns.items():
            column.fold(slots, rows.columns[name])

    def records(self, slots: NDArray[np.int32], source_offset: NDArray[np.int64] | int = -1) -> NDArray[np.void]:
        """The records of these slots, as they go to the changelog and to RocksDB, each true up to the frame at `source_offset`."""
        records = self.layout.empty(len(slots))
        records["count"], records["event_time"] = self.count[slots], self.event_time[slots]
        records["source_offset"] = source_offset
        for name, column in self.columns.items():
            column.write(slots, records, name)
        return records

    def load(self, slots: NDArray[np.int32], records: NDArray[np.void]) -> None:
        """Set slots from records."""
        self.count[slots], self.event_time[slots] = records["count"].astype(np.int64), records["event_time"]
        for name, column in self.columns.items():
            column.read(slots, records, name)

    def clear(self, slots: NDArray[np.int32]) -> None:
        """Empty slots, so that other keys can use them."""
        self.count[slots], self.event_time[slots] = 0, algebra.NEVER
        for column in self.columns.values():
            column.clear(slots)

    def grow(self, capacity: int) -> None:
        """Enlarge, keeping every slot."""
        self.count = _grown(self.count, capacity, 0)
        self.event_time = _grown(self.event_time, capacity, algebra.NEVER)
        for column in self.columns.values():
            for name in column.arrays():
                setattr(column, name, _grown(getattr(column, name), capacity, algebra.NEVER if name == "time" else 0))


def combine(space: Space, rows: Rows) -> Rows:
    """Merge rows of the same key into one, in order of first appearance, by the stream's own fold: the state it leads to is the same."""
    index = KeyIndex(len(rows))
    slots = np.full(len(rows), MISSING, np.int32)
    first = index.insert(rows.keys, slots)
    if len(first) == len(rows):
        return rows
    merged = Aggregates(RecordLayout(space, rows.entity), len(first))
    merged.fold(slots, rows)
    kept = slots[first]
    columns = {name: column.rows(kept) for name, column in merged.columns.items()}
    return Rows(rows.entity, rows.keys.take(first), merged.event_time[kept], merged.count[kept], columns)


def _grown(array: NDArray[Any], capacity: int, fill: float) -> NDArray[Any]:
    grown = np.full((capacity, *array.shape[1:]), fill, array.dtype)
    grown[: len(array)] = array
    return grown
