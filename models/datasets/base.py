"""The columnar form of a stream of impressions and the features of its users and items."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Impressions:
    """A run of impressions in event-time order; every array has N rows."""

    user: NDArray[np.int32]  # index into Dataset.user_ids
    item: NDArray[np.int32]  # index into Dataset.item_ids
    event_time: NDArray[np.float64]  # seconds since 1970, UTC, millisecond resolution
    scenario: NDArray[np.int16]  # index into Dataset.scenarios
    ad: NDArray[np.bool_]  # True: ad branch, False: content branch
    clicked: NDArray[np.bool_]
    labels: NDArray[np.bool_]  # [N, L], what else the user did; L = len(Dataset.labels), often 0

    def __len__(self) -> int:
        return len(self.user)


@dataclass(frozen=True)
class Dataset:
    """Users, items, their features, and a re-iterable stream of impressions.

    Features are columns: name -> object array aligned with the ids, holding str, int, float or None (unknown).
    `impressions()` starts from the beginning at every call and yields runs of bounded length, so a data set may be larger than memory.
    Impressions before `train_until` are for training; those from `test_from` on are for testing (both seconds since 1970).
    """

    name: str
    user_ids: Sequence[str]
    item_ids: Sequence[str]
    scenarios: Sequence[str]
    user_features: Mapping[str, NDArray[np.object_]]
    item_features: Mapping[str, NDArray[np.object_]]
    impressions: Callable[[], Iterator[Impressions]]
    size: int  # number of impressions
    train_until: float
    test_from: float
    labels: Sequence[str] = ()  # names of the columns of Impressions.labels
