"""The whole flow under SIGKILL, SIGSTOP, scaling and lost disks: every event published counts once for its user and once for its item."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np

from state import faults
from tests.cluster import Workers, free_port, new_space, prove, ready, settled, wait_for
from tests.streams.small_model import SPEC, Feed, inferred, is_stopped, one_day, resume, small_dataset, start_infer, start_infer_that_stops

POINTS = [point for point in faults.POINTS if point.startswith("infer.")]


def feed_until_killed(feed: Feed, worker: subprocess.Popen[bytes], what: str, workers: Workers) -> None:
    deadline = time.monotonic() + 60
    while worker.poll() is None:
        feed.send(20)
        time.sleep(0.05)
        assert time.monotonic() < deadline, f"{what} was never passed\n{workers.logs()}"
    assert worker.returncode == -signal.SIGKILL, f"{what}\n{workers.logs()}"


def settle(feed: Feed, space, bootstrap: str, workers: Workers) -> None:  # type: ignore[no-untyped-def]
    try:
        wait_for(lambda: inferred(space, bootstrap), "all events inferred")
        wait_for(lambda: settled(space, bootstrap), "all frames folded")
    except AssertionError as error:
        raise AssertionError(f"{error}\n{workers.logs()}") from None


def test_killed_at_every_infer_point_and_at_random_while_scaling(bootstrap: str, workers: Workers, tmp_path: Path) -> None:
    space, path = new_space(bootstrap, tmp_path, SPEC)
    feed = Feed(space, one_day(), bootstrap)
    running = {"f0": workers.fold(path, "f0")}
    for number, point in enumerate(POINTS):
        victim = start_infer(workers, path, "i0", fault=f"{point}:3")
        if number == len(POINTS) // 2:  # from here on the work is shared
            running["i1"] = start_infer(workers, path, "i1")
            running["f1"] = workers.fold(path, "f1")
        feed_until_killed(feed, victim, point, workers)
    running["i0"] = start_infer(workers, path, "i0")
    random = np.random.default_rng(7)
    for number, name in enumerate(random.permutation(["i0", "i1", "f0", "f1", "i1", "f0"]).tolist()):
        for _ in range(random.integers(1, 8)):
            feed.send(100)
        running[name].kill()
        running[name].wait()
        if name == "f0":
            shutil.rmtree(tmp_path / "home" / "fold" / space.name / "f0")
        if number % 2:
            feed.send(100)  # meanwhile the others may take over
        running[name] = workers.fold(path, name) if name.startswith("f") else start_infer(workers, path, name)
    feed.send_rest()
    settle(feed, space, bootstrap, workers)
    prove(space, bootstrap, feed.counts)


def test_a_killed_worker_s_open_transaction_does_not_mislead_its_heir(bootstrap: str, workers: Workers, tmp_path: Path) -> None:
    """Killed with its offsets in an open transaction, and not restarted: who takes over must wait for them, not begin anew."""
    space, path = new_space(bootstrap, tmp_path, SPEC)
    feed = Feed(space, small_dataset(), bootstrap)
    workers.fold(path)
    victim = start_infer(workers, path, "victim", fault="infer.offsets:5")
    feed_until_killed(feed, victim, "infer.offsets", workers)
    start_infer(workers, path, "heir")
    feed.send()
    settle(feed, space, bootstrap, workers)
    prove(space, bootstrap, feed.counts)


def test_workers_stopped_past_their_session_commit_nothing_that_has_moved(bootstrap: str, workers: Workers, tmp_path: Path) -> None:
    space, path = new_space(bootstrap, tmp_path, SPEC, partitions=8)
    feed = Feed(space, small_dataset(), bootstrap)
    workers.fold(path)
    port = free_port()
    start_infer(workers, path, "heir", port=port)
    points = [point for point in POINTS if point != "infer.committed"]
    zombies = {point: start_infer_that_stops(workers, path, f"zombie-{n}", point, 4) for n, point in enumerate(points)}

    def all_stopped() -> bool:
        feed.send(40)
        return all([is_stopped(zombie) for zombie in zombies.values()])

    wait_for(all_stopped, "every zombie has come to its point")
    feed.send()
    wait_for(lambda: inferred(space, bootstrap), "the heir has taken over all partitions")
    for zombie in zombies.values():
        resume(zombie)
    for _ in range(20):
        feed.send(40)
    settle(feed, space, bootstrap, workers)
    prove(space, bootstrap, feed.counts)
    for point, zombie in zombies.items():
        assert zombie.poll() in (None, 1), f"{point}\n{workers.logs()}"  # goes on, or says that it cannot


def test_sigterm_leaves_nothing_open(bootstrap: str, workers: Workers, tmp_path: Path) -> None:
    space, path = new_space(bootstrap, tmp_path, SPEC)
    feed = Feed(space, small_dataset(), bootstrap)
    port = free_port()
    worker = start_infer(workers, path, port=port)
    wait_for(lambda: ready(port), "ready")
    for _ in range(5):
        feed.send(100)
    worker.terminate()
    assert worker.wait(30) == 0, workers.logs()
    start_infer(workers, path)
    workers.fold(path)
    settle(feed, space, bootstrap, workers)
    prove(space, bootstrap, feed.counts)
