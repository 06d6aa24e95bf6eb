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
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    parts = [order[start:end] for start, end in zip(starts, [*starts[1:], len(order)])]
    mixed = [part for part in parts if 0 < clicked[part].sum() < len(part)]
    if not mixed:
        return float("nan")
    return float(np.average([auc(score[part], clicked[part]) for part in mixed], weights=[len(part) for part in mixed]))


def measure(
    probability: NDArray[np.floating[Any]],
    clicked: NDArray[np.bool_],
    user: NDArray[np.int32],
    scenario: NDArray[np.int16],
    subsets: Mapping[str, NDArray[np.bool_]],
) -> dict[str, Any]:
    """auc, gauc (by user) and logloss of all; under "auc_of" and "impressions" those of each scenario's code and of the subsets."""
    parts = {**{f"scenario {code}": scenario == code for code in np.unique(scenario).tolist()}, **subsets}
    return {
        "auc": finite(auc(probability, clicked)),
        "gauc": finite(gauc(probability, clicked, user)),
        "logloss": finite(log_loss(probability, clicked)),
        "auc_of": {name: finite(auc(probability[part], clicked[part])) for name, part in parts.items()},
        "impressions": {name: int(part.sum()) for name, part in parts.items()},
    }
