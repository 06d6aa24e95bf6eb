"""A world: one upstream, trained on the first days, and what it gives for every impression. All arms of a split and seed share it.

    authors   upstream learns from the days before `train_until`, downstream from those between it and `test_from`
    late      upstream stops three days earlier, so that downstream learns twice as many days, of which upstream has seen none

Both are tested on the impressions from `test_from` on. Every seed has its own upstream, so that intervals over seeds are of both models.
A world is kept in a scratch folder: the model's folder, and what most arms need as arrays that are mapped, not read. Wider layers are
computed anew by whoever wants them: that takes seconds, and all of them would take gigabytes.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from models import lfm4ads
from models.datasets.base import Dataset, Impressions, select, whole
from models.features import Features
from models.train import train
from study.past import Past
from study.training import one_thread

DAY = 86_400.0
SPLITS = {"authors": 0.0, "late": 3 * DAY}  # how long before `train_until` upstream ends
LOGIT = "logit"  # float32 [N, 1], by the head of the impression's own branch
RATE = 2e-3  # of upstream's Adam: without click rates as good as what `crossrep train` takes, with them worse
KEPT = ("ur", "ir", "cr", LOGIT)  # as arrays
BATCH = 8192

# A branch each for ads and content; one for both; dual, and ids have click rates (models/rates.py); dual, as it was before training.
Upstream = Literal["dual", "shared", "rated", "random"]
Floats = NDArray[np.float32]


def fingerprint(dataset: Dataset) -> str:
    """Of the log and its split: figures of one data set must not pass for another's."""
    digest = hashlib.sha256(repr((dataset.name, dataset.train_until, dataset.test_from, len(dataset.user_ids))).encode())
    for run in dataset.impressions():
        for array in (run.user, run.item, run.event_time, run.clicked):
            digest.update(array.tobytes())
    return digest.hexdigest()[:16]


def place(scratch: Path, data: str, split: str, upstream: Upstream, seed: int) -> Path:
    return scratch / data / f"{split}-{upstream}-{seed}"


def build(dataset: Dataset, folder: Path, split: str, upstream: Upstream, seed: int) -> None:
    """Train upstream and forward all impressions, on one thread, unless that is done already.

    Whether it was done by today's code is not asked: whoever changes that deletes the scratch folder.
    """
    if (folder / "done").exists():
        return
    with one_thread(), torch.random.fork_rng(devices=[]):
        _train(dataset, folder, split, upstream, seed)
        for name, vectors in World(dataset, folder, split).forward(*KEPT).items():
            temporary = folder / f".{name}.{os.getpid()}.npy"
            np.save(temporary, vectors)
            temporary.replace(folder / f"{name}.npy")
    (folder / "done").touch()


def _train(dataset: Dataset, folder: Path, split: str, upstream: Upstream, seed: int) -> None:
    if upstream == "random":  # of the trained one's vocabulary
        fields = lfm4ads.load(folder.with_name(f"{split}-dual-{seed}")).fields
        torch.manual_seed(seed)
        lfm4ads.save(folder, "random", fields, lfm4ads.build(fields, lfm4ads.ARCHITECTURE), lfm4ads.ARCHITECTURE, {})
    else:
        before = replace(dataset, train_until=dataset.train_until - SPLITS[split])
        kind: dict[str, Any] = {"architecture": {"shared": upstream == "shared"}, "rates": upstream == "rated", "rate": RATE}
        train(before, folder, seed=seed, **kind, baseline=False, progress=False)


@dataclass
class World:
    """N impressions, in order of event time: those from `first` on are downstream's, its days of training and then those of testing."""

    dataset: Dataset
    folder: Path
    split: str

    @cached_property
    def impressions(self) -> Impressions:
        return whole(self.dataset)

    @cached_property
    def model(self) -> lfm4ads.LFM4Ads:
        return lfm4ads.load(self.folder)

    @cached_property
    def fields(self) -> Features:
        """What a click model sees: upstream's, less click rates of ids, for these are of the past."""
        return Features({kind: [f for f in each if f.type != "statistic"] for kind, each in self.model.fields.fields.items()})

    @cached_property
    def rows(self) -> NDArray[np.int32]:
        """[N, F] of `fields`: user's, item's, event's."""
        return self._encoded(self.fields)

    @cached_property
    def _upstream_rows(self) -> NDArray[np.int32]:
        return self._encoded(self.model.fields)

    def _encoded(self, fields: Features) -> NDArray[np.int32]:
        data = self.impressions
        users = fields.encode_columns("user", self.dataset.user_ids, self.dataset.user_features)
        items = fields.encode_columns("item", self.dataset.item_ids, self.dataset.item_features)
        return np.concatenate((users[data.user], items[data.item], fields.encode_impressions(data, self.dataset.scenarios)), axis=1)

    def at(self, time: float) -> int:
        """The first impression from then on."""
        return int(np.searchsorted(self.impressions.event_time, time))

    @cached_property
    def first(self) -> int:
        return self.at(self.dataset.train_until - SPLITS[self.split])

    @cached_property
    def downstream(self) -> Impressions:
        """Those from `first` on, n of them."""
        return select(self.impressions, slice(self.first, None))

    @cached_property
    def past(self) -> dict[str, Past]:
        """By entity: what came before each of downstream's impressions."""
        every, asked = self.impressions, self.downstream
        return {
            "user": Past(every.user, every.event_time, asked.user, asked.event_time),
            "item": Past(every.item, every.event_time, asked.item, asked.event_time),
        }

    def output(self, name: str) -> Floats:
        """What the model gives for every impression, [N, dim]: ur, ir, cr, a layer by name, or "logit"."""
        if name in KEPT:
            found: Floats = np.load(self.folder / f"{name}.npy", mmap_mode="r")
            return found
        return self.forward(name)[name]

    def forward(self, *names: str) -> dict[str, Floats]:
        """By name, computed now."""
        model = lfm4ads.load(self.folder, outputs=[name for name in names if name != LOGIT])
        user, item = (len(model.features[kind]) for kind in ("user", "item"))
        parts: dict[str, list[Floats]] = {name: [] for name in names}
        for at in range(0, len(self._upstream_rows), BATCH):
            users, items, events = np.split(self._upstream_rows[at : at + BATCH], [user, user + item], axis=1)
            found = model.forward(users, items, events)
            if LOGIT in names:
                probability = model.predict(users, items, events)
                found[LOGIT] = np.log(probability / (1 - probability))[:, None]
            for name, vectors in found.items():
                parts[name].append(vectors)
        return {name: np.concatenate(vectors) for name, vectors in parts.items()}
