"""The faults. Each takes the world and a seeded random, does its damage, and sets right what a person or a supervisor would set right.

What comes back by itself is waited for by `step`, which a fault with several steps calls itself, so that each step's stalls are its own.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from random import Random

import psutil

from crossrep import kafka
from state.faults import POINTS
from streams import broker
from tests.chaos.world import SESSION, World, until

Step = Callable[[], None]  # waits until all is well, and ends the measuring of a step
Fault = Callable[[World, Random, Step], None]
FAULTS: dict[str, Fault] = {}
SEVERAL: set[str] = set()  # faults that need several brokers
AWAY = SESSION + 5  # seconds after which the others have surely taken over
HOUR = 3600.0
BROKER_PAUSE = 30.0  # seconds


def fault(name: str, several_brokers: bool = False) -> Callable[[Fault], Fault]:
    def register(function: Fault) -> Fault:
        FAULTS[name] = function
        if several_brokers:
            SEVERAL.add(name)
        return function

    return register


# --- workers that die ---


@fault("kill-fold")
def kill_fold(world: World, random: Random, step: Step) -> None:
    """SIGKILL of a fold worker, which comes back at once"""
    world.kill(random.choice(world.folds))


@fault("kill-fold-away")
def kill_fold_away(world: World, random: Random, step: Step) -> None:
    """SIGKILL of a fold worker that stays away: the others take over"""
    with _away(world, random.choice(world.folds)) as name:
        world.kill(name)
        step()


@fault("kill-infer")
def kill_infer(world: World, random: Random, step: Step) -> None:
    """SIGKILL of an infer worker, which comes back at once"""
    world.kill(random.choice(world.infers))


@fault("fold-point")
def fold_point(world: World, random: Random, step: Step) -> None:
    """SIGKILL of a fold worker at a fault point"""
    points = [point for point in POINTS if point.startswith(("fold.", "flush.", "commit.", "store."))]
    _die_at(world, random.choice(world.folds), random.choice(points), random.randint(1, 20))


@fault("restore-point")
def restore_point(world: World, random: Random, step: Step) -> None:
    """SIGKILL of a fold worker while it restores, sometimes with an empty disk"""
    name = random.choice(world.folds)
    world.stop(name)
    if random.random() < 0.5:
        shutil.rmtree(world.stores(name))
    _die_at(world, name, random.choice([point for point in POINTS if point.startswith("open.")]), random.randint(1, 2))


@fault("infer-point")
def infer_point(world: World, random: Random, step: Step) -> None:
    """SIGKILL of an infer worker at a fault point at which nobody waits for it"""
    point = random.choice(["infer.consumed", "infer.computed", "infer.begun", "infer.produced", "infer.committed"])
    _die_at(world, random.choice(world.infers), point, random.randint(1, 20))


@fault("infer-transaction")
def infer_transaction(world: World, random: Random, step: Step) -> None:
    """SIGKILL of an infer worker inside its transaction; it stays away"""
    _die_at(world, random.choice(world.infers), "infer.offsets", random.randint(1, 20), away=AWAY)


@fault("rebalance-kill")
def rebalance_kill(world: World, random: Random, step: Step) -> None:
    """SIGKILL of a fold worker right after a rebalance began"""
    joins = _more(world, 1)[0]
    victim = random.choice([*world.folds, joins])
    world.start(joins)
    until(lambda: not world.is_flowing(), f"the rebalance when {joins} joins", 60)
    time.sleep(random.uniform(0, 0.3))
    world.kill(victim)
    step()
    world.stop(joins)


@fault("cold-start")
def cold_start(world: World, random: Random, step: Step) -> None:
    """all workers killed or stopped at once, then started"""
    everybody = [*world.folds, *world.infers]
    killed = random.random() < 0.5
    for name in everybody:
        world.release(name)
    if killed:
        for name in everybody:
            world.kill(name)
    world.stop(*everybody)
    time.sleep(random.uniform(0, AWAY))
    for name in everybody:
        world.start(name)


# --- workers that are stopped, added, taken away ---


@fault("zombie-fold")
def zombie_fold(world: World, random: Random, step: Step) -> None:
    """SIGSTOP of a fold worker past its session, then SIGCONT"""
    _suspend(world, random.choice(world.folds))


@fault("zombie-infer")
def zombie_infer(world: World, random: Random, step: Step) -> None:
    """SIGSTOP of an infer worker past its session, then SIGCONT"""
    _suspend(world, random.choice(world.infers))


@fault("rolling-restart")
def rolling_restart(world: World, random: Random, step: Step) -> None:
    """SIGTERM and start of every worker, one after another"""
    everybody = [*world.folds, *world.infers]
    random.shuffle(everybody)
    for name in everybody:
        world.stop(name)
        world.start(name)
        step()


@fault("scale")
def scale(world: World, random: Random, step: Step) -> None:
    """1 → 4 → 2 fold workers under load"""
    first, *others = world.folds
    if others:
        world.stop(*others)
        step()
    many = [first, *_more(world, 4 - len(world.folds)), *others]
    for name in many[1:]:
        world.start(name)
    step()
    world.stop(*[name for name in many if name not in world.folds])


@fault("clock")
def clock(world: World, random: Random, step: Step) -> None:
    """a fold and an infer worker whose clocks are 7 hours off"""
    wrong = [random.choice(world.folds), random.choice(world.infers)]
    for name in wrong:
        world.stop(name)
        world.start(name, clock=random.choice([-7, 7]) * HOUR)
    step()
    for name in wrong:
        world.stop(name)
        world.start(name)


# --- disks ---


@fault("disk-deleted")
def disk_deleted(world: World, random: Random, step: Step) -> None:
    """the RocksDBs of a killed fold worker are deleted"""
    with _away(world, random.choice(world.folds)) as name:
        world.kill(name)
        shutil.rmtree(world.stores(name))


@fault("disk-truncated")
def disk_truncated(world: World, random: Random, step: Step) -> None:
    """a file of each RocksDB of a killed fold worker is cut in half"""
    with _away(world, random.choice(world.folds)) as name:
        world.kill(name)
        for store in _stores(world, name):
            _truncate(store, random)


@fault("disk-garbled")
def disk_garbled(world: World, random: Random, step: Step) -> None:
    """bytes in the SSTs (or the logs) of a killed fold worker are changed"""
    with _away(world, random.choice(world.folds)) as name:
        world.kill(name)
        for store in _stores(world, name):
            _garble(store, random)


# --- brokers ---


@fault("broker-restart")
def broker_restart(world: World, random: Random, step: Step) -> None:
    """the whole cluster is stopped for some seconds"""
    broker.down(world.folder / "kafka")
    time.sleep(random.uniform(0, 10))
    world.start_broker()


@fault("broker-kill")
def broker_kill(world: World, random: Random, step: Step) -> None:
    """the whole cluster is SIGKILLed for some seconds"""
    broker.down(world.folder / "kafka", kill=True)
    time.sleep(random.uniform(0, 10))
    world.start_broker()


@fault("broker-pause")
def broker_pause(world: World, random: Random, step: Step) -> None:
    """a broker is stopped (SIGSTOP) for 30 s"""
    process = psutil.Process(random.choice(world.start_broker().nodes).pid)
    process.suspend()
    time.sleep(BROKER_PAUSE)
    process.resume()


@fault("all-killed")
def all_killed(world: World, random: Random, step: Step) -> None:
    """the cluster, a fold and an infer worker are SIGKILLed at once, and disks are damaged"""
    broker.down(world.folder / "kafka", kill=True)
    world.kill(random.choice(world.infers))
    with _away(world, random.choice(world.folds)) as name:
        world.kill(name)
        for damage, store in zip(cycle([_truncate, _garble]), _stores(world, name)):
            damage(store, random)
        world.start_broker()


@fault("node-kill", several_brokers=True)
def node_kill(world: World, random: Random, step: Step) -> None:
    """one of three brokers is SIGKILLed and comes back"""
    _without(world, random.randint(1, world.brokers), step, seconds=random.uniform(0, 10), kill=True)


@fault("node-leader", several_brokers=True)
def node_leader(world: World, random: Random, step: Step) -> None:
    """the broker that leads most frames is stopped: leaders move"""
    leaders = [
        part.leader for part in kafka.admin(world.bootstrap).list_topics(timeout=30).topics[world.space.frames_topic].partitions.values()
    ]
    _without(world, max(sorted(set(leaders)), key=leaders.count), step, seconds=random.uniform(0, 10), kill=False)


@fault("node-rolling", several_brokers=True)
def node_rolling(world: World, random: Random, step: Step) -> None:
    """every broker is restarted, one after another"""
    for number in range(1, world.brokers + 1):
        _without(world, number, step, seconds=0.0, kill=False)
        step()


# --- what they share ---


@contextmanager
def _away(world: World, name: str) -> Iterator[str]:
    """A worker that the supervisor does not restart meanwhile."""
    world.release(name)
    yield name
    world.start(name)


def _die_at(world: World, name: str, point: str, passes: int, away: float = 0.0) -> None:
    world.stop(name)
    world.start(name, fault=f"{point}:{passes}", kept=False)
    world.await_fault(name, f"{point}:{passes}")
    time.sleep(away)
    world.start(name)


def _suspend(world: World, name: str) -> None:
    world.signal(name, signal.SIGSTOP)
    time.sleep(AWAY)
    world.signal(name, signal.SIGCONT)


def _more(world: World, count: int) -> list[str]:
    return [f"f{len(world.folds) + i}" for i in range(count)]


def _stores(world: World, name: str) -> list[Path]:
    return sorted(path for path in world.stores(name).glob("partition-*") if path.is_dir())


def _truncate(store: Path, random: Random) -> None:
    files = sorted(file for file in store.iterdir() if file.suffix in (".sst", ".log") or file.name.startswith("MANIFEST"))
    file = random.choice(files)
    os.truncate(file, file.stat().st_size // 2)


def _garble(store: Path, random: Random) -> None:
    for file in sorted(store.glob("*.sst")) or sorted(store.glob("*.log")):
        with file.open("r+b") as data:
            for _ in range(3):
                data.seek(int(random.random() * file.stat().st_size))
                data.write(random.randbytes(16))


def _without(world: World, number: int, step: Step, *, seconds: float, kill: bool) -> None:
    broker.stop_node(world.folder / "kafka", number, kill=kill)
    step()
    time.sleep(seconds)
    broker.start_node(world.folder / "kafka", number)
