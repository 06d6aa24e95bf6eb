"""Gated cross-attention reproduced: the arms, their tuning, and the runs, each a line in `runs.jsonl`.

The paper (arXiv 2510.09435) reports that GCA right after the embeddings helps, that stacking it does not scale, and that |cos(X, X')|
settles at 0.1 to 0.2, the lower the better. Every arm is tuned alike, on a seed of its own; then all arms run with the same seeds, so that
differences are paired.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console

from crossrep.errors import DataError
from models.datasets.two_domains import Sequences
from study import training
from study.recommender import LAYERS, Architecture, Recommender, parameters
from study.runs import Run, Runs
from study.training import Schedule, Views

RATES = (3e-3, 1e-2)  # what every arm may choose of
TUNING = 0  # the seed of tuning; those of the study are 1, 2, ...
ALL_LEVELS = tuple(range(LAYERS + 1))

Task = tuple[str, Architecture, Schedule, int]  # arm, ..., seed


def arms(dim: int) -> dict[str, Architecture]:
    """Every arm by name. Where an arm is grown, its feed-forward nets take up the parameters that GCA has in another."""
    none = Architecture(dim, 2 * dim)
    early, stack = replace(none, crossings=(0,)), replace(none, crossings=ALL_LEVELS)

    def grown(arm: Architecture, to: Architecture) -> Architecture:
        def count(architecture: Architecture) -> int:
            return parameters(Recommender((1, 1), 1, architecture))  # the tables are the same in all arms

        each = count(replace(arm, feed_forward=arm.feed_forward + 1)) - count(arm)
        return replace(arm, feed_forward=arm.feed_forward + round((count(to) - count(arm)) / each))

    return {
        "none": none,
        "early": early,
        "stack": stack,
        "none, as large as stack": grown(none, stack),
    }


def study(sequences: Sequences, folder: Path, *, seeds: int, workers: int, schedule: Schedule, dim: int, console: Console) -> list[Run]:
    """Tune, run, and give all runs of the study (not those of tuning). What `folder` holds already is not run again."""
    views = Views.of(sequences)
    for domain in (0, 1):
        if not (views.test.target & (views.test.domain == domain)).any():
            raise DataError(f"domain {domain} has nothing to test on: no user has events of it at three different times")
    named = arms(dim)
    runs, data = Runs(folder / "runs.jsonl", ("data", "arm", "seed", "architecture", "schedule")), sequences.fingerprint()

    def run(what: str, tasks: list[Task]) -> list[Run]:
        abouts = [
            {"data": data, "arm": arm, "seed": seed, "architecture": asdict(architecture), "schedule": asdict(schedule)}
            for arm, architecture, schedule, seed in tasks
        ]
        return runs.complete(what, list(zip(abouts, tasks)), _run, workers=workers, console=console, start=_start, given=(views,))

    tuned = run("tuning", [(arm, each, replace(schedule, rate=rate), TUNING) for rate in RATES for arm, each in named.items()])
    chosen = {arm: best_schedule([each for each in tuned if each["arm"] == arm]) for arm in named}
    # Seed by seed: a study that is cut off has all arms of the seeds it has.
    return run("study", [(arm, each, chosen[arm], seed) for seed in range(1, seeds + 1) for arm, each in named.items()])


def best_schedule(tuned: list[Run]) -> Schedule:
    return Schedule(**max(tuned, key=lambda run: float(run["validation"]))["schedule"])


_views: Views  # of a worker's process: sent once, not with every run


def _start(views: Views) -> None:
    global _views
    _views = views


def _run(task: Task) -> Run:
    return training.run(_views, *task[1:])
