"""The whole flow under SIGKILL, SIGSTOP, scaling and lost disks: every event published counts once for its user and once for its item."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from itertools import zip_longest
from pathlib import Path

import numpy as np

from crossrep.spec import Space
from state import faults
from tests.cluster import Workers, new_space, prove, settled, wait_for
from tests.streams.small_model import SPEC, Feed, inferred, is_stopped, one_day, small_dataset, start_infer, start_infer_that_stops

INFER_POINTS = [point for point in faults.POINTS if point.startswith("infer.")]
FOLD_POINTS = [point for point in faults.POINTS if not point.startswith(("infer.", "samples."))]


def feed_until_killed(feed: Feed, victims: dict[str, subprocess.Popen[bytes]], workers: Workers) -> None:
    deadline = time.monotonic() + 90
    while any(victim.poll() is None for victim in victims.values()):
        feed.send(20)
        time.sleep(0.05)  # small batches: many passes of every point
        assert time.monotonic() < deadline, f"one of {list(victims)} was never passed\n{workers.logs()}"
    for point, victim in victims.items():
        assert victim.returncode == -signal.SIGKILL, f"{point}\n{workers.logs()}"


def settle(space: Space, bootstrap: str, workers: Workers) -> None:
    try:
        wait_for(lambda: inferred(space, bootstrap), "all events inferred", 90)
        wait_for(lambda: settled(space, bootstrap), "all frames folded", 90)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{workers.logs()}") from None


def test_a_day_killed_at_every_point_and_at_random_while_scaling(bootstrap: str, workers: Workers, tmp_path: Path) -> None:
    space, path = new_space(bootstrap, tmp_path, SPEC)
    feed = Feed(space, one_day(), bootstrap)
    running = {"i1": start_infer(workers, path, "i1")}  # it goes on whatever happens to i0, and takes over from it
    for fold_point, infer_point in zip_longest(FOLD_POINTS, INFER_POINTS):
        passes = 1 if fold_point.startswith("open.") else 3
        victims = {fold_point: workers.fold(path, "f0", fault=f"{fold_point}:{passes}")}
        if infer_point:
            victims[infer_point] = start_infer(workers, path, "i0", fault=f"{infer_point}:3")
        feed_until_killed(feed, victims, workers)
    running |= {"i0": start_infer(workers, path, "i0"), "f0": workers.fold(path, "f0")}
    for _ in range(5):
        feed.send()
    running |= {"f1": workers.fold(path, "f1")}  # from here on all work is shared
    random = np.random.default_rng(7)
    for number, name in enumerate(random.permutation(["i0", "i1", "f0", "f1"]).tolist()):
        for _ in range(random.integers(1, 8)):
            feed.send()
        running[name].kill()
        running[name].wait()
        if name == "f0":
            shutil.rmtree(tmp_path / "home" / "fold" / space.name / "f0")
        if number % 2:
            feed.send()  # meanwhile the others may take over
        running[name] = workers.fold(path, name) if name.startswith("f") else start_infer(workers, path, name)
    feed.send_rest()
    settle(space, bootstrap, workers)
    for name in ("i0", "i1"):
        running[name].terminate()
        assert running[name].wait(30) == 0, workers.logs()
    prove(space, bootstrap, feed.counts)


def test_workers_stopped_past_their_session_commit_nothing_that_has_moved(bootstrap: str, workers: Workers, tmp_path: Path) -> None:
    """Each stops with a batch in hand: computed, sent, and with its offsets in an open transaction, which its heir must wait for."""
    space, path = new_space(bootstrap, tmp_path, SPEC, partitions=8)
    feed = Feed(space, small_dataset(), bootstrap)
    workers.fold(path)
    start_infer(workers, path, "heir")
    points = ("infer.computed", "infer.produced", "infer.offsets")
    zombies = {point: start_infer_that_stops(workers, path, point, 4) for point in points}

    def all_stopped() -> bool:
        feed.send(40)
        return all(is_stopped(zombie) for zombie in zombies.values())

    try:
        wait_for(all_stopped, "every zombie has come to its point", 90)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{workers.logs()}") from None
    feed.send()
    wait_for(lambda: inferred(space, bootstrap), "the heir has taken over all partitions", 90)
    for zombie in zombies.values():
        zombie.send_signal(signal.SIGCONT)
    for _ in range(10):
        feed.send()
    settle(space, bootstrap, workers)
    prove(space, bootstrap, feed.counts)
    for point, zombie in zombies.items():
        assert zombie.poll() in (None, 1), f"{point}\n{workers.logs()}"  # it goes on, or says that it cannot
