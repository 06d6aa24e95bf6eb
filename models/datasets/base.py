"""The columnar form of a stream of impressions and the features of its users and items."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

RUN = 65_536  # most impressions in one run


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
    utc_offset: float = 0.0  # hours east of UTC of the calendar by which its days are counted


def runs(whole: Impressions) -> Iterator[Impressions]:
    """Impressions that are in memory, in runs of bounded length."""
    for at in range(0, len(whole), RUN):
        yield select(whole, slice(at, at + RUN))


def by_day(dataset: Dataset) -> Iterator[tuple[date, Impressions]]:
    """The impressions of each day that has any, in order."""
    parts: list[Impressions] = []
    day: int | None = None
    for run in dataset.impressions():
        days = (run.event_time + 3600 * dataset.utc_offset) // 86_400
        starts = [0, *(1 + np.flatnonzero(np.diff(days))).tolist(), len(run)]
        for start, end in pairwise(starts):
            if parts and days[start] != day:
                yield _date(day), joined(parts)
                parts = []
            day = int(days[start])
            parts.append(select(run, slice(start, end)))
    if parts:
        yield _date(day), joined(parts)


def only(dataset: Dataset, impressions: Impressions) -> Dataset:
    """A data set of these impressions, and of the users and items that occur in them. All of it is for training, and all for testing."""
    users, user = np.unique(impressions.user, return_inverse=True)
    items, item = np.unique(impressions.item, return_inverse=True)
    run = replace(impressions, user=user.astype(np.int32), item=item.astype(np.int32))
    return replace(
        dataset,
        user_ids=[dataset.user_ids[i] for i in users.tolist()],
        item_ids=[dataset.item_ids[i] for i in items.tolist()],
        user_features={name: column[users] for name, column in dataset.user_features.items()},
        item_features={name: column[items] for name, column in dataset.item_features.items()},
        impressions=lambda: iter([run]),
        size=len(run),
        train_until=np.inf,
        test_from=-np.inf,
    )


def joined(parts: Sequence[Impressions]) -> Impressions:
    return Impressions(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in vars(parts[0])})


def select(impressions: Impressions, chosen: NDArray[Any] | slice) -> Impressions:
    """The impressions chosen by a mask, by positions, or in a range."""
    return Impressions(**{name: column[chosen] for name, column in vars(impressions).items()})


def without_repeats(impressions: Impressions) -> Impressions:
    """The first of each: the same user, item and moment is one sample, whatever the log says. Order stays."""
    key = np.stack((impressions.user, impressions.item, impressions.event_time))
    order = np.lexsort(key[::-1])
    fresh = np.append(True, (np.diff(key[:, order]) != 0).any(0))[: len(order)]
    return select(impressions, np.sort(order[fresh]))


def whole(dataset: Dataset) -> Impressions:
    """All its impressions in event-time order, exact repeats once."""
    return without_repeats(joined(list(dataset.impressions())))


def _date(day: int | None) -> date:
    assert day is not None
    return datetime.fromtimestamp(86_400 * day, UTC).date()
