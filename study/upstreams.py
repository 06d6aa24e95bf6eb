"""Is the upstream level with other click models that see the same? Seven models, each with the same number of tuning trials.

All see the same fields of users, items and events, none the history of clicks but through its own training; boosted trees, one of the
towers and one DCNv2 are told of it in click rates, counted on the training days. Trained on the days before `train_until`, tuned on those
between, tested from `test_from` on; exact repeats are taken out of all. A trial is one setting on one seed of tuning, as long as validation
asks for; the setting with the best validation AUC, the mean of its trials, then runs for each seed, for as long as they found best in the
mean, and only then is the test looked at.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from crossrep.errors import DataError
from models import train
from models.datasets.base import Dataset, Impressions, select, whole
from models.early_stopping import EarlyStopping
from models.features import Features, fit
from models.lfm4ads import ARCHITECTURE, build
from models.logistic import Logistic
from models.optimise import Loss, adam, optimise
from models.rates import fit_with_rates
from models.train import AD_WEIGHT, MISSING, Samples, field_l2, tower_loss
from models.transfer.dcnv2 import DCNv2
from study import boosted_trees
from study.metrics import measures
from study.runs import Run, Runs
from study.training import one_thread

LOGISTIC, TREES, DCN, TOWER, SHARED = "logistic regression", "boosted trees", "DCNv2", "triple tower", "triple tower, shared branch"
RATED, RATED_DCN = "triple tower, with click rates", "DCNv2, with click rates"  # of ids, as `crossrep train` gives them
NETWORKS = (DCN, RATED_DCN, TOWER, SHARED, RATED)
TUNING = (101, 102, 103)  # seeds of tuning: one seed's noise is as large as what settings differ by; those of the study are 1, 2, ...
PATIENCE = 1  # epochs without a better validation AUC
EPOCHS = {LOGISTIC: 15, **dict.fromkeys(NETWORKS, 1)}  # at most; a second one was worse, in all of 24 trials of four networks
ENOUGH = 1000  # test impressions that a scenario needs for a row of its own

L2 = 1e-3  # of embeddings: 3e-3 and 1e-2 were no better for any of them, on the days of tuning

# What is chosen of, as many settings for each model.
SETTINGS: dict[str, list[dict[str, Any]]] = {
    LOGISTIC: [{"rate": rate} for rate in (1e-3, 2e-3, 5e-3)],
    TREES: [{"num_leaves": leaves} for leaves in (7, 15, 31)],
    **{model: [{"rate": rate} for rate in (5e-4, 1e-3, 2e-3)] for model in NETWORKS},
}
LIGHTGBM = {"learning_rate": 0.05, "min_data_in_leaf": 200, "feature_fraction": 0.3, "bagging_fraction": 0.7, "lambda_l2": 10.0}

NAMES = ("data", "model", "setting", "seed", "length")  # what a run is known by; length: epochs or trees, None: as validation asks for


@dataclass(frozen=True)
class Part:
    """The impressions of some days, encoded; every array has N rows, in time order."""

    rows: NDArray[np.int32]  # [N, F] of the fused table
    clicked: NDArray[np.bool_]
    ad: NDArray[np.bool_]
    user: NDArray[np.int32]
    item: NDArray[np.int32]
    scenario: NDArray[np.int16]


@dataclass(frozen=True)
class Days:
    """What every run is given."""

    fields: Features
    samples: Samples
    train: Part
    validate: Part
    test: Part
    parts: dict[str, NDArray[np.bool_]]  # of the test: a mask each
    fingerprint: str

    @classmethod
    def of(cls, dataset: Dataset, *, rates: bool = False) -> Days:
        """With the rates of ids among the fields, or without. Raises DataError: a stage has no impressions, or only one kind of them."""
        log = whole(dataset)
        cuts = -np.inf, dataset.train_until, dataset.test_from, np.inf
        stages = [select(log, (log.event_time >= since) & (log.event_time < until)) for since, until in pairwise(cuts)]
        for name, stage in zip(("train", "tune", "test"), stages):
            if not 0 < stage.clicked.sum() < len(stage):
                raise DataError(f"{dataset.name} has {len(stage)} impressions to {name} on, {stage.clicked.sum()} of them clicked")
        fields = (fit_with_rates if rates else fit)(dataset, stages[0])
        samples = Samples(dataset, fields, stages[0])
        learn, validate, test = (_part(fields, samples, dataset, stage) for stage in stages)
        cold = {name: ~np.isin(getattr(test, name), getattr(learn, name)) for name in ("user", "item")}
        tabs = np.flatnonzero(np.bincount(test.scenario) >= ENOUGH).tolist()
        parts = {f"scenario {dataset.scenarios[tab]}": test.scenario == tab for tab in tabs}
        parts |= {"cold users": cold["user"], "cold items": cold["item"], "neither cold": ~(cold["user"] | cold["item"])}
        digest = hashlib.sha256(b"".join(array.tobytes() for part in (learn, validate, test) for array in vars(part).values()))
        return cls(fields, samples, learn, validate, test, parts, digest.hexdigest()[:16])


def _part(fields: Features, samples: Samples, dataset: Dataset, stage: Impressions) -> Part:
    events = fields.encode_impressions(stage, dataset.scenarios)
    rows = np.concatenate((samples.users[stage.user], samples.items[stage.item], events), axis=1)
    return Part(rows, stage.clicked, stage.ad, stage.user, stage.item, stage.scenario)


def study(dataset: Dataset, folder: Path, *, seeds: int, workers: int, console: Console) -> tuple[list[Run], list[Run]]:
    """(the runs of tuning, those of the study). What `folder` holds already is not run again."""
    days, rated = (Days.of(dataset, rates=rates) for rates in (False, True))
    runs = Runs(folder / "upstreams.jsonl", NAMES)
    complete = partial(runs.complete, workers=workers, console=console, start=start, given=(days, rated))
    about: Run = {"data": days.fingerprint}
    trials = [
        about | {"model": model, "setting": setting, "seed": seed, "length": None}
        for seed, model in product(TUNING, SETTINGS)
        for setting in SETTINGS[model]
    ]
    tuned = complete("tuning", [(each, each) for each in trials], run)
    # Seed by seed: a study that is cut off has all models of the seeds it has.
    asked = [about | {"model": model, "seed": seed} | best(tuned, model) for seed, model in product(range(1, seeds + 1), SETTINGS)]
    return tuned, complete("study", [(each, each) for each in asked], run)


def best(tuned: list[Run], model: str) -> Run:
    """{"setting", "length"}: the setting whose trials have the highest mean of validation AUC, and how long these trained in the mean."""
    by_setting: dict[str, list[Run]] = {}
    for each in tuned:
        if each["model"] == model:
            by_setting.setdefault(repr(each["setting"]), []).append(each)
    trials = max(by_setting.values(), key=lambda trials: float(np.mean([each["validation"]["auc"] for each in trials])))
    return {"setting": trials[0]["setting"], "length": round(float(np.mean([each["reached"] for each in trials])))}


_days: Days  # of a worker's process: sent once, not with every run
_rated: Days  # the same with rates of ids


def start(days: Days, rated: Days) -> None:
    global _days, _rated
    _days, _rated = days, rated


def run(asked: Run) -> Run:
    """One model trained: {"reached": epochs or trees, "validation": measures, "seconds"}, and its test if it was told how long to train.

    The same question gives the same figures on the same machine: it takes one thread.
    """
    days, began = _rated if asked["model"] in (RATED, RATED_DCN) else _days, time.perf_counter()
    train_model = _trees if asked["model"] == TREES else _network
    with torch.random.fork_rng(devices=[]), one_thread():
        torch.manual_seed(asked["seed"])
        score, reached = train_model(days, asked)
        seconds = time.perf_counter() - began
        p = score(days.validate)
        found = {"reached": reached, "validation": measures(p, days.validate.clicked, days.validate.user), "seconds": round(seconds, 1)}
        if asked["length"] is None:
            return found
        p, test = score(days.test), days.test
    parts = {name: measures(p[part], test.clicked[part], test.user[part]) for name, part in days.parts.items()}
    return found | {"test": measures(p, test.clicked, test.user), "parts": parts}


Score = Callable[[Part], NDArray[np.floating[Any]]]  # probabilities of a click


def _trees(days: Days, asked: Run) -> tuple[Score, int]:
    tables = boosted_trees.encoded(days.fields, days.train.rows, days.train.clicked, [days.validate.rows, days.test.rows])
    clicked = [days.train.clicked, days.validate.clicked]
    trees, count = boosted_trees.fit(tables[:2], clicked, LIGHTGBM | asked["setting"], asked["seed"], asked["length"])

    def score(part: Part) -> NDArray[np.floating[Any]]:
        found: NDArray[np.float64] = trees.predict(tables[1 if part is days.validate else 2], num_iteration=count)
        return found

    return score, count


def _network(days: Days, asked: Run) -> tuple[Score, int]:
    model, setting, epochs = asked["model"], asked["setting"], asked["length"]
    network, loss, logits, missing = NETWORK[model](days.fields)
    samples = days.samples

    def quality(network: nn.Module) -> float:
        return train.auc(_score(logits, network, days.validate), days.validate.clicked)

    batches = samples.batches(epochs or 1, missing)
    if epochs is None:
        stopping = EarlyStopping(network, quality, PATIENCE)
        batches = stopping.watch(samples.batches(1, missing) for _ in range(EPOCHS[model]))
    with Progress(disable=True) as bar:
        optimise(adam(network, setting["rate"]), loss, batches, bar.add_task(""), bar)
    if epochs is None:
        network, epochs = stopping.best, 1 + int(np.argmax(stopping.scores))
    return partial(_score, logits, network), epochs


Logits = Callable[[Any, Tensor, Tensor], Tensor]  # (network, rows int [B, F], ad bool [B]) -> [B]


@torch.inference_mode()
def _score(logits: Logits, network: nn.Module, part: Part) -> NDArray[np.float32]:
    network.eval()
    rows, ad = torch.from_numpy(part.rows), torch.from_numpy(part.ad)
    found = [logits(network, *batch).sigmoid() for batch in zip(torch.split(rows, 4096), torch.split(ad, 4096))]
    network.train()
    return torch.cat(found).numpy()


def _logistic(fields: Features) -> tuple[nn.Module, Loss, Logits, float]:
    network = Logistic(fields.rows, L2)
    return network, network.loss, lambda network, rows, ad: network.logits(rows), 0.0


def _dcn(fields: Features) -> tuple[nn.Module, Loss, Logits, float]:
    """As wide and deep as the tower's trunk; L2 and lost features as the tower has them."""
    weights = field_l2(fields, L2)
    network = DCNv2(fields.rows, len(weights), embedding=ARCHITECTURE["embedding"], cross_layers=ARCHITECTURE["cross_layers"])

    def loss(rows: Tensor, labels: Tensor, ad: Tensor) -> Tensor:
        embedded: Tensor = network.table(rows)
        penalty = (embedded.square().sum(2) * weights).sum(1).mean()
        return binary_cross_entropy_with_logits(network(rows), labels[:, 0]) + penalty

    return network, loss, lambda network, rows, ad: network(rows), MISSING


def _tower(shared: bool, fields: Features) -> tuple[nn.Module, Loss, Logits, float]:
    """As `crossrep train` trains it."""
    network = build(fields, {**ARCHITECTURE, "shared": shared})

    def logits(network: Any, rows: Tensor, ad: Tensor) -> Tensor:
        content, of_ad = (found[:, 0] for found in network.logits(network.table(rows)))
        chosen: Tensor = torch.where(ad, of_ad, content)
        return chosen

    return network, partial(tower_loss, network, field_l2(fields, L2), AD_WEIGHT), logits, MISSING


NETWORK: dict[str, Callable[[Features], tuple[nn.Module, Loss, Logits, float]]] = {
    LOGISTIC: _logistic,
    DCN: _dcn,
    RATED_DCN: _dcn,
    TOWER: partial(_tower, False),
    SHARED: partial(_tower, True),
    RATED: partial(_tower, False),
}
