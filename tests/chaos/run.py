"""A run: the sequence of faults a seed stands for, one after another, with proofs in between, and the figures of each kind."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from tests.chaos.faults import FAULTS, SEVERAL
from tests.chaos.proof import Differences, prove
from tests.chaos.world import Stuck, World

log = logging.getLogger("chaos")

REST = 2.0  # seconds of undisturbed load behind each fault
NONE = "(none)"


@dataclass
class Figures:
    """Of one kind of fault; seconds are the longest seen."""

    injected: int = 0
    stall: float = 0.0  # of readers, in any partition
    kept: float | None = None  # of a partition that stayed with its process
    moved: float | None = None  # of a partition that another process took over
    recovery: float = 0.0  # until every worker was ready and every partition went on


@dataclass
class Result:
    """What a run has found so far."""

    faults: int = 0
    under_way: str = NONE
    proofs: int = 0
    differences: Differences = field(default_factory=Differences)
    figures: dict[str, Figures] = field(default_factory=dict)


def plan(seed: int, faults: int, brokers: int = 1, only: Sequence[str] = ()) -> list[str]:
    """The kinds of fault of a seed: each kind once in random order, then all again in another, and so on."""
    random = Random(seed)
    kinds = [name for name in FAULTS if (not only or name in only) and (brokers > 1 or name not in SEVERAL)]
    chosen: list[str] = []
    while kinds and len(chosen) < faults:
        chosen += random.sample(kinds, len(kinds))
    return chosen[:faults]


def run(
    world: World,
    seed: int,
    kinds: Sequence[str],
    *,
    check_every: int,
    result: Result,
    told: Callable[[str, Figures], None] = lambda *_: None,
) -> None:
    """Inject faults until all are done or something is wrong, and fill in the result as it goes.

    Args:
        check_every: faults between two proofs; the last is always followed by one.
        told: called behind each fault with its kind and the figures of this one.
    """
    try:
        quiet = Figures(1)
        time.sleep(REST)
        _step(world, quiet)()
        _add(result, NONE, quiet)
        for number, kind in enumerate(kinds):
            result.under_way = kind
            log.info("fault %d: %s", number, kind)
            figures = inject(world, kind, Random(f"{seed}-{number}"))
            result.faults += 1
            _add(result, kind, figures)
            told(kind, figures)
            result.under_way = NONE
            time.sleep(REST)
            if (number + 1) % check_every == 0 or number + 1 == len(kinds):
                result.under_way = "(proof)"
                result.differences += prove(world)
                result.proofs += 1
                log.info("proof %d: %s", result.proofs, dict(result.differences) or "no differences")
                if result.differences:
                    return
    except Stuck as error:
        log.error("stuck: %s", error)
        world.tell_stacks()
        result.differences[f"stuck at {result.under_way}: {error}"] += 1


def inject(world: World, kind: str, random: Random) -> Figures:
    """One fault, and the wait until all is well again. Raises Stuck."""
    figures = Figures(1)
    step = _step(world, figures)
    time.sleep(random.uniform(0, 1))
    world.observer.measure()
    FAULTS[kind](world, random, step)
    step()
    return figures


def _step(world: World, figures: Figures) -> Callable[[], None]:
    before, started = world.owners(), time.monotonic()

    def step() -> None:
        nonlocal before, started
        world.wait_until_well()
        gaps, after = world.observer.gaps(), world.owners()
        world.observer.measure()
        figures.recovery = max(figures.recovery, time.monotonic() - started)
        figures.stall = max(figures.stall, *gaps.values())
        for number, gap in gaps.items():
            if before.get(number) == after.get(number):
                figures.kept = max(figures.kept or 0.0, gap)
            else:
                figures.moved = max(figures.moved or 0.0, gap)
        before, started = after, time.monotonic()

    return step


def _add(result: Result, kind: str, one: Figures) -> None:
    all_ = result.figures.setdefault(kind, Figures())
    all_.injected += one.injected
    all_.stall, all_.recovery = max(all_.stall, one.stall), max(all_.recovery, one.recovery)
    all_.kept, all_.moved = _longer(all_.kept, one.kept), _longer(all_.moved, one.moved)


def _longer(a: float | None, b: float | None) -> float | None:
    return max((x for x in (a, b) if x is not None), default=None)


def log_to(path: Path) -> None:
    """Write the run's course to a file, beside the workers' logs."""
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.handlers = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False
