"""Standalone retrieval: which of all items will a user click today? By UR and IR alone, with an adapter, with more of the record.

At the beginning of each day every user is offered k items that they have not been shown before; recall@k is the mean, over users and days,
of the share of the day's clicked items that are among them. Every way of scoring is u·v + b: vectors of users and items, and a bias of the
item. Adapters learn from (a user's state at the beginning of a day, an item clicked on that day), as they will be asked. What is chosen is
chosen on the days between `train_until` and `test_from`, in six trials, on one seed; adapters then learn from all days before `test_from`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from models.datasets.base import Dataset
from models.transfer import retrieval
from models.transfer.index import Index
from study import ranks
from study.ranks import Offers, Scores
from study.retrieval_world import DAY, Day, Floats, Log, World, questions, states
from study.runs import Run, Runs
from study.training import one_thread

FOR_EVER = 1e6 * DAY  # a half-life by which nothing decays; in settings it is 0
TUNING = 0  # the seed of tuning; those of the study are 1, 2, ...
UNSEEN = 0.1  # clicks that an item without any counts as
DIM = 64  # of the adapters
RATE = 2e-3
MORE = 300  # that the index is asked for beyond the hundred, because some have been shown before

SHOWN, CLICKED, RECENT = "most shown", "most clicked", "recently most clicked"
BEST = "whole record by InfoNCE, popularity added"


@dataclass(frozen=True)
class Arm:
    """A way of scoring.

    Args:
        user, item: what vectors are made of: ur, ir, `clicked` (the decayed mean of the IR of what the user clicked), `cr` (decayed mean).
        how: cosine or dot of the two, or `adapter`, trained with log q taken off, or `bare`, trained without.
        popularity: log of the item's impressions or clicks, added; `recent`: decayed clicks. Alone, if there are no vectors.
        trials: what is tried for it.
    """

    user: tuple[str, ...] = ()
    item: tuple[str, ...] = ()
    how: Literal["cosine", "dot", "adapter", "bare"] = "cosine"
    popularity: Literal["none", "shown", "clicked", "recent"] = "none"
    trials: tuple[Mapping[str, float], ...] = ({},)


_LEARNT = tuple({"temperature": temperature, "epochs": epochs} for temperature, epochs in product((0.05, 0.1, 0.2), (2, 6)))
_RECORD = tuple({"temperature": 0.2, "interest": days, "epochs": epochs} for days, epochs in product((1, 4, 0), (2, 6)))
_WEIGHTS = tuple({"weight": weight} for weight in (0.1, 0.2, 0.5, 1, 2, 4))
_RECENT = tuple({"popularity": days} for days in (0.25, 0.5, 1, 2, 4, 8))
_INTERESTS = tuple({"interest": days} for days in (0.5, 1, 2, 4, 8, 0))
ARMS = {
    SHOWN: Arm(popularity="shown"),
    CLICKED: Arm(popularity="clicked"),
    RECENT: Arm(popularity="recent", trials=_RECENT),
    "cosine of UR and IR": Arm(("ur",), ("ir",)),
    "UR · IR": Arm(("ur",), ("ir",), "dot"),
    "UR and IR by InfoNCE": Arm(("ur",), ("ir",), "adapter", trials=_LEARNT),
    "cosine of UR and IR, popularity added": Arm(("ur",), ("ir",), popularity="recent", trials=_WEIGHTS),
    "UR and IR by InfoNCE, popularity added": Arm(("ur",), ("ir",), "bare", "recent", _LEARNT),
    "clicked IR": Arm(("clicked",), ("ir",), trials=_INTERESTS),
    "clicked IR, popularity added": Arm(("clicked",), ("ir",), popularity="recent", trials=_WEIGHTS),
    "clicked IR by InfoNCE, popularity added": Arm(("clicked",), ("ir",), "bare", "recent", _RECORD),
    BEST: Arm(("ur", "clicked", "cr"), ("ir", "cr"), "bare", "recent", _RECORD),
}
FIRST = (RECENT, "clicked IR")  # their half-lives, in days, are those of all that try no others

NAMES = ("data", "arm", "settings", "seed")
Settings = dict[str, dict[str, float]]


def study(dataset: Dataset, folder: Path, *, seeds: int, workers: int, console: Console) -> tuple[Settings, list[Run]]:
    """(what was chosen for each arm, the runs of the study). What `folder` holds already is not run again."""
    runs, data = Runs(folder / "retrieval.jsonl", NAMES), Log.of(dataset).fingerprint
    complete = partial(runs.complete, workers=workers, console=console, start=start, given=(dataset,))
    settings: Settings = {}
    for what, arms in (("half-lives", FIRST), ("tuning", tuple(arm for arm in ARMS if arm not in FIRST))):
        common = {name: value for setting in settings.values() for name, value in setting.items()}
        asked: list[Run] = [
            {"data": data, "arm": arm, "seed": TUNING, "settings": [{**common, **trial} for trial in ARMS[arm].trials]} for arm in arms
        ]
        tuned = complete(what, [(each, each) for each in asked if len(each["settings"]) > 1], tune)
        found = {run["arm"]: run["settings"][int(np.argmax(run["recall@100"]))] for run in tuned}
        settings |= {each["arm"]: found.get(each["arm"], each["settings"][0]) for each in asked}
    asked = [{"data": data, "arm": "all", "seed": seed, "settings": settings} for seed in range(1, seeds + 1)]
    return settings, complete("study", [(each, each) for each in asked], test)


_dataset: Dataset  # of a worker's process: sent once, not with every run


def start(dataset: Dataset) -> None:
    global _dataset
    _dataset = dataset


@lru_cache(maxsize=1)
def _world(seed: int) -> World:
    return World.of(_dataset, seed)


def tune(asked: Run) -> Run:
    """Recall on the days between, of each setting."""
    with one_thread():
        world = _world(asked["seed"])
        log = world.log
        learn, days = (questions(log, range(*span)) for span in ((1, log.validate_from), (log.validate_from, log.test_from)))
        arm = ARMS[asked["arm"]]
        found = [ranks.offers(scores(world, arm, setting, learn, days, TUNING), days) for setting in asked["settings"]]
        return {f"recall@{k}": [each.mean(k) for each in found] for k in ranks.KS}


def test(asked: Run) -> Run:
    """Every arm on the days from `test_from` on, and its difference to the most popular items."""
    with one_thread():
        world = _world(asked["seed"])
        log = world.log
        learn, days = (questions(log, range(*span)) for span in ((1, log.test_from), (log.test_from, len(log.days) - 1)))
        clicked = log.impressions.clicked & (np.arange(len(log.impressions)) < log.bounds[log.test_from])
        known = np.bincount(log.impressions.user[clicked], minlength=log.users) > 0
        arms, popular = {}, None
        for name in sorted(ARMS, key=lambda name: name != RECENT):  # the one that others are compared with comes first
            each = scores(world, ARMS[name], asked["settings"][name], learn, days, asked["seed"])
            offers = ranks.offers(each, days)
            popular = popular or offers
            arms[name] = {
                **{f"recall@{k}": offers.mean(k) for k in ranks.KS},
                "recall@100 of users with clicks": offers.mean(100, known),
                "recall@100 of users without": offers.mean(100, ~known),
                "auc": ranks.auc_of_shown(each, days),
                "over users": offers.less(popular, 100),
            }
            if name == BEST:
                arms[name] |= _index(each, days, offers)
        return {"arms": {name: arms[name] for name in ARMS}, "queries": len(offers.user), "users": len(np.unique(offers.user))}


def _index(each: list[Scores], days: list[Day], exact: Offers) -> dict[str, float]:
    """Recall@100 where an approximate index gives the candidates, and the share of the exact hundred that it finds."""

    pairs = [retrieval.as_cosine(scores.users, scores.items, scores.bias) for scores in each]
    indexes = [Index(items) for _, items in pairs]

    def search(day: int, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return indexes[day].search(pairs[day][0][rows], max(ranks.KS) + MORE)

    found = ranks.offers(each, days, search)
    same = np.mean([len(np.intersect1d(a, b)) / len(b) for a, b in zip(found.top, exact.top)])
    return {"recall@100 by the index": found.mean(100), "found by the index": float(same)}


def scores(world: World, arm: Arm, setting: Mapping[str, float], learn: list[Day], days: list[Day], seed: int) -> list[Scores]:
    """How `arm` scores all items on each of `days`; an adapter learns from the clicks of `learn`."""
    bias = _popularity(world, arm, setting, days)
    if not arm.user:
        return [
            Scores(np.zeros((len(day.user), 1), np.float32), np.zeros((world.log.items, 1), np.float32), b) for day, b in zip(days, bias)
        ]
    users, items = _vectors(world, arm, setting, days)
    if arm.how in ("cosine", "dot"):
        unit = _unit if arm.how == "cosine" else np.asarray
        weight = np.float32(setting.get("weight", 1.0))
        return [Scores(unit(u), unit(v), weight * b) for u, v, b in zip(users, items, bias)]
    before = _vectors(world, arm, setting, learn)
    pairs = [(u[day.row[day.clicked]], v[day.item[day.clicked]], day.item[day.clicked]) for day, u, v in zip(learn, *before)]
    u, v, item = (np.concatenate(parts) for parts in zip(*pairs))
    scale = [float(np.sqrt(np.square(vectors).sum(1).mean())) for vectors in (u, v)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapter = retrieval.RetrievalAdapter(u.shape[1], v.shape[1], DIM)
        temperature, epochs = setting["temperature"], int(setting["epochs"])
        corrected = arm.how == "adapter"
        learnt = {"epochs": epochs, "rate": RATE, "seed": seed, "temperature": temperature, "corrected": corrected}
        retrieval.fit(adapter, u / scale[0], v / scale[1], item, **learnt)  # type: ignore[arg-type]
    found = []
    for u, v, b in zip(users, items, bias):
        with torch.inference_mode():
            mine, theirs = adapter(torch.from_numpy(u / scale[0]), torch.from_numpy(v / scale[1]))
        found.append(Scores(mine.numpy(), theirs.numpy(), np.float32(temperature) * b))
    return found


def _unit(vectors: Floats) -> Floats:
    unit: Floats = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.float32(1e-12))
    return unit


def _popularity(world: World, arm: Arm, setting: Mapping[str, float], days: list[Day]) -> list[Floats]:
    """[items] for each day: log of the clicks (or impressions) of each item until then."""
    log = world.log
    if arm.popularity == "none":
        return [np.zeros(log.items, np.float32)] * len(days)
    weights = np.ones(len(log.impressions)) if arm.popularity == "shown" else log.impressions.clicked.astype(float)
    half_life = DAY * setting["popularity"] if arm.popularity == "recent" else FOR_EVER
    nothing = np.zeros((len(weights), 0), np.float32)
    by_day = [np.log(left + UNSEEN).astype(np.float32) for _, left in states(log, "item", nothing, weights, half_life)]
    return [by_day[day.number] for day in days]


def _vectors(world: World, arm: Arm, setting: Mapping[str, float], days: list[Day]) -> tuple[list[Floats], list[Floats]]:
    """For each day [q, d] of its users and [items, d']."""
    log, clicks = world.log, world.log.impressions.clicked.astype(float)
    half_life = DAY * setting.get("interest", 0) or FOR_EVER
    folded = {"clicked": world.ir[log.impressions.item], "cr": world.cr}
    users: list[list[Floats]] = [[] for _ in days]
    items: list[list[Floats]] = [[] for _ in days]
    place = {day.number: at for at, day in enumerate(days)}
    for entity, names, out in (("user", arm.user, users), ("item", arm.item, items)):
        for name in names:
            if name in ("ur", "ir"):
                for at, day in enumerate(days):
                    out[at].append(world.ur[day.user] if name == "ur" else world.ir)
                continue
            for number, (mean, _) in enumerate(states(log, entity, folded[name], clicks, half_life)):
                if number in place:
                    chosen = days[place[number]].user if entity == "user" else slice(None)
                    out[place[number]].append(mean[chosen].astype(np.float32))
    return [np.concatenate(each, axis=1) for each in users], [np.concatenate(each, axis=1) for each in items]
