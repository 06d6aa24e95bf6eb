"""The study of transfer: worlds, then tuning, then the arms (arms.py) with every seed, each run a line in `runs.jsonl`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from models.datasets.base import Dataset
from study import downstream, worlds
from study.arms import ARMS, BLOCKS, LATE, Arm
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

    def about(self, data: str) -> Run:
        definition: dict[str, Any] = asdict(self.arm) | {"blocks": {name: repr(BLOCKS[name]) for name in self.arm.blocks}}
        return {"data": data, "split": self.split, "arm": definition, "seed": self.seed, "rate": self.rate, "tuning": self.tuning}


def study(dataset: Dataset, folder: Path, scratch: Path, *, seeds: int, workers: int, console: Console) -> list[Run]:
    """Build worlds, tune, run; gives all runs of the study (not those of tuning), each with its arm's "name"."""
    runs, data = Runs(folder / "runs.jsonl", NAMES), worlds.fingerprint(dataset)
    given = (dataset, scratch, data)
    arms = {"authors": ARMS, "late": {name: ARMS[name] for name in LATE}}

    def complete(what: str, tasks: list[Task]) -> list[Run]:
        abouts = [task.about(data) for task in tasks]
        return runs.complete(what, list(zip(abouts, tasks)), _run, workers=workers, console=console, start=_start, given=given)

    wanted = [(split, arm.upstream, seed) for split in SPLITS for arm in arms[split].values() for seed in range(seeds + 1)]
    wanted = [world for world in dict.fromkeys(wanted) if world[2] != TUNING or world[1] == "dual"]
    # A random upstream takes the vocabulary of the trained one: that one comes first.
    for part in ([world for world in wanted if world[1] != "random"], [world for world in wanted if world[1] == "random"]):
        for _ in in_processes("upstreams", _build, part, workers, console, _start, given):
            pass
    chosen: dict[tuple[str, str], float] = {}
    for split in SPLITS:
        kinds = {arm.kind: arm for arm in reversed(arms[split].values()) if arm.upstream == "dual"}  # the first of each kind
        tuned = complete(f"tuning, {split}", [Task(split, kind, arm, TUNING, rate, True) for kind, arm in kinds.items() for rate in RATES])
        for at, kind in enumerate(kinds):
            chosen[split, kind] = max(tuned[at * len(RATES) : (at + 1) * len(RATES)], key=lambda run: float(run["auc"]))["rate"]
    # Seed by seed: a study that is cut off has all arms of the seeds it has.
    tasks = [
        Task(split, name, arm, seed, chosen[split, arm.kind], False)
        for seed in range(1, seeds + 1)
        for split in SPLITS
        for name, arm in arms[split].items()
    ]
    return [run | {"name": task.name} for run, task in zip(complete("arms", tasks), tasks)]


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
    folder = worlds.place(scratch, data, task.split, task.arm.upstream, task.seed)
    if _world is None or _world.folder != folder:
        _world = World(dataset, folder, task.split)
    return downstream.run(_world, task.arm, task.rate, task.seed, task.tuning)
