"""A gradient-boosted tree (LightGBM) on the same encoded fields: categories become the click rates of their values in other training days.

Numbers are their bins, in order. A category's value is worth what it was worth elsewhere in time: the training impressions, in time order,
are cut into blocks, and a value's click rate in a block is counted in other blocks alone, so that no impression's own click is in its
features. Validation and test are told by all of training. Rates are smoothed towards the mean of all (Micci-Barreca, 2001), and fields
with many values bring their number of impressions along, which says how far a rate is to be trusted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossrep.extras import extra
from models.features import Features

BLOCKS = 10
SMOOTHING = 20.0  # impressions that the mean of all counts as
MANY = 100  # values from which on a field brings its counts along
ROUNDS, PATIENCE = 1500, 50  # at most; without a better validation AUC

Rows = NDArray[np.int32]  # [N, F] of the fused table, as networks see them
Table = NDArray[np.float32]


def encoded(fields: Features, rows: Rows, clicked: NDArray[np.bool_], others: list[Rows], *, earlier: bool) -> list[Table]:
    """Features of the training rows, which are in time order, and of `others`.

    Args:
        earlier: a block is told by the blocks before it, as a stream would; False: by all other blocks, which tell more.
    """
    block = np.arange(len(rows)) * BLOCKS // max(len(rows), 1)
    each = [fields.fields[kind] for kind in ("user", "item", "event")]
    offsets = np.concatenate([fields.offsets[kind] for kind in ("user", "item", "event")])
    columns: list[list[NDArray[np.float64]]] = [[] for _ in range(1 + len(others))]
    prior = float(clicked.mean())
    for place, field in enumerate(field for of_kind in each for field in of_kind):
        values = [part[:, place] - offsets[place] for part in (rows, *others)]
        if field.type != "category":
            for column, value in zip(columns, values):
                column.append(np.where(value, value, np.nan))  # 0 is unknown
            continue
        seen, clicks = (np.zeros((BLOCKS, field.size)) for _ in range(2))
        np.add.at(seen, (block, values[0]), 1)
        np.add.at(clicks, (block, values[0]), clicked)
        whole = seen.sum(0), clicks.sum(0)
        told = [table.cumsum(0) - table if earlier else table.sum(0) - table for table in (seen, clicks)]
        for part, (column, value) in enumerate(zip(columns, values)):
            n, k = (table[block, value] for table in told) if part == 0 else (table[value] for table in whole)
            column.append((k + SMOOTHING * prior) / (n + SMOOTHING))
            if field.size > MANY:
                # A block is told by fewer impressions than a later one is by all: the share is alike, the number is not.
                column.append(n / (_told(block, earlier) if part == 0 else 1.0))
    return [np.stack(column, axis=1).astype(np.float32) for column in columns]


def _told(block: NDArray[np.int64], earlier: bool) -> NDArray[np.float64]:
    """[N]: the share of training that tells about each impression's block."""
    share: NDArray[np.float64] = np.maximum(block, 1) / BLOCKS if earlier else np.full(len(block), 1 - 1 / BLOCKS)
    return share


def fit(
    tables: list[Table], clicked: list[NDArray[np.bool_]], setting: Mapping[str, Any], seed: int, rounds: int | None
) -> tuple[Any, int]:
    """The trees, and how many of them to use.

    Args:
        tables, clicked: of training and of validation.
        setting: LightGBM's parameters.
        rounds: so many trees; None: as many as validation asks for.
    """
    with extra("study"):
        import lightgbm
    parameters = {
        "objective": "binary", "metric": "auc", "num_threads": 1, "seed": seed, "deterministic": True, "force_row_wise": True,
        "bagging_freq": 1, "verbosity": -1, **setting,
    }  # fmt: skip
    train, validate = (lightgbm.Dataset(table, clicks) for table, clicks in zip(tables, clicked))
    stop = [lightgbm.early_stopping(PATIENCE, verbose=False)] if rounds is None else []
    trees = lightgbm.train(parameters, train, rounds or ROUNDS, valid_sets=[validate], callbacks=stop)
    return trees, trees.best_iteration or trees.num_trees()
