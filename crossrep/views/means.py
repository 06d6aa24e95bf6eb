"""The mean vector of every column over the keys of a table, kept up to date by what comes and goes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from crossrep.columnar.algebra import NEVER
from crossrep.columnar.records import RecordLayout


class Means:
    """Sums in float64 over the keys that have the column: each key counts once, whatever its weight.

    Adding and taking away again leaves a rounding error of some 1e-16 of the largest vector each time: far below float32's own, also after
    billions of updates.
    """

    def __init__(self, layout: RecordLayout):
        self._dims = {name: column.dim for name, column in layout.columns.items() if column.dim}
        self._sums = {name: np.zeros(dim) for name, dim in self._dims.items()}
        self._counts = dict.fromkeys(self._dims, 0)

    def add(self, records: NDArray[np.void]) -> None:
        """Records that came."""
        self._move(records, 1)

    def take(self, records: NDArray[np.void]) -> None:
        """Records that were added before, and go."""
        self._move(records, -1)

    def vectors(self) -> dict[str, NDArray[np.float32]]:
        """Columns to their means, float32 [dim]; zero while no key has the column."""
        return {name: (self._sums[name] / max(self._counts[name], 1)).astype(np.float32) for name in self._dims}

    def _move(self, records: NDArray[np.void], sign: int) -> None:
        for name in self._dims:
            known = records[f"{name}_time"] > NEVER
            self._counts[name] += sign * int(np.count_nonzero(known))
            self._sums[name] += sign * records[name][known].sum(axis=0, dtype=np.float64)
            if not self._counts[name]:
                self._sums[name][:] = 0.0
