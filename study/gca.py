"""Gated cross-attention reproduced: the arms, their tuning, and the runs, each a line in `runs.jsonl`.

The paper (arXiv 2510.09435) reports that GCA right after the embeddings helps, that stacking it does not scale, and that |cos(X, X')|
settles at 0.1 to 0.2, the lower the better. Every arm is tuned alike, on a seed of its own; then all arms run with the same seeds, so that
differences are paired.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from crossrep.errors import DataError
from models.datasets.two_domains import Sequences
from study import training
from study.recommender import LAYERS, Architecture, Recommender, parameters
from study.training import Schedule, Views

RATES = (3e-3, 1e-2)  # what every arm may choose of
TUNING = 0  # the seed of tuning; those of the study are 1, 2, ...
ALL_LEVELS = tuple(range(LAYERS + 1))

Run = dict[str, Any]
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
    runs = Runs(folder / "runs.jsonl", sequences)
    run = partial(runs.complete, views, workers, console)
    tuned = run("tuning", [(arm, each, replace(schedule, rate=rate), TUNING) for rate in RATES for arm, each in named.items()])
    chosen = {arm: best_schedule([each for each in tuned if each["arm"] == arm]) for arm in named}
    # Seed by seed: a study that is cut off has all arms of the seeds it has.
    return run("study", [(arm, each, chosen[arm], seed) for seed in range(1, seeds + 1) for arm, each in named.items()])


def best_schedule(tuned: list[Run]) -> Schedule:
    return Schedule(**max(tuned, key=lambda run: float(run["validation"]))["schedule"])


class Runs:
    """Finished runs in a file of JSON lines. A run is known by its data, arm, architecture, schedule and seed, not by the code that did it:
    whoever changes what a run does takes the file away."""

    def __init__(self, path: Path, sequences: Sequences):
        self.path, self.data = path, sequences.fingerprint()
        path.parent.mkdir(parents=True, exist_ok=True)
        self.finished: dict[str, Run] = {}
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:  # the process was killed while it wrote
            path.write_text(whole)
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                found = json.loads(line)
                self.finished[_identity(found)] = found
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{path}, line {number} is no run: {error!r}; take the line out") from None

    def complete(self, views: Views, workers: int, console: Console, what: str, tasks: list[Task]) -> list[Run]:
        """The runs of `tasks`, in their order; those not in the file are done now, `workers` at a time."""
        wanted = {_identity(self._about(*task)): task for task in tasks}
        todo = [identity for identity in wanted if identity not in self.finished]
        columns = TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn("runs"), TimeElapsedColumn(), TimeRemainingColumn()
        with Progress(*columns, console=console) as progress, self.path.open("a") as file:
            bar = progress.add_task("", total=len(wanted), completed=len(wanted) - len(todo))
            for at, found in _run_all(views, min(workers, len(todo)), [wanted[identity] for identity in todo]):
                self.finished[todo[at]] = self._about(*wanted[todo[at]]) | found
                file.write(json.dumps(self.finished[todo[at]]) + "\n")
                file.flush()
                progress.advance(bar)
        return [self.finished[identity] for identity in wanted]

    def _about(self, arm: str, architecture: Architecture, schedule: Schedule, seed: int) -> Run:
        # Through JSON, as it is read again: a tuple is a list there.
        about = {"data": self.data, "arm": arm, "seed": seed, "architecture": asdict(architecture), "schedule": asdict(schedule)}
        found: Run = json.loads(json.dumps(about))
        return found


def _identity(run: Run) -> str:
    return json.dumps([run[name] for name in ("data", "arm", "seed", "architecture", "schedule")], sort_keys=True)


def _run_all(views: Views, workers: int, tasks: list[Task]) -> Iterator[tuple[int, Run]]:
    """(place in `tasks`, what the run found), as they finish; in this process if one at a time."""
    if workers <= 1:
        for at, (_, architecture, schedule, seed) in enumerate(tasks):
            yield at, training.run(views, architecture, schedule, seed)
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start, initargs=(views,)) as pool:
        futures = {pool.submit(_run, *task[1:]): at for at, task in enumerate(tasks)}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)  # after an error, what has not begun; else it would all be run first


_views: Views  # of a worker's process: sent once, not with every run


def _start(views: Views) -> None:
    global _views
    _views = views


def _run(architecture: Architecture, schedule: Schedule, seed: int) -> Run:
    return training.run(_views, architecture, schedule, seed)
