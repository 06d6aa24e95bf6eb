"""The k best items of a user by u·v + b, and how many of those that they click are among them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.train import auc
from study.retrieval_world import Day, Floats, Ints

KS = (10, 50, 100)
BLOCK = 512  # users whose scores are held at a time


@dataclass(frozen=True)
class Scores:
    """Of item i for user u: users[u] · items[i] + bias[i]."""

    users: Floats  # [q, d]
    items: Floats  # [n, d]
    bias: Floats  # [n]

    def of(self, rows: Ints) -> Floats:
        """[m, n]"""
        found: Floats = self.users[rows] @ self.items.T + self.bias
        return found


Search = Callable[[int, Ints], Ints]  # (number of the day in the list, rows of its users [m]) -> candidates [m, c], best first


@dataclass(frozen=True)
class Offers:
    """m questions: a user on a day on which they click something new."""

    user: Ints  # [m]
    top: Ints  # [m, 100], best first; -1 where a search found too few
    recall: NDArray[np.float64]  # [m, len(KS)]

    def mean(self, k: int, of_users: NDArray[np.bool_] | None = None) -> float:
        """Over all questions, or those of some users (a mask by user); NaN if there are none."""
        chosen = self.recall[:, KS.index(k)] if of_users is None else self.recall[of_users[self.user], KS.index(k)]
        return float(chosen.mean()) if len(chosen) else float("nan")

    def less(self, other: Offers, k: int) -> dict[str, float]:
        """The mean difference, and the half width of its 95 % interval over users, whose days are not independent of each other."""
        difference = self.recall[:, KS.index(k)] - other.recall[:, KS.index(k)]
        _, user = np.unique(self.user, return_inverse=True)
        sums = np.bincount(user, weights=difference - difference.mean())
        return {"mean": float(difference.mean()), "half": float(1.96 * np.sqrt(np.square(sums).sum()) / len(difference))}


def offers(each: list[Scores], days: list[Day], search: Search | None = None) -> Offers:
    """Args: each: of every day. search: gives candidates; None: all items are ranked."""
    found: list[tuple[Ints, Ints, NDArray[np.float64]]] = []
    for number, (scores, day) in enumerate(zip(each, days)):
        rows, items = day.truth
        asked, size = np.unique(rows, return_counts=True)
        for part in np.array_split(np.arange(len(asked)), max(1, -(-len(asked) // BLOCK))):
            block = asked[part]
            wanted = _marks(block, rows, items, len(scores.items))
            had = _marks(block, day.shown_row, day.shown_item, len(scores.items))
            top = _ranked(scores, block, had) if search is None else _kept(search(number, block), had)
            hits = np.take_along_axis(wanted, np.maximum(top, 0), axis=1) & (top >= 0)
            recall = np.stack([hits[:, :k].sum(1) / size[part] for k in KS], axis=1)
            found.append((day.user[block], top, recall))
    user, top, recall = (np.concatenate(parts) for parts in zip(*found))
    return Offers(user, top, recall)


def auc_of_shown(each: list[Scores], days: list[Day]) -> float:
    """How well the scores tell clicks from skips among what was shown: what a click model is asked, and retrieval is not."""
    parts = [(scores.users[day.row] * scores.items[day.item]).sum(1) + scores.bias[day.item] for scores, day in zip(each, days)]
    return auc(np.concatenate(parts), np.concatenate([day.clicked for day in days]))


def _marks(block: Ints, rows: Ints, items: Ints, n: int) -> NDArray[np.bool_]:
    """bool [len(block), n]: the pairs of these rows."""
    marks = np.zeros((len(block), n), np.bool_)
    place = np.searchsorted(block, rows)
    own = (place < len(block)) & (block[np.minimum(place, len(block) - 1)] == rows) if len(block) else np.zeros(len(rows), np.bool_)
    marks[place[own], items[own]] = True
    return marks


def _ranked(scores: Scores, block: Ints, had: NDArray[np.bool_]) -> Ints:
    values = scores.of(block)
    values[had] = -np.inf
    k = min(max(KS), values.shape[1])
    top = np.argpartition(-values, k - 1, axis=1)[:, :k]
    order = np.argsort(-np.take_along_axis(values, top, axis=1), axis=1, kind="stable")
    found: Ints = np.take_along_axis(top, order, axis=1)
    return found


def _kept(candidates: Ints, had: NDArray[np.bool_]) -> Ints:
    """The first of the candidates that are not marked."""
    fresh = ~np.take_along_axis(had, candidates, axis=1)
    order = np.argsort(~fresh, axis=1, kind="stable")[:, : max(KS)]
    found: Ints = np.where(np.take_along_axis(fresh, order, axis=1), np.take_along_axis(candidates, order, axis=1), -1)
    return found
