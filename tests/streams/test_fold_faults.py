"""The fold worker under SIGKILL, SIGSTOP and lost disks, on a real broker: counts exact, vectors equal."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import psutil

from state import faults
from streams import broker
from tests import cluster
from tests.cluster import Load, Workers, new_space, prove, settled, wait_for


def test_killed_at_every_fault_point_and_with_disks_wiped(bootstrap: str, workers: Workers, tmp_path: Path) -> None:
    space, path = new_space(bootstrap, tmp_path)
    load = Load(space, bootstrap)
    points = [point for point in faults.POINTS if not point.startswith(("infer.", "samples."))]
    for round, point in enumerate(points):
        worker = workers.fold(path, fault=f"{point}:{1 if point.startswith('open.') else 3}")
        deadline = time.monotonic() + 40
        while worker.poll() is None:
            load.send(200)
            time.sleep(0.05)
            assert time.monotonic() < deadline, f"{point} was never passed\n{workers.logs()}"
        assert worker.returncode == -signal.SIGKILL, f"{point}\n{workers.logs()}"
        if round % 3 == 1:
            shutil.rmtree(tmp_path / "home" / "fold")
    workers.fold(path)
    wait_for(lambda: settled(space, bootstrap), "all frames folded")
    prove(space, bootstrap, load.counts)


def test_a_worker_stopped_past_its_session_is_fenced_when_it_wakes(bootstrap: str, workers: Workers, tmp_path: Path) -> None:
    space, path = new_space(bootstrap, tmp_path)
    load = Load(space, bootstrap)
    port = cluster.free_port()
    zombie = workers.fold(path, "zombie", "--flush-rows", "100000000", port=port)
    wait_for(lambda: cluster.ready(port), "the first worker is ready")
    load.send(2000)
    wait_for(lambda: settled(space, bootstrap), "first load folded")
    load.send(3000)
    time.sleep(0.03)  # frames are in memory, perhaps in the middle of a flush
    zombie.send_signal(signal.SIGSTOP)
    other = cluster.free_port()
    workers.fold(path, "heir", port=other)
    wait_for(lambda: cluster.ready(other) and settled(space, bootstrap), "the heir has folded everything")
    zombie.send_signal(signal.SIGCONT)
    load.send(2000)
    time.sleep(5)  # the zombie flushes and is refused, or rejoins and shares the partitions
    load.send(2000)
    wait_for(lambda: settled(space, bootstrap), "all frames folded")
    prove(space, bootstrap, load.counts)


def test_a_restore_that_is_stopped_keeps_the_store(bootstrap: str, workers: Workers, tmp_path: Path) -> None:
    space, path = new_space(bootstrap, tmp_path, partitions=1)
    load = Load(space, bootstrap)
    for name in ("w0", "w1"):  # w1 moves on alone: w0's store lacks the changelog's tail
        worker = workers.fold(path, name)
        load.send(1000)
        wait_for(lambda: settled(space, bootstrap), "folded")
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(30) == 0
    restoring = workers.fold(path, "w0", fault="open.restoring:1:SIGSTOP")
    wait_for(lambda: psutil.Process(restoring.pid).status() == psutil.STATUS_STOPPED, "restoring")
    restoring.send_signal(signal.SIGTERM)
    restoring.send_signal(signal.SIGCONT)
    restoring.wait(30)
    port = cluster.free_port()
    workers.fold(path, "w0", port=port)
    wait_for(lambda: cluster.ready(port), "ready")
    assert "is dropped" not in workers.logs()
    prove(space, bootstrap, load.counts)


def test_a_cluster_that_falls_silent_during_a_restore_ends_the_worker(workers: Workers, tmp_path: Path) -> None:
    running = broker.up(tmp_path / "kafka", progress=False)
    space, path = new_space(running.bootstrap, tmp_path, partitions=1)
    options = ("fold", str(path), "--port", str(cluster.free_port()), "--bootstrap", running.bootstrap)
    worker = workers.start(*options)
    Load(space, running.bootstrap).send(500)
    wait_for(lambda: settled(space, running.bootstrap), "folded")
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(30) == 0
    shutil.rmtree(tmp_path / "home" / "fold")
    restoring = workers.start(
        *options, fault="open.restoring:1:SIGSTOP", before="from crossrep import kafka; kafka.RETRY_FOR = 5.0  # not a minute"
    )
    wait_for(lambda: psutil.Process(restoring.pid).status() == psutil.STATUS_STOPPED, "restoring")
    os.kill(running.pid, signal.SIGSTOP)
    restoring.send_signal(signal.SIGCONT)
    try:
        assert restoring.wait(60) == 1, "it waits for ever, and nobody else gets the partition"
        assert "the cluster has not answered" in workers.logs()
    finally:
        os.kill(running.pid, signal.SIGCONT)
        broker.down(tmp_path / "kafka", kill=True)


def test_sigterm_flushes_quickly_and_the_next_start_restores_nothing(bootstrap: str, workers: Workers, tmp_path: Path) -> None:
    space, path = new_space(bootstrap, tmp_path)
    load = Load(space, bootstrap)
    port = cluster.free_port()
    worker = workers.fold(path, port=port)
    wait_for(lambda: cluster.ready(port), "ready")
    load.send(5000)
    wait_for(lambda: settled(space, bootstrap), "folded")
    started = time.monotonic()
    worker.terminate()
    assert worker.wait(10) == 0, workers.logs()
    assert time.monotonic() - started < 3
    load.send(1000)
    port = cluster.free_port()
    workers.fold(path, port=port)
    wait_for(lambda: cluster.ready(port) and settled(space, bootstrap), "all folded")
    assert "(0 records restored" in workers.logs()
    prove(space, bootstrap, load.counts)


def test_a_store_older_than_its_topics_keep_deletions_is_rebuilt(bootstrap: str, workers: Workers, tmp_path: Path) -> None:
    space, path = new_space(bootstrap, tmp_path)
    load = Load(space, bootstrap)
    for name in ("away", "other"):
        worker = workers.fold(path, name)
        load.send(500)
        wait_for(lambda: settled(space, bootstrap), "folded")
        worker.terminate()
        assert worker.wait(10) == 0, workers.logs()
    cluster.alter(bootstrap, space.representations_topic("item"), "delete.retention.ms", "1000")
    port = cluster.free_port()
    workers.fold(path, "away", port=port)
    wait_for(lambda: cluster.ready(port), "ready")
    assert workers.logs().count("is dropped and will be rebuilt") == space.partitions
    prove(space, bootstrap, load.counts)
