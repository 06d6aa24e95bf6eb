"""What the training days tell of a value: its click rate, and in how many impressions it was. Known at any time, from the value alone.

A training impression must not find its own click in its features, or a model learns to read it there. So the impressions, which are in
time order, are cut into blocks, and what is told of a value in one block is counted in the others alone. Outside of training everything
is told by all of it. Rates are smoothed towards the mean of all (Micci-Barreca, 2001, https://doi.org/10.1145/507533.507538).

`fit_with_rates` makes of it two more fields of a user and two of an item, click rate and impressions of their id, in bins. An id that
nothing else tells of has the rows of one never seen. Only what says nothing of a single click is counted over all: the bins' edges, and
the mean, to two digits. They are of the training days and stay so; what was clicked since, a space's counters know (docs/features.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.datasets.base import Dataset, Impressions
from models.features import ID_FIELDS, Features, Field, fit, fit_number

BLOCKS = 10
SMOOTHING = 20.0  # impressions that the mean of all counts as
BINS = 16


@dataclass(frozen=True)
class Counts:
    """Of n values, or of the values of n impressions."""

    shown: NDArray[np.float64]  # [n]
    clicked: NDArray[np.float64]  # [n]
    share: float = 1.0  # of the training impressions that were counted: for a block, fewer than all

    def rate(self, prior: float) -> NDArray[np.float64]:
        return (self.clicked + SMOOTHING * prior) / (self.shown + SMOOTHING)

    @property
    def impressions(self) -> NDArray[np.float64]:
        """As many as there would be had all of training been counted."""
        return self.shown / self.share


def out_of_block(values: NDArray[np.integer], clicked: NDArray[np.bool_], size: int) -> tuple[Counts, Counts]:
    """What other blocks tell of each impression's value [N], and what all of training tells of each value [size].

    Args:
        values: of each training impression, 0 to size - 1, in time order.
    """
    block = np.arange(len(values)) * BLOCKS // max(len(values), 1)
    shown, clicks = (np.zeros((BLOCKS, size)) for _ in range(2))  # 160 bytes a value in all
    np.add.at(shown, (block, values), 1)
    np.add.at(clicks, (block, values), clicked)
    others = [table.sum(0) - table for table in (shown, clicks)]
    return Counts(others[0][block, values], others[1][block, values], 1 - 1 / BLOCKS), Counts(shown.sum(0), clicks.sum(0))


def fit_with_rates(dataset: Dataset, train: Impressions) -> Features:
    """The fields of `fit`, and behind those of users and of items the click rate and the impressions of their ids."""
    grown = {kind: list(of_kind) for kind, of_kind in fit(dataset, train).fields.items()}
    for kind, (ids, at) in _ids(dataset, train).items():
        others, whole = out_of_block(at, train.clicked, len(ids))
        seen = np.flatnonzero(whole.shown)
        values = tuple(ids[i] for i in seen.tolist())
        for (name, told), known in zip(_statistics(others, train).items(), _statistics(whole, train).values()):
            edges = fit_number(name, told.tolist(), BINS).edges
            grown[kind].append(Field(f"{ID_FIELDS[kind]}.{name}", "statistic", values, edges, tuple(known[seen].tolist())))
    return Features(grown)


def training_rows(fields: Features, dataset: Dataset, train: Impressions) -> dict[str, NDArray[np.int32]]:
    """By kind int32 [N, 2]: the rows of the last fields of each impression's user and item, told out of block; [N, 0] without rates."""
    rows = {kind: np.empty((len(train), 0), dtype=np.int32) for kind in ID_FIELDS}
    for kind, (ids, at) in _ids(dataset, train).items():
        statistics = [(f, offset) for f, offset in zip(fields.fields[kind], fields.offsets[kind]) if f.type == "statistic"]
        if statistics:
            others, _ = out_of_block(at, train.clicked, len(ids))
            told = _statistics(others, train).values()
            rows[kind] = np.stack([offset + f.bins(numbers) for (f, offset), numbers in zip(statistics, told)], axis=1).astype(np.int32)
    return rows


def _ids(dataset: Dataset, train: Impressions) -> dict[str, tuple[Sequence[str], NDArray[np.int32]]]:
    return {"user": (dataset.user_ids, train.user), "item": (dataset.item_ids, train.item)}


def _statistics(counts: Counts, train: Impressions) -> dict[str, NDArray[np.float64]]:
    """NaN where nothing is told, as of an id that training has not seen."""
    prior = round(float(train.clicked.mean()), 2)  # so rounded, it is the same without any one click
    none = counts.shown == 0
    return {"click_rate": np.where(none, np.nan, counts.rate(prior)), "impressions": np.where(none, np.nan, counts.impressions)}
