"""Training day by day: each day is tested with the model that has learnt everything before it, and only then learnt from.

    <folder>/2022-05-01/    the model that has learnt up to and including that day: an ordinary model folder, and what training goes on from
        weights.safetensors, vocabulary.json, manifest.json
        optimiser.safetensors, state.json

The oldest folder is of the first days, learnt together: the frozen model that later ones are measured against. Of the others the newest two
stay: the newest to go on from, the one before it is the newest that has been measured on a day it has not seen (`models/gate.py`).

- Every day begins by reading the files of the day before, so that going on after a kill is the same as never having stopped, bit by bit (on
  the same machine with as many threads: float sums depend on both). A folder appears by a rename, whole or not at all.
- New values appear every day. One that has been seen twice gets a row at the end of its field. It begins as the field's unknown row, which
  stood for it until then, without momentum. Rows are never taken away; numeric bins stay those of the first days.
- Adam goes on with its moments. A day is one pass, as in `train.py`: nothing here has been tuned on days that are tested.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from functools import partial
from itertools import takewhile
from pathlib import Path

import torch
from pydantic import BaseModel, ValidationError
from rich.progress import Progress
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as dump_tensors
from torch import Tensor

from crossrep.errors import DataError, ModelError
from models import lfm4ads
from models.checkpoint import MOMENTS
from models.datasets.base import Dataset, Impressions, by_day, joined, only
from models.features import Features, Waiting, fit, grow, rows_before
from models.lfm4ads import ARCHITECTURE
from models.optimise import adam, bars, optimise
from models.towers import TripleTower
from models.train import AD_WEIGHT, MISSING, Samples, evaluate, field_l2, iso, tower_loss, training_impressions
from models.upstream import versions

log = logging.getLogger(__name__)

FIRST_DAYS = 7
STATE, OPTIMISER = "state.json", "optimiser.safetensors"
TABLE = "table.weight"


class Day(BaseModel):
    """A day that has been learnt from. The scores are of before; None: it is one of the first, or had only one class."""

    date: date
    impressions: int
    auc: float | None = None
    logloss: float | None = None
    frozen_auc: float | None = None
    frozen_logloss: float | None = None


class State(BaseModel):
    """Where training stands, beside weights and moments."""

    dataset: str
    seed: int
    trained_from: str
    days: list[Day]
    waiting: Waiting
    sha256: str = ""  # of the optimiser's file


@dataclass
class Learner:
    """A model in training."""

    fields: Features
    network: TripleTower
    optimiser: torch.optim.Adam
    architecture: Mapping[str, int]


def run(
    dataset: Dataset,
    folder: Path,
    *,
    first_days: int = FIRST_DAYS,
    until: date | None = None,
    seed: int = 0,
    architecture: Mapping[str, int] | None = None,
    progress: bool = True,
) -> State:
    """Learn every day of the data set that is not learnt yet, up to and including `until`. Returns where it stands then.

    `first_days`, `seed` and `architecture` matter only to the first run in a folder.

    Raises:
        DataError: the data set is not the one that was learnt from so far, or has too few days to begin with.
        ModelError: the folder's files are damaged, or another run is at work there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    days = takewhile(lambda day: until is None or day[0] <= until, by_day(dataset))
    with _alone(folder), torch.random.fork_rng(devices=[]), bars(progress) as bar:
        if not states(folder):
            _begin(dataset, [day for _, day in zip(range(first_days), days)], first_days, folder, seed, architecture or {}, bar)
        kept = states(folder)
        frozen, state = lfm4ads.load(kept[0]), read_state(kept[-1])
        if state.dataset != dataset.name:
            raise DataError(f"{folder} has learnt from {state.dataset!r}, not from {dataset.name!r}: take another folder")
        known = {day.date: day.impressions for day in state.days}
        for at, impressions in days:
            if at > state.days[-1].date:
                state = _go_on(only(dataset, impressions), at, impressions, frozen, folder, bar)
            elif known.get(at) != len(impressions):
                there, learnt = len(impressions), known.get(at, 0)
                log.warning("%s has %d impressions now, and %d when it was learnt: it is not learnt again", at, there, learnt)
    return state


def states(folder: Path) -> list[Path]:
    """The folders of learnt days that are kept, oldest first."""
    return sorted(path for path in folder.glob("????-??-??") if path.is_dir())


def read_state(folder: Path) -> State:
    try:
        return State.model_validate_json((folder / STATE).read_bytes())
    except (OSError, ValidationError) as error:
        raise ModelError(f"{folder / STATE} cannot be read: {error}. Delete {folder}: training goes on from the day before") from error


def _begin(
    dataset: Dataset,
    days: list[tuple[date, Impressions]],
    wanted: int,
    folder: Path,
    seed: int,
    architecture: Mapping[str, int],
    bar: Progress,
) -> None:
    """The first days, learnt together."""
    if len(days) < wanted:
        raise DataError(f"{dataset.name} has {len(days)} days of impressions; to begin with, {wanted} are needed (--first-days)")
    together = only(dataset, joined([impressions for _, impressions in days]))
    samples = training_impressions(together)
    fields = fit(together, samples)
    sizes = {**ARCHITECTURE, **architecture}
    torch.manual_seed(seed)
    network = lfm4ads.build(fields, sizes)
    learner = Learner(fields, network, adam(network), sizes)
    _learn(learner, together, samples, f"{days[0][0]} to {days[-1][0]}", bar)
    _, waiting = grow(fields, together, samples, {})
    learnt = [Day(date=at, impressions=len(impressions)) for at, impressions in days]
    first = iso(samples.event_time.min())
    _save(learner, State(dataset=dataset.name, seed=seed, trained_from=first, days=learnt, waiting=waiting), samples, folder)


