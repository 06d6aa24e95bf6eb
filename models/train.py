"""Train the triple tower on a data set, measure it on the data set's later impressions, and write the model's folder.

Adam 2e-3 on everything, batches of 512, a little L2 on the embeddings a batch touches (three times that for ids), exactly one epoch (on
KuaiRand a second one cost .001 to .008 AUC), ids seen once count as unknown (`features.fit`).

- The optimiser is dense, also for the table: a row goes on moving by its momentum after its batch, which for rare ids is a tenfold step.
  On KuaiRand's validation days that is worth .005 AUC over a sparse Adam, in the same time. A table of many millions of rows will want a
  sparse one, because a dense step writes all of it.
- In 5 % of the samples the user's features (but the id) are unknown, and likewise the item's: in a stream, events overtake the features
  of new users and items. It costs nothing on complete data and gives +.007 AUC where the item's features are missing.
- Training keeps the training impressions in memory (about 20 bytes each), evaluation streams.
"""

from __future__ import annotations

import math
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import Progress, TaskID
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from crossrep.errors import DataError
from models.datasets.base import Dataset, Impressions, joined, select
from models.features import Features, fit
from models.lfm4ads import ARCHITECTURE, LFM4Ads, TripleTower, build, fused, save

Score = Callable[[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]], NDArray[np.float32]]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # rows int [B, F], clicked float [B], ad bool [B] -> scalar
LEARNING_RATE = 2e-3
BATCH = 512
L2 = 3e-3
AD_WEIGHT = 4.0
MISSING = 0.05
LOGISTIC_EPOCHS = 10  # it starts from zero and cannot overfit by interactions: it gains until here
LOGISTIC_L2 = 1e-2


def train(
    dataset: Dataset,
    out: Path,
    *,
    name: str | None = None,
    seed: int = 0,
    epochs: int = 1,
    architecture: Mapping[str, int] | None = None,
    ad_weight: float = AD_WEIGHT,
    baseline: bool = True,
    progress: bool = True,
) -> dict[str, Any]:
    """Train on the impressions before `train_until`, test on those from `test_from` on, write the model to `out`; gives the metrics.

    `architecture` overrides entries of `lfm4ads.ARCHITECTURE`; `baseline` trains a logistic regression on the same features beside it.
    """
    began = time.perf_counter()
    impressions = training_impressions(dataset)
    fields = fit(dataset, impressions)
    samples = Samples(dataset, fields, impressions)
    sizes = {**ARCHITECTURE, **(architecture or {})}
    with torch.random.fork_rng(devices=[]), Progress(disable=not progress) as bar:
        torch.manual_seed(seed)
        network = build(fields, sizes)
        loss = partial(tower_loss, network, field_l2(fields), ad_weight)
        optimise(adam(network), loss, samples.batches(epochs, MISSING), bar.add_task("triple tower", total=samples.steps(epochs)), bar)
        seconds = time.perf_counter() - began
        model = LFM4Ads(name or f"{dataset.name}-lfm4ads", fields, network)
        metrics: dict[str, Any] = evaluate(model.predict, fields, dataset)
        if baseline:
            linear = Logistic(fields.rows)
            passes = LOGISTIC_EPOCHS * epochs
            optimise(
                adam(linear), linear.loss, samples.batches(passes), bar.add_task("logistic regression", total=samples.steps(passes)), bar
            )
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
        "epochs": epochs,
        "versions": versions(),
    }
    save(Path(out), model.name, fields, network, sizes, about)
    return metrics


def evaluate(score: Score, fields: Features, dataset: Dataset, *, batch: int = 4096) -> dict[str, Any]:
    """Pooled AUC and logloss of `score` (e.g. `model.predict`) on the impressions from `test_from` on; None where there are none."""
    users = fields.encode_columns("user", dataset.user_ids, dataset.user_features)
    items = fields.encode_columns("item", dataset.item_ids, dataset.item_features)
    scores, clicks = [np.empty(0, dtype=np.float32)], [np.empty(0, dtype=np.bool_)]
    for run in dataset.impressions():
        test = select(run, run.event_time >= dataset.test_from)
        events = fields.encode_impressions(test, dataset.scenarios)
        for at in range(0, len(test), batch):
            part = slice(at, at + batch)
            scores.append(score(users[test.user[part]], items[test.item[part]], events[part]))
        clicks.append(test.clicked)
    p, y = np.concatenate(scores), np.concatenate(clicks)
    return {"auc": finite(auc(p, y)), "logloss": finite(log_loss(p, y)), "impressions": len(y)}


