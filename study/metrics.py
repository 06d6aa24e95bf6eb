"""Quality of click scores: pooled, by user, by scenario, and of cold users and items."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.train import auc, finite, log_loss

FEW = 5  # earlier impressions; whoever has fewer is cold


def gauc(score: NDArray[np.floating[Any]], clicked: NDArray[np.bool_], group: NDArray[np.integer[Any]]) -> float:
    """The mean of each group's AUC, weighted by its impressions; groups of one label only have none and are left out. NaN: all are."""
    order = np.lexsort((score, group))
    y, (_, place, size) = clicked[order], np.unique(group[order], return_inverse=True, return_counts=True)
    start = np.cumsum(size) - size
    tied = np.cumsum(np.diff(place, prepend=-1).astype(bool) | np.diff(score[order], prepend=np.nan).astype(bool)) - 1
    ties = np.bincount(tied)
    rank = (np.cumsum(ties) - (ties - 1) / 2)[tied] - start[place]  # within the group, from 1, ties counted half
    positive = np.bincount(place, y)
    pairs = positive * (size - positive)
    mixed = pairs > 0
    if not mixed.any():
        return float("nan")
    above = np.bincount(place, rank * y) - positive * (positive + 1) / 2
    return float(np.average(above[mixed] / pairs[mixed], weights=size[mixed]))


def measures(p: NDArray[np.floating[Any]], clicked: NDArray[np.bool_], user: NDArray[np.int32]) -> dict[str, float | int]:
    """Of probabilities p [N]. NaN where there is nothing to tell."""
    return {"auc": auc(p, clicked), "gauc": gauc(p, clicked, user), "logloss": log_loss(p, clicked), "impressions": len(p)}


def measure(
    probability: NDArray[np.floating[Any]],
    clicked: NDArray[np.bool_],
    user: NDArray[np.int32],
    scenario: NDArray[np.int16],
    subsets: Mapping[str, NDArray[np.bool_]],
) -> dict[str, Any]:
    """auc, gauc (by user; "gauc_users" have both labels), logloss and impressions of all; under "parts" those of each scenario's code and
    of the subsets."""

    def of(part: NDArray[np.bool_] | slice) -> dict[str, Any]:
        p, y, u = probability[part], clicked[part], user[part]
        found = {name: finite(value) if isinstance(value, float) else value for name, value in measures(p, y, u).items()}
        return found | {"gauc_users": len(np.intersect1d(u[y], u[~y]))}

    parts = {**{f"scenario {code}": scenario == code for code in np.unique(scenario).tolist()}, **subsets}
    return of(slice(None)) | {"parts": {name: of(part) for name, part in parts.items()}}
