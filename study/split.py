"""Leave-one-out by time, in each domain, without leakage across ties.

Of every user and domain, the events of the newest time are tested on, those of the time before validate, the rest trains (all of it
where there are fewer than three times). Each of these events is to be predicted from what the user did at strictly earlier times, in both
domains; while training, held-out events are neither predicted nor seen, and while validating, those to be tested on are not seen either.
Users are split so, not the calendar: other users' later events do train.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.datasets.two_domains import Sequences

TRAIN, VALIDATE, TEST = 0, 1, 2
NOTHING = 2  # the domain of padding


@dataclass(frozen=True)
class View:
    """What may be seen at a stage: U users, E events. Moments rank a user's distinct times, from 0."""

    start: NDArray[np.int64]  # [U + 1]
    item: NDArray[np.int64]  # [E]
    domain: NDArray[np.int64]  # [E]
    moment: NDArray[np.int64]  # [E]
    before: NDArray[np.int64]  # [E]: place in the user's events of the last one of an earlier moment; -1: none
    target: NDArray[np.bool_]  # [E]: to be predicted at this stage


class Targets(NamedTuple):
    """N events of one domain to predict."""

    row: Tensor  # int64 [N]: the user's row in the batch
    place: Tensor  # int64 [N]: the event whose state knows all that may be known
    item: Tensor  # int64 [N], from 0 in its domain


class Batch(NamedTuple):
    """B users, padded to the longest of them, T events."""

    item: Tensor  # int64 [B, T]
    domain: Tensor  # int64 [B, T]: NOTHING where padded
    moment: Tensor  # int64 [B, T]
    targets: tuple[Targets, Targets]  # of each domain


def stages(sequences: Sequences) -> NDArray[np.int64]:
    """[E]: TRAIN, VALIDATE or TEST."""
    stage = np.full(len(sequences.item), TRAIN)
    domain = sequences.domain
    for begin, end in zip(sequences.start, sequences.start[1:]):
        for which in (0, 1):
            own = begin + np.flatnonzero(domain[begin:end] == which)
            times = np.unique(sequences.time[own])
            if len(times) >= 3:
                stage[own[sequences.time[own] == times[-2]]] = VALIDATE
                stage[own[sequences.time[own] == times[-1]]] = TEST
    return stage


def view(sequences: Sequences, stage: NDArray[np.int64], now: int) -> View:
    """The events of stages up to `now`; those of `now` are to be predicted, as far as anything comes before them."""
    kept = np.flatnonzero(stage <= now)
    user, time = sequences.user[kept], sequences.time[kept]
    start = np.searchsorted(user, np.arange(len(sequences.start)))
    first = start[user]  # of the event's user
    new = np.ones(len(kept), dtype=bool)  # the first of its moment
    new[1:] = (user[1:] != user[:-1]) | (time[1:] != time[:-1])
    opens = np.maximum.accumulate(np.where(new, np.arange(len(kept)), 0))  # where the event's moment begins
    counted = np.cumsum(new)
    before = opens - first - 1
    return View(
        start=start,
        item=sequences.item[kept],
        domain=sequences.domain[kept],
        moment=counted - counted[first],
        before=before,
        target=(stage[kept] == now) & (before >= 0),
    )


def batches(seen: View, sizes: tuple[int, int], users: int, order: np.random.Generator | None = None, every: int = 1) -> Iterator[Batch]:
    """Every `every`-th user with something to predict, `users` at a time, alike in length; in random order if `order` is given."""
    lengths = np.diff(seen.start)
    wanted = np.add.reduceat(np.append(seen.target, False), seen.start[:-1]) * (lengths > 0) > 0
    chosen = np.flatnonzero(wanted)[::every]
    noise = order.random(len(chosen)) if order is not None else 0.0  # who meets whom, among the alike
    chosen = chosen[np.argsort(lengths[chosen] + noise, kind="stable")]
    parts = [chosen[at : at + users] for at in range(0, len(chosen), users)]
    for part in order.permutation(len(parts)) if order is not None else range(len(parts)):
        yield _batch(seen, sizes, parts[part])


def _batch(seen: View, sizes: tuple[int, int], users: NDArray[np.int64]) -> Batch:
    begin, length = seen.start[users], np.diff(seen.start)[users]
    place = np.arange(length.max())
    real = place < length[:, None]
    event = np.where(real, begin[:, None] + place, 0)
    domain = np.where(real, seen.domain[event], NOTHING)
    targets = []
    for which in (0, 1):
        row, column = np.nonzero(seen.target[event] & (domain == which))
        at = event[row, column]
        item = seen.item[at] - (sizes[0] if which else 0)
        targets.append(Targets(*map(torch.from_numpy, (row, seen.before[at], item))))
    item, moment = np.where(real, seen.item[event], 0), np.where(real, seen.moment[event], 0)
    return Batch(torch.from_numpy(item), torch.from_numpy(domain), torch.from_numpy(moment), (targets[0], targets[1]))
