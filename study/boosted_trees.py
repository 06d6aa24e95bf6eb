"""A gradient-boosted tree (LightGBM) on the same encoded fields: categories become the click rates of their values in other training days.

Numbers are their bins, in order. A category's value is worth what it was worth elsewhere in time (`models/rates.py`): a click rate, out of
block, and of fields with many values the number of impressions too, which says how far a rate is to be trusted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossrep.extras import extra
from models.features import Features
from models.rates import out_of_block

MANY = 100  # values from which on a field brings its counts along
ROUNDS, PATIENCE = 1500, 50  # at most; without a better validation AUC

Rows = NDArray[np.int32]  # [N, F] of the fused table, as networks see them
Table = NDArray[np.float32]


def encoded(fields: Features, rows: Rows, clicked: NDArray[np.bool_], others: list[Rows]) -> list[Table]:
    """Features of the training rows, which are in time order, and of `others`."""
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
        own, whole = out_of_block(values[0], clicked, field.size)
        told = [(own.rate(prior), own.impressions), *((whole.rate(prior)[value], whole.impressions[value]) for value in values[1:])]
        for column, (rate, impressions) in zip(columns, told):
            column.append(rate)
            if field.size > MANY:
                column.append(impressions)
    return [np.stack(column, axis=1).astype(np.float32) for column in columns]


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