class Samples:
    """The training impressions as shuffled batches of table rows."""

    def __init__(self, dataset: Dataset, fields: Features, impressions: Impressions):
        self.users = fields.encode_columns("user", dataset.user_ids, dataset.user_features)
        self.items = fields.encode_columns("item", dataset.item_ids, dataset.item_features)
        self.events = fields.encode_impressions(impressions, dataset.scenarios)
        self.impressions = impressions
        self.offsets = fields.offsets  # a field's first row is its unknown one

    def batches(self, epochs: int, missing: float = 0.0) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """rows int32 [B, F], clicked float32 [B], ad bool [B]; at rate `missing` a user's or item's features but the id are unknown."""
        data = self.impressions
        for _ in range(epochs):
            order = torch.randperm(len(data)).numpy()
            for at in range(0, len(data), BATCH):
                i = order[at : at + BATCH]
                user, item = self.users[data.user[i]], self.items[data.item[i]]
                for rows, offsets in ((user, self.offsets["user"]), (item, self.offsets["item"])):
                    lost = np.flatnonzero((torch.rand(len(i)) < missing).numpy())
                    rows[lost, 1:] = offsets[1:]
                clicked = torch.from_numpy(data.clicked[i].astype(np.float32))
                yield fused(user, item, self.events[i]), clicked, torch.from_numpy(data.ad[i])

    def steps(self, epochs: int) -> int:
        return epochs * math.ceil(len(self.impressions) / BATCH)


def adam(module: nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam(module.parameters(), lr=LEARNING_RATE, fused=True)


def optimise(
    optimiser: torch.optim.Adam, loss: Loss, batches: Iterator[tuple[Tensor, Tensor, Tensor]], task: TaskID, bar: Progress
) -> None:
    """One pass over `batches`, a step each."""
    for batch in batches:
        optimiser.zero_grad()
        loss(*batch).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        bar.advance(task)


def tower_loss(network: TripleTower, l2: Tensor, ad_weight: float, rows: Tensor, clicked: Tensor, ad: Tensor) -> Tensor:
    """The ad branch's loss over all samples, ads weighing `ad_weight`, plus the content branch's over content samples (why: lfm4ads.py)."""
    embedded: Tensor = network.table(rows)
    content_logit, ad_logit = network.logits(embedded)
    weight = torch.where(ad, ad_weight, 1.0)
    ad_loss = binary_cross_entropy_with_logits(ad_logit, clicked, weight, reduction="sum") / weight.sum()
    content_loss = binary_cross_entropy_with_logits(content_logit, clicked, (~ad).float(), reduction="mean")
    penalty = (embedded.square().sum(2) * l2).sum(1).mean()
    return ad_loss + content_loss + penalty


def field_l2(fields: Features) -> Tensor:
    """float32 [F]: the L2 weight of each field, ids (the first field of user and item) three times the others."""
    weights = [[3.0] + [1.0] * (len(fields.fields[kind]) - 1) for kind in ("user", "item")]
    return L2 * torch.tensor([*weights[0], *weights[1], *[1.0] * len(fields.fields["event"])])


class Logistic(nn.Module):
    """Logistic regression on the one-hot fields: a table of one column, whose rows are summed."""

    def __init__(self, rows: int):
        super().__init__()
        self.table = nn.Embedding(rows, 1)
        nn.init.zeros_(self.table.weight)
        self.bias = nn.Parameter(torch.zeros(()))

    def loss(self, rows: Tensor, clicked: Tensor, ad: Tensor) -> Tensor:
        weights: Tensor = self.table(rows)  # [B, F, 1]
        loss = binary_cross_entropy_with_logits(weights.sum((1, 2)) + self.bias, clicked)
        return loss + LOGISTIC_L2 * weights.square().sum((1, 2)).mean()

    def predict(self, user: NDArray[np.int32], item: NDArray[np.int32], event: NDArray[np.int32]) -> NDArray[np.float32]:
        """float32 [B]: probability of a click."""
        with torch.inference_mode():
            logits: Tensor = self.table(fused(user, item, event)).sum((1, 2)) + self.bias
            probability: NDArray[np.float32] = logits.sigmoid().numpy()
            return probability


def training_impressions(dataset: Dataset) -> Impressions:
    """The impressions before `train_until` without exact repeats: the same user, item and moment is one sample, whatever the log says."""
    runs = [select(run, run.event_time < dataset.train_until) for run in dataset.impressions()]
    if not sum(map(len, runs)):
        raise DataError(f"{dataset.name} has no impressions before {iso(dataset.train_until)} to train on")
    whole = joined(runs)
    order = np.lexsort((whole.event_time, whole.item, whole.user))
    key = np.stack((whole.user, whole.item, whole.event_time))[:, order]
    first = np.concatenate(([True], (key[:, 1:] != key[:, :-1]).any(0)))
    return select(whole, np.sort(order[first]))


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


def versions() -> dict[str, str | None]:
    """Of the code that trains. "commit" is git's, with a + where the checkout has changes; None outside of one."""
    try:
        git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
        commit = subprocess.run(git, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = None
    code = {"crossrep": version("crossrep"), "commit": commit}
    return {**code, "python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}


def finite(value: float) -> float | None:
    return round(value, 5) if math.isfinite(value) else None


def iso(seconds: float) -> str:
    return datetime.fromtimestamp(float(seconds), UTC).isoformat(timespec="seconds")
