"""The study of transfer: worlds, then tuning, then the arms (arms.py) with every seed, each run a line in `runs.jsonl`."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from models.datasets.base import Dataset
from study import downstream, worlds
from study.arms import ARMS, BLOCKS, LATE, NONE, Arm
from study.runs import Run, Runs, in_processes
from study.worlds import SPLITS, World

RATES = (1e-3, 2e-3, 4e-3)  # of Adam: what every kind of arm may choose of
TUNING = 0  # the seed of tuning; those of the study are 1, 2, ...
NAMES = ("data", "split", "arm", "seed", "rate", "tuning")


@dataclass(frozen=True)
class Task:
    split: str
    name: str
    arm: Arm
    seed: int
    rate: float
    tuning: bool

    @property
    def world(self) -> tuple[str, worlds.Upstream, int]:
        return self.split, self.arm.upstream, self.seed

    def about(self, data: str) -> Run:
        definition: dict[str, Any] = asdict(self.arm) | {"blocks": {name: repr(BLOCKS[name]) for name in self.arm.blocks}}
        return {"data": data, "split": self.split, "arm": definition, "seed": self.seed, "rate": self.rate, "tuning": self.tuning}


def study(
    dataset: Dataset, folder: Path, scratch: Path, *, seeds: int, workers: int, console: Console, only: Collection[str] = ()
) -> list[Run]:
    """Tune, then run seed by seed; gives all runs of the study (not those of tuning), each with its arm's "name".

    A study that is cut off has all arms of the seeds it has. Upstreams are trained when a run needs them.

    Args:
        only: names of arms, which are compared with nothing; empty: all.
    """
    runs, data = Runs(folder / "runs.jsonl", NAMES), worlds.fingerprint(dataset)
    whole = {"authors": tuple(ARMS), "late": LATE}
    arms = {split: {name: ARMS[name] for name in names if not only or name in {NONE, *only}} for split, names in whole.items()}
    several: dict[str, Any] = {"workers": workers, "console": console, "start": _start, "given": (dataset, scratch, data)}

    def complete(what: str, tasks: list[Task]) -> list[Run]:
        abouts = [task.about(data) for task in tasks]
        needed = dict.fromkeys(tasks[at].world for at in runs.missing(abouts))
        # A random upstream takes the vocabulary of the trained one, which therefore comes first.
        trained = dict.fromkeys((split, "dual" if kind == "random" else kind, seed) for split, kind, seed in needed)
        for part in (list(trained), [world for world in needed if world not in trained]):
            for _ in in_processes(f"upstreams, {what}", _build, part, **several):
                pass
        return runs.complete(what, list(zip(abouts, tasks)), _run, **several)

    first = {split: {ARMS[name].kind: ARMS[name] for name in reversed(whole[split])} for split in SPLITS}
    kinds = [(split, kind) for split in SPLITS for kind in dict.fromkeys(arm.kind for arm in arms[split].values())]
    tuning = [Task(split, kind, first[split][kind], TUNING, rate, True) for split, kind in kinds for rate in RATES]
    chosen: dict[tuple[str, str], Run] = {}
    for task, run in zip(tuning, complete("tuning", tuning)):
        best = chosen.setdefault((task.split, task.name), run)
        if run["auc"] > best["auc"]:
            chosen[task.split, task.name] = run
    found = []
    for seed in range(1, seeds + 1):
        tasks = [
            Task(split, name, arm, seed, chosen[split, arm.kind]["rate"], False) for split in SPLITS for name, arm in arms[split].items()
        ]
        found += [run | {"name": task.name} for task, run in zip(tasks, complete(f"seed {seed} of {seeds}", tasks))]
    return found


_given: tuple[Dataset, Path, str]  # of a worker's process: sent once, not with every run
_world: World | None = None  # the last one used


def _start(*given: Any) -> None:
    global _given, _world
    _given, _world = given, None


def _build(wanted: tuple[str, worlds.Upstream, int]) -> None:
    dataset, scratch, data = _given
    worlds.build(dataset, worlds.place(scratch, data, *wanted), *wanted)


def _run(task: Task) -> Run:
    global _world
    dataset, scratch, data = _given
    folder = worlds.place(scratch, data, *task.world)
    if _world is None or _world.folder != folder:
        _world = World(dataset, folder, task.split)
    return downstream.run(_world, task.arm, task.rate, task.seed, task.tuning)
