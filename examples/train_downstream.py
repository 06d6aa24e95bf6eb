"""A downstream click model that learns while the stream runs: python -m examples.train_downstream --space kuairand-v1

Test, publish, train: a chunk of impressions is scored first, with representations as they are at that moment, then published, and then
learnt from, with the very numbers it was scored with. So no impression is scored or learnt with a representation that knows its click.
Two models of the same kind learn side by side: one is given ids and context alone, the other representations too.

A space with running workers is needed; README.md shows how (`crossrep fold`, `crossrep infer`). What the upstream model was trained on is
published first, as the past, and neither scored nor learnt.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import click
import numpy as np
import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from crossrep import LocalView, kafka
from crossrep.torch import RepresentationLookup
from models.datasets import Dataset, Impressions, kuairand, simulator
from models.datasets.base import select
from models.train import auc
from streams.demo import publish

CHUNK = 500  # impressions, scored and then published together
BATCH = 50  # impressions a step of the optimiser
WINDOW = 4  # chunks that an AUC is of
BUCKETS = 1 << 14  # of hashed ids
EMBEDDING = 8


class Samples(NamedTuple):
    """n impressions."""

    user: list[str]
    item: list[str]
    scenario: Tensor  # int64 [n]
    ad: Tensor  # float32 [n], 1: an ad
    clicked: Tensor  # float32 [n], 1: clicked

    def part(self, start: int, end: int) -> Samples:
        part = slice(start, end)
        return Samples(self.user[part], self.item[part], self.scenario[part], self.ad[part], self.clicked[part])


class ClickModel(nn.Module):
    """Click logits of impressions, from hashed ids and context and, if lookups are given, from representations."""

    def __init__(self, scenarios: int, users: Sequence[RepresentationLookup] = (), items: Sequence[RepresentationLookup] = ()):
        super().__init__()
        self.user_lookups: Any = nn.ModuleList(users)
        self.item_lookups: Any = nn.ModuleList(items)
        self.users, self.items = nn.Embedding(BUCKETS, EMBEDDING), nn.Embedding(BUCKETS, EMBEDDING)
        self.scenarios = nn.Embedding(scenarios, EMBEDDING)
        given = sum(lookup.dim + 1 for lookup in [*users, *items])
        self.norm = nn.BatchNorm1d(given, affine=False)  # vectors and confidences come in every scale
        self.layers = nn.Sequential(nn.Linear(3 * EMBEDDING + 1 + given, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, samples: Samples) -> Tensor:
        """Logits, float32 [n]."""
        user, item, scenario, ad, _ = samples
        parts = [self.users(hashed(user)), self.items(hashed(item)), self.scenarios(scenario), ad[:, None]]
        found = [lookup.look_up(user) for lookup in self.user_lookups] + [lookup.look_up(item) for lookup in self.item_lookups]
        if found:
            # The difference of two log confidences, clicks and all, is a time-decayed click rate.
            given = [each.vectors for each in found] + [each.confidence.log1p() for each in found]
            parts.append(self.norm(torch.cat(given, 1)))
        logits: Tensor = self.layers(torch.cat(parts, 1))
        return logits.squeeze(1)


class Learner:
    """A model, how it learns, and how well it foresaw what it had not yet learnt."""

    def __init__(self, model: ClickModel):
        self.model, self.scores = model, list[np.ndarray]()
        self.adam = torch.optim.Adam(model.parameters(), lr=2e-3)

    def foresee(self, samples: Samples) -> None:
        self.model.eval()
        with torch.inference_mode():
            self.scores.append(self.model(samples).numpy())

    def learn(self, samples: Samples) -> None:
        self.model.train()
        for at in range(0, CHUNK, BATCH):
            batch = samples.part(at, at + BATCH)
            self.adam.zero_grad()
            loss = binary_cross_entropy_with_logits(self.model(batch), batch.clicked)
            loss.backward()  # type: ignore[no-untyped-call]
            self.adam.step()


def run(dataset: Dataset, space: str, bootstrap: str, console: Console, rate: float, limit: int) -> dict[str, float]:
    """Publish the data set and learn from it; returns the AUC of each model over all it foresaw ("ids", "representations").

    Args:
        rate: impressions a second.
        limit: stop after that many.
    """
    with LocalView("user", space, bootstrap) as users, LocalView("item", space, bootstrap) as items:
        users.wait(60)
        items.wait(60)
        inputs = users.space.inputs
        publish.publish_features(dataset, inputs, bootstrap)
        past = publish.publish_events(only(dataset, "past", [past for past, _ in split(dataset) if len(past)]), inputs, bootstrap)
        console.print(f"{past.impressions:,} impressions and {past.clicks:,} clicks are published as the past")
        of_users, of_items = (
            [RepresentationLookup(view, name) for name, column in view.space.entities[view.entity].columns.items() if column.dim]
            for view in (users, items)
        )
        torch.manual_seed(0)
        models = {"ids": ClickModel(len(dataset.scenarios)), "representations": ClickModel(len(dataset.scenarios), of_users, of_items)}
        learners, clicked = {name: Learner(model) for name, model in models.items()}, list[np.ndarray]()
        table = Table("impressions", "known users", "known items", "staleness", "AUC: ids", "with representations", box=None)
        started = time.monotonic()
        with Live(table, console=console, refresh_per_second=2, vertical_overflow="visible"):
            for number, chunk in enumerate(chunks(dataset, limit), 1):
                for lookup in [*of_users, *of_items]:
                    lookup.refresh()  # what is looked up for this chunk stays as it is, also while it is published
                samples = samples_of(dataset, chunk)
                for learner in learners.values():
                    learner.foresee(samples)
                clicked.append(chunk.clicked)
                publish.publish_events(only(dataset, str(number), [chunk]), inputs, bootstrap)
                for learner in learners.values():
                    learner.learn(samples)
                if number % WINDOW == 0:
                    known = [users.get(samples.user).found.mean(), items.get(samples.item).found.mean()]
                    recent = [auc(np.concatenate(x.scores[-WINDOW:]), np.concatenate(clicked[-WINDOW:])) for x in learners.values()]
                    shares = (f"{share:.0%}" for share in known)
                    table.add_row(f"{number * CHUNK:,}", *shares, f"{users.staleness:.1f} s", *(f"{value:.4f}" for value in recent))
                time.sleep(max(0.0, started + number * CHUNK / rate - time.monotonic()))
        whole = {name: auc(np.concatenate(learner.scores), np.concatenate(clicked)) for name, learner in learners.items()}
    console.print("AUC over all: " + ", ".join(f"{name} {value:.4f}" for name, value in whole.items()))
    return whole


def samples_of(dataset: Dataset, chunk: Impressions) -> Samples:
    """A chunk as a model takes it."""
    user, item = [dataset.user_ids[i] for i in chunk.user], [dataset.item_ids[i] for i in chunk.item]
    columns = (chunk.scenario.astype(np.int64), chunk.ad.astype(np.float32), chunk.clicked.astype(np.float32))
    return Samples(user, item, *map(torch.from_numpy, columns))


def split(dataset: Dataset) -> Iterator[tuple[Impressions, Impressions]]:
    """Runs of impressions: what the upstream model was trained on, and what came later."""
    for run in dataset.impressions():
        past = run.event_time < dataset.train_until
        yield select(run, past), select(run, ~past)


def chunks(dataset: Dataset, limit: int) -> Iterator[Impressions]:
    """The later impressions, CHUNK at a time, the last incomplete one left out."""
    for _, later in split(dataset):
        for at in range(0, len(later) - CHUNK + 1, CHUNK):
            if limit < CHUNK:
                return
            limit -= CHUNK
            yield select(later, np.arange(at, at + CHUNK))


def only(dataset: Dataset, name: str, runs: list[Impressions]) -> Dataset:
    """The data set with these impressions alone; events are named after it."""
    return dataclasses.replace(dataset, name=f"{dataset.name}-{name}", impressions=lambda: iter(runs), size=sum(map(len, runs)))


def hashed(ids: list[str]) -> Tensor:
    """int64 [n]: the bucket of each id."""
    return torch.tensor([crc32(id.encode()) % BUCKETS for id in ids])


@click.command()
@click.option("--space", required=True, envvar="CROSSREP_SPACE", metavar="NAME", help="A published space whose workers run.")
@click.option("--bootstrap", metavar="HOST:PORT", help="The Kafka cluster.")
@click.option("--kuairand", "folder", type=click.Path(exists=True, path_type=Path), help="KuaiRand's folder. Default: simulated events.")
@click.option("--events", default=200_000, show_default=True, help="Impressions of the simulator; as `crossrep train simulated` was given.")
@click.option("--users", default=20_000, show_default=True)
@click.option("--items", default=5_000, show_default=True)
@click.option("--rate", default=2_000.0, show_default=True, help="Impressions a second.")
@click.option("--limit", default=100_000, show_default=True, help="Stop after that many impressions.")
def main(space: str, bootstrap: str | None, folder: Path | None, rate: float, limit: int, **simulated: int) -> None:
    """Train a click model downstream of a space while its stream runs."""
    dataset = kuairand.load(folder) if folder else simulator.simulate(**simulated)
    run(dataset, space, kafka.bootstrap_servers(bootstrap), Console(), rate, limit)


if __name__ == "__main__":
    main()
