"""Train the triple tower on a data set, measure it on the data set's later impressions, and write the model's folder.

Adam 1e-3 on everything, batches of 512, a little L2 on the embeddings a batch touches (three times that for ids), exactly one epoch (on
KuaiRand a second one cost .001 to .008 AUC), ids seen once count as unknown (`features.fit`).

- Users and items have the click rate and the impressions of their id as features too (`models/rates.py`): on KuaiRand +.0040 ± .0010 test
  AUC, and better UR, IR and CR (docs/study-upstream.md, docs/study.md). Adam 2e-3 is as good without them, and worse with them.
- The optimiser is dense, also for the table: a row goes on moving by its momentum after its batch, which for rare ids is a tenfold step.
  On KuaiRand's validation days that is worth .005 AUC over a sparse Adam, in the same time. A table of many millions of rows will want a
  sparse one, because a dense step writes all of it.
- In 5 % of the samples the user's features (but the id) are unknown, and likewise the item's: in a stream, events overtake the features
  of new users and items. It costs nothing on complete data and gives +.007 AUC where the item's features are missing.
- Training keeps the training impressions in memory (about 20 bytes each), evaluation streams.
- Where more than one epoch may help, `patience` finds out how many on the days between `train_until` and `test_from`.
- On a GPU the same seed draws the same weights and batches; sums are of another order, so the vectors differ in the last digits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from crossrep.errors import DataError
from models import devices, logistic
from models.checkpoint import Checkpoint, digest
from models.datasets.base import Dataset, Impressions, joined, select, without_repeats
from models.early_stopping import EarlyStopping
from models.features import Features, fit
from models.lfm4ads import ARCHITECTURE, LFM4Ads, build, fused, save
from models.optimise import adam, bars, optimise
from models.rates import fit_with_rates, training_rows
from models.towers import CLICK, TripleTower
from models.upstream import versions

Score = Callable[[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]], NDArray[np.float32]]
BATCH = 512
RATE = 1e-3  # of Adam
L2 = 3e-3
AD_WEIGHT = 4.0
TASK_WEIGHT = 0.1  # of each task besides the click
MISSING = 0.05
EVERY = 60.0  # seconds between two checkpoints


def train(
    dataset: Dataset,
    out: Path,
    *,
    name: str | None = None,
    seed: int = 0,
    epochs: int = 1,
    patience: int | None = None,
    architecture: Mapping[str, Any] | None = None,
    ad_weight: float = AD_WEIGHT,
    device: str = "cpu",
    mixed: bool = False,
    rates: bool = True,
    rate: float = RATE,
    baseline: bool = True,
    progress: bool = True,
    every: float = EVERY,
) -> dict[str, Any]:
    """Train on the impressions before `train_until`, test on those from `test_from` on, write the model to `out`; gives the metrics.

    Args:
        patience: end after so many epochs in a row that were no better on the days between, and keep the best; None: all epochs, the last.
        architecture: overrides entries of `lfm4ads.ARCHITECTURE`; its "tasks" are labels of the data set.
        device: see `devices.choose`.
        mixed: multiply in bfloat16 where the device has it in hardware.
        rates: users and items have the click rate and the impressions of their id as features too (`models/rates.py`).
        rate: of Adam.
        baseline: train a logistic regression on the same features beside it.
        every: seconds after which what has been learnt is kept in `out`, for the same call to go on from if this one is cut off.

    Raises:
        DataError: there is nothing to train on, or nothing to stop by; or the data set has no such label.
        ModelError: there is no such device.
    """
    began = time.perf_counter()
    impressions = training_impressions(dataset)
    fields = (fit_with_rates if rates else fit)(dataset, impressions)
    sizes = {**ARCHITECTURE, **(architecture or {})}
    samples = Samples(dataset, fields, impressions, sizes["tasks"])
    place = devices.choose(device)
    with torch.random.fork_rng(devices=[]), devices.deterministic(place), bars(progress) as bar:
        torch.manual_seed(seed)
        network = build(fields, sizes).to(place)
        loss = partial(tower_loss, network, field_l2(fields), ad_weight, precision=devices.mixed(place) if mixed else None)
        learning, optimiser = bar.add_task("triple tower", total=samples.steps(epochs)), adam(network, rate)
        batches, stopping = samples.batches(epochs, MISSING), None
        if patience:

            def quality(network: TripleTower) -> float:
                found = validation_auc(fields, dataset, network)
                bar.update(learning, auc=found)
                return found

            stopping = EarlyStopping(network, quality, patience)
            batches = stopping.watch(samples.batches(1, MISSING) for _ in range(epochs))
        asked: dict[str, Any] = {
            "seed": seed,
            "epochs": epochs,
            "patience": patience,
            "rate": rate,
            "ad_weight": ad_weight,
            "architecture": sizes,
            "mixed": mixed,
            "device": place.type,
            "threads": torch.get_num_threads(),
            "impressions or features": samples.fingerprint,
            "code": versions(),
        }
        checkpoint = Checkpoint(Path(out), asked, network, optimiser, stopping, every)
        bar.advance(learning, checkpoint.learnt)
        optimise(optimiser, loss, checkpoint.watch(batches), learning, bar)
        network = (stopping.best if stopping is not None else network).cpu()
        seconds = time.perf_counter() - began
        model = LFM4Ads(name or f"{dataset.name}-lfm4ads", fields, network)
        metrics: dict[str, Any] = evaluate(model.predict, fields, dataset)
        for task in network.tasks:
            metrics[f"auc_{task}"] = evaluate(partial(model.predict, task=task), fields, dataset, task=task)["auc"]
        if stopping is not None:
            metrics["validation_auc"] = [finite(score) for score in stopping.scores]
        if baseline:
            linear = logistic.Logistic(fields.rows)
            learning = bar.add_task("logistic regression", total=samples.steps(logistic.EPOCHS * epochs))
            optimise(adam(linear), linear.loss, samples.batches(logistic.EPOCHS * epochs), learning, bar)
            scores = evaluate(linear.predict, fields, dataset)
            metrics |= {"logistic_auc": scores["auc"], "logistic_logloss": scores["logloss"]}
    metrics |= {"train_impressions": len(impressions), "train_seconds": round(seconds, 1)}
    about = {
        "metrics": metrics,
        "dataset": dataset.name,
        "trained_from": iso(impressions.event_time.min()),
        "trained_until": iso(impressions.event_time.max()),
        "tested_from": iso(dataset.test_from),
        "seed": seed,
        "device": place.type,
        "mixed": mixed,
        "epochs": epochs,
        "versions": versions(),
    }
    save(Path(out), model.name, fields, network, sizes, about)
    checkpoint.remove()
    return metrics


def evaluate(
    score: Score,
    fields: Features,
    dataset: Dataset,
    *,
    since: float | None = None,
    until: float = math.inf,
    task: str = CLICK,
    batch: int = 4096,
) -> dict[str, Any]:
    """Pooled AUC and logloss of `score` (e.g. `model.predict`), None where there are no impressions.

    Args:
        since, until: of which impressions, seconds since 1970; default: from `test_from` on.
        task: what `score` predicts, a click or one of the data set's labels.
    """
    since = dataset.test_from if since is None else since
    users = fields.encode_columns("user", dataset.user_ids, dataset.user_features)
    items = fields.encode_columns("item", dataset.item_ids, dataset.item_features)
    scores, clicks = [np.empty(0, dtype=np.float32)], [np.empty(0, dtype=np.bool_)]
    for run in dataset.impressions():
        test = select(run, (run.event_time >= since) & (run.event_time < until))
        events = fields.encode_impressions(test, dataset.scenarios)
        for at in range(0, len(test), batch):
            part = slice(at, at + batch)
            scores.append(score(users[test.user[part]], items[test.item[part]], events[part]))
        clicks.append(label_columns(dataset, test, [task])[:, 0])
    p, y = np.concatenate(scores), np.concatenate(clicks)
    return {"auc": finite(auc(p, y)), "logloss": finite(log_loss(p, y)), "impressions": len(y)}


def validation_auc(fields: Features, dataset: Dataset, network: TripleTower) -> float:
    """AUC on the days between `train_until` and `test_from`. Leaves the network as it is. Raises DataError: there are no clicks there."""
    model = LFM4Ads("", fields, deepcopy(network).cpu())
    found = evaluate(model.predict, fields, dataset, since=dataset.train_until, until=dataset.test_from)["auc"]
    if found is None:
        raise DataError(f"{dataset.name}: no clicks between {iso(dataset.train_until)} and {iso(dataset.test_from)} to stop by")
    return float(found)


def label_columns(dataset: Dataset, impressions: Impressions, tasks: Sequence[str]) -> NDArray[np.bool_]:
    """bool [N, tasks]. Raises DataError: the data set has no such label."""
    for task in tasks:
        if task not in (CLICK, *dataset.labels):
            raise DataError(f"{dataset.name} has no label {task!r} (it has {', '.join((CLICK, *dataset.labels))})")
    columns = [impressions.clicked if task == CLICK else impressions.labels[:, dataset.labels.index(task)] for task in tasks]
    return np.stack(columns, axis=1)


class Samples:
    """The training impressions as shuffled batches of table rows."""

    def __init__(self, dataset: Dataset, fields: Features, impressions: Impressions, tasks: Sequence[str] = ()):
        self.labels = label_columns(dataset, impressions, [CLICK, *tasks]).astype(np.float32)
        self.users = fields.encode_columns("user", dataset.user_ids, dataset.user_features)
        self.items = fields.encode_columns("item", dataset.item_ids, dataset.item_features)
        self.events = fields.encode_impressions(impressions, dataset.scenarios)
        self.rates = training_rows(fields, dataset, impressions)  # in the place of the last columns, which all of training tells
        self.impressions = impressions
        self.offsets = fields.offsets  # a field's first row is its unknown one

    @property
    def fingerprint(self) -> str:
        columns = self.users, self.items, self.events, *self.rates.values(), self.labels, *vars(self.impressions).values()
        return digest(*(column.tobytes() for column in columns))

    def batches(self, epochs: int, missing: float = 0.0) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """rows int32 [B, F], labels float32 [B, 1 + tasks], ad bool [B].

        At rate `missing` a user's or item's features but the id, and what is known from it, are unknown.
        """
        data = self.impressions
        for _ in range(epochs):
            order = torch.randperm(len(data)).numpy()
            for at in range(0, len(data), BATCH):
                i = order[at : at + BATCH]
                user, item = self.users[data.user[i]], self.items[data.item[i]]
                for kind, rows in (("user", user), ("item", item)):
                    told, lost = self.rates[kind][i], np.flatnonzero((torch.rand(len(i)) < missing).numpy())
                    rows[lost, 1:] = self.offsets[kind][1:]
                    rows[:, rows.shape[1] - told.shape[1] :] = told
                yield fused(user, item, self.events[i]), torch.from_numpy(self.labels[i]), torch.from_numpy(data.ad[i])

    def steps(self, epochs: int) -> int:
        return epochs * math.ceil(len(self.impressions) / BATCH)


def tower_loss(
    network: TripleTower, l2: Tensor, ad_weight: float, rows: Tensor, labels: Tensor, ad: Tensor, *, precision: torch.dtype | None = None
) -> Tensor:
    """The ad branch's loss over all samples, ads weighing `ad_weight`, plus the content branch's over content samples (why: lfm4ads.py).

    A shared branch learns once from every sample, as the ad branch does. Batches are brought to where the network is.
    """
    device = network.table.weight.device
    rows, labels, ad = rows.to(device), labels.to(device), ad.to(device)
    embedded: Tensor = network.table(rows)
    with torch.autocast(device.type, precision, enabled=precision is not None):
        content_logits, ad_logits = (logits.float() for logits in network.logits(embedded))
    tasks = torch.tensor([1.0, *[TASK_WEIGHT] * len(network.tasks)], device=device)
    weight = torch.where(ad, ad_weight, 1.0)
    loss = binary_cross_entropy_with_logits(ad_logits, labels, weight[:, None] * tasks, reduction="sum") / weight.sum()
    if network.content_branch is not None:
        content = (~ad)[:, None] * tasks
        loss = loss + binary_cross_entropy_with_logits(content_logits, labels, content, reduction="sum") / len(rows)
    return loss + (embedded.square().sum(2) * l2.to(device)).sum(1).mean()


def field_l2(fields: Features, l2: float = L2) -> Tensor:
    """float32 [F]: the L2 weight of each field, ids (the first field of user and item) three times the others."""
    weights = [[3.0] + [1.0] * (len(fields.fields[kind]) - 1) for kind in ("user", "item")]
    return l2 * torch.tensor([*weights[0], *weights[1], *[1.0] * len(fields.fields["event"])])


def training_impressions(dataset: Dataset) -> Impressions:
    """The impressions before `train_until` without exact repeats. Raises DataError: there are none."""
    runs = [select(run, run.event_time < dataset.train_until) for run in dataset.impressions()]
    if not sum(map(len, runs)):
        raise DataError(f"{dataset.name} has no impressions before {iso(dataset.train_until)} to train on")
    return without_repeats(joined(runs))


def auc(score: NDArray[np.floating[Any]], clicked: NDArray[np.bool_]) -> float:
    """Area under the ROC curve by ranks, ties counted half; NaN if there is one class only."""
    _, place, count = np.unique(score, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[place]
    positive = int(clicked.sum())
    negative = len(clicked) - positive
    if not positive or not negative:
        return math.nan
    return float((rank[clicked].sum() - positive * (positive + 1) / 2) / (positive * negative))


def log_loss(probability: NDArray[np.floating[Any]], clicked: NDArray[np.bool_]) -> float:
    """Mean negative log likelihood; NaN if there are no samples."""
    if not len(clicked):
        return math.nan
    p = np.clip(probability.astype(np.float64), 1e-7, 1 - 1e-7)
    return float(-np.log(np.where(clicked, p, 1 - p)).mean())


def finite(value: float) -> float | None:
    return round(value, 5) if math.isfinite(value) else None


def iso(seconds: float) -> str:
    return datetime.fromtimestamp(float(seconds), UTC).isoformat(timespec="seconds")
