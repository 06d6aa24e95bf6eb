"""One run: train with early stopping on the validation events, then test at the best epoch."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from models.datasets.two_domains import Sequences
from study import ranking, split
from study.recommender import Architecture, Recommender, parameters
from study.split import TEST, TRAIN, VALIDATE, Batch, View

VALIDATED = 5  # every so many-th user, after each epoch
MEASURE = "sampled ndcg@10"  # what early stopping and tuning go by: its mean over the two domains


@dataclass(frozen=True)
class Schedule:
    """What all arms share."""

    rate: float = 1e-2  # of Adam, for the network
    table_rate: float = 1e-2  # for the item table, most of whose rows a batch does not touch
    users: int = 32  # a batch
    negatives: int = 1000  # drawn uniformly from the target's domain, for a batch at a time
    epochs: int = 4  # the rate falls linearly to 0 over them
    patience: int = 2  # epochs without a new best before it ends


@dataclass(frozen=True)
class Views:
    train: View
    validate: View
    test: View
    sizes: tuple[int, int]

    @classmethod
    def of(cls, sequences: Sequences) -> Views:
        stage = split.stages(sequences)
        train, validate, test = (split.view(sequences, stage, now) for now in (TRAIN, VALIDATE, TEST))
        return cls(train, validate, test, sequences.sizes)

    @property
    def moments(self) -> int:
        return int(self.test.moment.max()) + 1


def run(views: Views, architecture: Architecture, schedule: Schedule, seed: int) -> dict[str, Any]:
    """Metrics of one run, as JSON has them. The same arguments give the same figures on the same machine: it takes one thread."""
    began = time.perf_counter()
    order = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]), one_thread():
        torch.manual_seed(seed)
        model = Recommender(views.sizes, views.moments, architecture)
        steps = schedule.epochs * math.ceil((len(views.train.start) - 1) / schedule.users)
        table = model.items.weight
        groups = [
            {"params": [weights for weights in model.parameters() if weights is not table], "lr": schedule.rate},
            {"params": [table], "lr": schedule.table_rate},
        ]
        adam = torch.optim.Adam(groups, fused=True)
        rates = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.0, steps)
        epochs = [evaluate(model, views.validate, VALIDATED) | {"loss": None}]
        best, kept = 0, {}
        while len(epochs) <= schedule.epochs:
            model.train()
            losses = []
            for batch in split.batches(views.train, views.sizes, schedule.users, order):
                adam.zero_grad()
                loss = sampled_softmax(model, batch, schedule.negatives)
                loss.backward()  # type: ignore[no-untyped-call]
                adam.step()
                rates.step()
                losses.append(loss.item())
            epochs.append(evaluate(model, views.validate, VALIDATED) | {"loss": float(np.mean(losses))})
            if not best or quality(epochs[-1]) > quality(epochs[best]):
                best, kept = len(epochs) - 1, {name: value.clone() for name, value in model.state_dict().items()}
            elif len(epochs) - 1 - best >= schedule.patience:
                break
        model.load_state_dict(kept)
        test = evaluate(model, views.test)
    return {
        "parameters": parameters(model),
        "table": model.items.weight.numel(),
        "best_epoch": best,
        "validation": quality(epochs[best]),
        "test": test,
        "epochs": epochs,
        "seconds": time.perf_counter() - began,
    }


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def sampled_softmax(model: Recommender, batch: Batch, negatives: int) -> Tensor:
    """Mean cross-entropy of each target among it and the batch's negatives, each target alike."""
    states, _ = model(batch)
    losses = []
    for size, first, state, targets in zip(model.sizes, (0, model.sizes[0]), states, batch.targets):
        drawn = torch.randint(size, (min(negatives, size),))
        h = state[targets.row, targets.place]
        own = (h * model.items(targets.item + first)).sum(1, keepdim=True)
        others = (h @ model.items(drawn + first).T).masked_fill(targets.item[:, None] == drawn, -math.inf)
        losses.append(cross_entropy(torch.cat([own, others], 1), torch.zeros(len(h), dtype=torch.int64), reduction="sum"))
    loss: Tensor = torch.stack(losses).sum() / sum(len(targets.item) for targets in batch.targets)
    return loss


@torch.inference_mode()
def evaluate(model: Recommender, seen: View, every: int = 1) -> dict[str, Any]:
    """{"domains": metrics of both, "cosines": [{level, domain, |cos|, cos}]}, over all items but those the user has already."""
    model.eval()
    ranked: list[list[tuple[Any, ...]]] = [[], []]
    cosines: dict[tuple[int, int], list[Tensor]] = {}
    users = 0
    for batch in split.batches(seen, model.sizes, 256, every=every):
        states, alignments = model(batch)
        for domain, (state, targets) in enumerate(zip(states, batch.targets)):
            scores = (state[targets.row, targets.place] @ model.table(domain).T).numpy()
            row, place = torch.nonzero(batch.domain[targets.row] == domain, as_tuple=True)
            had = batch.item[targets.row[row], place] - (model.sizes[0] if domain else 0)
            counts = ranking.above(scores, targets.item.numpy(), row.numpy(), had.numpy())
            ranked[domain].append((targets.row.numpy() + users, *counts))
        users += len(batch.item)
        for each in alignments:
            cosines.setdefault((each.level, each.domain), []).append(each.cosines)
    return {
        "domains": [ranking.metrics(*map(np.concatenate, zip(*parts))) for parts in ranked],
        "cosines": [_aligned(level, domain, torch.cat(parts)) for (level, domain), parts in cosines.items()],
    }


def _aligned(level: int, domain: int, cosines: Tensor) -> dict[str, float]:
    return {"level": level, "domain": domain, "absolute": cosines.abs().mean().item(), "signed": cosines.mean().item()}


def quality(found: dict[str, Any]) -> float:
    return float(np.mean([domain[MEASURE] for domain in found["domains"]]))