def _go_on(day: Dataset, at: date, impressions: Impressions, frozen: lfm4ads.LFM4Ads, folder: Path, bar: Progress) -> State:
    """Test on a day, then learn it."""
    before = states(folder)[-1]
    state, model = read_state(before), lfm4ads.load(before)
    scores, frozen_scores = (evaluate(tested.predict, tested.fields, day) for tested in (model, frozen))
    samples = training_impressions(day)
    learner, waiting = _grown(before, state, day, samples)
    torch.manual_seed(1_000_003 * (1 + state.seed) + at.toordinal())  # of its own: the same whichever run comes to this day
    _learn(learner, day, samples, str(at), bar)
    learnt = Day(
        date=at,
        impressions=len(impressions),
        auc=scores["auc"],
        logloss=scores["logloss"],
        frozen_auc=frozen_scores["auc"],
        frozen_logloss=frozen_scores["logloss"],
    )
    return _save(learner, state.model_copy(update={"days": [*state.days, learnt], "waiting": waiting}), samples, folder)


def _learn(learner: Learner, dataset: Dataset, impressions: Impressions, what: str, bar: Progress) -> None:
    samples = Samples(dataset, learner.fields, impressions, learner.network.tasks)
    loss = partial(tower_loss, learner.network, field_l2(learner.fields), AD_WEIGHT)
    optimise(learner.optimiser, loss, samples.batches(1, MISSING), bar.add_task(what, total=samples.steps(1)), bar)


def _grown(folder: Path, state: State, day: Dataset, impressions: Impressions) -> tuple[Learner, Waiting]:
    """What the files of a day say, with rows for the values that have become frequent enough."""
    try:
        saved = (folder / OPTIMISER).read_bytes()
        if hashlib.sha256(saved).hexdigest() != state.sha256:
            raise ModelError(f"{folder / OPTIMISER} is not the file that {STATE} names: delete {folder}, and go on from the day before")
        moments = parse_tensors(saved)
        weights = parse_tensors((folder / "weights.safetensors").read_bytes())  # its digest was checked when it was tested
        old = Features.from_json(json.loads((folder / "vocabulary.json").read_text()))
        architecture = json.loads((folder / "manifest.json").read_text())["architecture"]
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder} cannot be read: {error}. Delete it: training goes on from the day before") from error
    fields, waiting = grow(old, day, impressions, state.waiting)
    rows, new = map(torch.from_numpy, rows_before(old, fields))
    weights[TABLE] = weights[TABLE][rows]
    for moment in ("exp_avg", "exp_avg_sq"):
        moments[f"{moment}.{TABLE}"] = moments[f"{moment}.{TABLE}"][rows].masked_fill(new.unsqueeze(1), 0.0)
    network = lfm4ads.build(fields, architecture)
    network.load_state_dict(weights)
    optimiser = adam(network)
    parameters = [name for name, _ in network.named_parameters()]
    kept = {place: {moment: moments[f"{moment}.{name}"] for moment in MOMENTS} for place, name in enumerate(parameters)}
    optimiser.load_state_dict({"state": kept, "param_groups": optimiser.state_dict()["param_groups"]})
    return Learner(fields, network, optimiser, architecture), waiting


def _save(learner: Learner, state: State, impressions: Impressions, folder: Path) -> State:
    """A folder for the newest day; then those that nobody needs any more are removed."""
    unfinished = folder / ".unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    about = {
        "dataset": state.dataset,
        "trained_from": state.trained_from,
        "trained_until": iso(impressions.event_time.max()),
        "days": [str(day.date) for day in state.days],
        "impressions": sum(day.impressions for day in state.days),
        "seed": state.seed,
        "versions": versions(),
    }
    lfm4ads.save(unfinished, f"{state.dataset}-lfm4ads", learner.fields, learner.network, learner.architecture, about)
    moments = dump_tensors(_moments(learner))
    state = state.model_copy(update={"sha256": hashlib.sha256(moments).hexdigest()})
    (unfinished / OPTIMISER).write_bytes(moments)
    (unfinished / STATE).write_text(state.model_dump_json(indent=1))
    unfinished.rename(folder / str(state.days[-1].date))
    for old in states(folder)[1:-2]:
        shutil.rmtree(old)
    return state


def _moments(learner: Learner) -> dict[str, Tensor]:
    kept = learner.optimiser.state_dict()["state"]
    names = [name for name, _ in learner.network.named_parameters()]
    return {f"{moment}.{name}": kept[place][moment].contiguous() for place, name in enumerate(names) for moment in MOMENTS}


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ModelError(f"another run trains in {folder}: wait for it, or take another folder") from None
        yield
