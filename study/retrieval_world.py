"""What a retrieval system knows at the beginning of each day, and what its users then click.

A stream's state is folded by the stream's own kernels (`crossrep.columnar.algebra`), from impressions of earlier days alone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from crossrep.columnar import algebra
from models import lfm4ads, train
from models.datasets.base import Dataset, Impressions, whole
from study.worlds import RATE

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
DAY = 86_400.0
BATCH = 8192


@dataclass(frozen=True)
class Log:
    """All impressions once, N of them, and the days they are of."""

    impressions: Impressions
    users: int
    items: int
    days: NDArray[np.float64]  # the beginnings of the days that have impressions, by the data set's calendar, and the end of the last
    bounds: Ints  # day d is impressions[bounds[d] : bounds[d + 1]]
    validate_from: int  # the first day that is no longer trained on
    test_from: int

    @property
    def fingerprint(self) -> str:
        """Figures of one data set must not pass for another's."""
        data = self.impressions
        digest = hashlib.sha256(repr((self.users, self.items, self.validate_from, self.test_from)).encode())
        for array in (data.user, data.item, data.event_time, data.clicked):
            digest.update(array.tobytes())
        return digest.hexdigest()[:16]

    @classmethod
    def of(cls, dataset: Dataset) -> Log:
        log = whole(dataset)
        shift = 3600 * dataset.utc_offset
        first, last = (math.floor((log.event_time[at] + shift) / DAY) for at in (0, -1))
        days = np.arange(first, last + 2) * DAY - shift
        cuts = [int(np.searchsorted(days, moment - 1)) for moment in (dataset.train_until, dataset.test_from)]
        return cls(log, len(dataset.user_ids), len(dataset.item_ids), days, np.searchsorted(log.event_time, days).astype(np.int64), *cuts)


@dataclass(frozen=True)
class Day:
    """One day's questions: a row for each user that is shown anything."""

    number: int
    user: Ints  # [q]
    row: Ints  # [n], of each impression of the day
    item: Ints  # [n]
    clicked: NDArray[np.bool_]  # [n]
    shown_row: Ints  # what these users had been shown before, as pairs: nobody is offered it again
    shown_item: Ints

    @property
    def truth(self) -> tuple[Ints, Ints]:
        """The distinct (row, item) that are clicked and can be offered."""
        span = 1 + int(max(self.item.max(initial=0), self.shown_item.max(initial=0)))
        clicked = np.unique(self.row[self.clicked] * span + self.item[self.clicked])
        fresh = clicked[~np.isin(clicked, self.shown_row * span + self.shown_item)]
        return fresh // span, fresh % span


def questions(log: Log, numbers: range) -> list[Day]:
    data, found = log.impressions, []
    for number in numbers:
        begin, end = log.bounds[number], log.bounds[number + 1]
        user, row = np.unique(data.user[begin:end], return_inverse=True)
        place = np.full(log.users, -1)
        place[user] = np.arange(len(user))
        before = place[data.user[:begin]]
        had = before >= 0
        item, clicked = data.item[begin:end].astype(np.int64), data.clicked[begin:end]
        found.append(Day(number, user.astype(np.int64), row, item, clicked, before[had], data.item[:begin][had].astype(np.int64)))
    return found


@dataclass(frozen=True)
class World:
    """What one upstream, trained on the days before `validate_from`, gives."""

    log: Log
    ur: Floats  # [users, 32]: its towers see features that do not change here
    ir: Floats  # [items, 32]
    cr: Floats  # [N, 64], of every impression

    @classmethod
    def of(cls, dataset: Dataset, seed: int) -> World:
        with TemporaryDirectory() as folder:
            train.train(dataset, Path(folder), seed=seed, rates=False, rate=RATE, baseline=False, progress=False)
            model = lfm4ads.load(Path(folder))
        log, fields = Log.of(dataset), model.fields
        users = fields.encode_columns("user", dataset.user_ids, dataset.user_features)
        items = fields.encode_columns("item", dataset.item_ids, dataset.item_features)
        events = fields.encode_impressions(log.impressions, dataset.scenarios)
        user, item = log.impressions.user, log.impressions.item
        parts = [slice(at, at + BATCH) for at in range(0, len(events), BATCH)]
        cr = np.concatenate([model.forward(users[user[part]], items[item[part]], events[part])["cr"] for part in parts])
        return cls(log, _alone(model, users, "ur"), _alone(model, items, "ir"), cr)


def _alone(model: lfm4ads.LFM4Ads, rows: NDArray[np.int32], output: str) -> Floats:
    """UR of all users, or IR of all items: the other towers are given anything."""
    found = []
    blank = {kind: np.zeros((BATCH, len(names)), np.int32) for kind, names in model.features.items()}
    kind = "user" if output == "ur" else "item"
    for part in (rows[at : at + BATCH] for at in range(0, len(rows), BATCH)):
        given = {name: zeros[: len(part)] for name, zeros in blank.items()} | {kind: part}
        found.append(model.forward(given["user"], given["item"], given["event"])[output])
    return np.concatenate(found)


def states(
    log: Log, entity: str, vectors: Floats, weights: NDArray[np.float64], half_life: float
) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """At the beginning of each day: decayed means [keys, dim] and weights [keys], decayed to that moment. The means are folded on in place.

    Args:
        entity: user or item: whose state it is.
        vectors: [N, dim] of every impression; dim may be 0, for the weights alone.
        weights: [N]; 0: it is not folded.
        half_life: seconds, finite.
    """
    data = log.impressions
    slots, keys = (data.user, log.users) if entity == "user" else (data.item, log.items)
    mean, weight, time = np.zeros((keys, vectors.shape[1])), np.zeros(keys), np.full(keys, algebra.NEVER)
    begin = 0
    for start, end in zip(log.days[:-1], log.bounds[:-1]):
        if end > begin:
            part = slice(begin, end)
            rows = slots[part], vectors[part], weights[part], data.event_time[part]
            algebra.fold_decayed(mean, weight, time, *rows, weights[part] > 0, half_life)
            begin = end
        held = weight > 0
        left = np.zeros(keys)
        left[held] = algebra.decay(weight[held], start - time[held], half_life)
        yield mean, left
