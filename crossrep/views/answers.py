"""What a look-up answers: arrays of n ids, as numpy, torch or Arrow."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossrep.columnar import algebra
from crossrep.columnar.records import RecordLayout
from crossrep.keys import Keys


@dataclass(frozen=True)
class ColumnValues:
    """One column of n ids. Where an id is not found, or never had this column: the view's answer for missing ones (vector 0, or the mean of
    those known), weight 0, time -inf."""

    vectors: NDArray[np.float32]  # [n, dim]
    weights: NDArray[np.float64]  # [n], decayed to the time asked for: the confidence; NaN for `latest`
    times: NDArray[np.float64]  # [n], seconds since 1970 of the newest event in the column

    @property
    def known(self) -> NDArray[np.bool_]:
        """bool [n]: has any event touched this column of the id? Where not, the vector is the view's answer for missing ones."""
        return self.times > algebra.NEVER

    @property
    def confidence(self) -> NDArray[np.float64]:
        """float64 [n], never NaN: the weight that is left; for `latest`, which has none, 1 where there is a vector, else 0."""
        return np.where(np.isnan(self.weights), self.known.astype(np.float64), self.weights)


@dataclass(frozen=True)
class Representations(Mapping[str, ColumnValues]):
    """The answer to a look-up of n ids: a mapping from column to values, with what is known of each id. All arrays are the caller's own."""

    found: NDArray[np.bool_]  # [n]
    counts: NDArray[np.int64]  # [n], events folded; 0 if not found
    event_times: NDArray[np.float64]  # [n], newest event, seconds since 1970; -inf if not found
    source_offsets: NDArray[np.int64]  # [n], every frame of the id's partition up to and including this offset is in it; -1 if not found
    at: float | NDArray[np.float64]  # the time weights are decayed to, seconds since 1970: one for all, or of a training sample its own [n]
    columns: dict[str, ColumnValues]
    ids: Keys  # [n], as they were asked for
    space: str  # whose vectors these are: all of one space, also while a view switches to another
    hash: str  # of its spec

    def __getitem__(self, column: str) -> ColumnValues:
        return self.columns[column]

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    def __len__(self) -> int:
        return len(self.columns)

    def to_torch(self) -> dict[str, Any]:
        """Every column's vectors as a float32 torch.Tensor [n, dim] on the CPU, sharing memory with `vectors`: nothing is copied.

        Raises:
            CrossrepError: torch is not installed.
        """
        from crossrep.torch import tensors

        return tensors(self)

    def to_arrow(self) -> Any:
        """A pyarrow.RecordBatch of n rows: `id`, `found`, `count`, `event_time`, `source_offset`, and per column its vector (a fixed-size
        list), `<column>_confidence` (see `ColumnValues.confidence`; at `at`) and `<column>_time`.

        Vectors, confidences, counts and offsets share memory with the arrays here; ids share it with `ids`. Times are timestamps and so
        copies, null where there is none; so is `found`, which Arrow packs into bits.

        Raises:
            CrossrepError: pyarrow is not installed.
        """
        from crossrep.views.arrow import batch

        return batch(self)


def answer(
    layout: RecordLayout,
    keys: Keys,
    found: NDArray[np.bool_],
    records: NDArray[np.void],
    at: float | NDArray[np.float64],
    missing: Mapping[str, NDArray[np.float32]],
    chosen: Collection[str] | None = None,
) -> Representations:
    """The records of n keys, decayed to `at`.

    Args:
        found: bool [n]; where it is False, the record means nothing.
        missing: columns to vectors [dim] for keys that have none; zero for columns that are not in it.
        chosen: columns to answer; None: all.
    """
    columns = {}
    for name, column in layout.columns.items():
        if chosen is not None and name not in chosen:
            continue
        times = np.where(found, records[f"{name}_time"], algebra.NEVER)
        has = (times > algebra.NEVER)[:, None]
        vectors = np.where(has, records[name], missing.get(name, np.float32(0))) if column.dim else np.empty((len(found), 0), np.float32)
        weights = np.full(len(found), np.nan)
        if column.half_life is not None:
            held = np.where(found, records[f"{name}_weight"], 0.0)
            since = np.subtract(at, times, out=np.zeros(len(held)), where=held > 0)
            weights = algebra.decay(held, since, column.half_life)
        columns[name] = ColumnValues(vectors, weights, times)
    counts = np.where(found, records["count"], 0).astype(np.int64)
    offsets = np.where(found, records["source_offset"], -1).astype(np.int64)
    times = np.where(found, records["event_time"], algebra.NEVER)
    return Representations(found, counts, times, offsets, at, columns, keys, layout.space, layout.hash)
