"""95 % intervals of means over seeds, by Student's t."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats


class Interval(NamedTuple):
    """The mean, and how far its interval reaches to either side; NaN where nothing can be said."""

    mean: float
    half: float

    @property
    def clear(self) -> bool:
        """Whether zero is outside."""
        return abs(self.mean) > self.half

    def text(self, digits: int, sign: bool = False) -> str:
        return f"{self.mean:{'+' if sign else ''}.{digits}f} ± {self.half:.{digits}f}"


def of_mean(values: Sequence[float]) -> Interval:
    """Of independent values; of a paired difference, give the differences."""
    n = len(values)
    if n < 2:
        return Interval(values[0] if n else math.nan, math.nan)
    return Interval(float(np.mean(values)), float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n)))


def of_correlation(x: Sequence[float], y: Sequence[float], lost: int = 0) -> tuple[float, float, float]:
    """Pearson's r, and its interval by Fisher's z. `lost`: degrees of freedom that centring on groups has cost, groups less one."""
    if len(x) - lost < 4 or not np.ptp(x) or not np.ptp(y):
        return math.nan, math.nan, math.nan
    r = float(np.corrcoef(x, y)[0, 1])
    half = float(stats.norm.ppf(0.975)) / math.sqrt(len(x) - lost - 3)
    return r, math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half)
