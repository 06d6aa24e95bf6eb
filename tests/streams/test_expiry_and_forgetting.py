"""Keys that expire, and keys that are forgotten: exactly, whatever is killed, and nothing of them is left."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from crossrep import LocalView, kafka
from crossrep.columnar import frames
from crossrep.columnar.forget import Forget
from crossrep.spec import Space
from crossrep.writer import rows_of
from state import faults
from streams.operations import erasure
from tests import cluster
from tests.cluster import ROOT, SPEC, Workers, new_space, prove, settled, wait_for

EXPIRING = SPEC.replace("[entities.user.columns.cr]", '[entities.user]\nexpire_after = "2h"\n[entities.user.columns.cr]')
HOUR = 3600.0


class Writer:
    """Writes rows of given users at given times."""

    def __init__(self, space: Space, bootstrap: str):
        self.space = space
        self._producer = kafka.producer(bootstrap)
        self._random = np.random.default_rng(0)

    def send(self, ids: list[int], times: list[float], entity: str = "user") -> None:
        sources = {name: self._random.normal(size=(len(ids), dim)).astype(np.float32) for name, dim in self.space.sources.items()}
        rows = rows_of(self.space, entity, ids, "impression", times, sources)
        for partition, frame in frames.encode(self.space, rows):
            self._producer.produce(self.space.frames_topic, frame, partition=partition)
        assert self._producer.flush(30) == 0


def seen(space: Space, bootstrap: str, ids: list[int], entity: str = "user") -> list[int]:
    """Their counts as a reader sees them."""
    with LocalView(entity, space.name, bootstrap) as view:
        view.wait(60)
        return view.get(ids).counts.tolist()


def test_expired_keys_go_and_those_that_return_begin_anew(bootstrap: str, workers: Workers, tmp_path: Path) -> None:
    space, path = new_space(bootstrap, tmp_path, EXPIRING, partitions=1)
    writer = Writer(space, bootstrap)
    workers.fold(path, "w0", "--slots", "8")  # most keys are in RocksDB only
    t = 1.6e9
    writer.send(list(range(100)), [t] * 100)
    writer.send([1, 2], [t + HOUR, t + HOUR])  # stays young
    writer.send([1], [t + 1.5 * HOUR], "item")  # moves the stream's time too
    wait_for(lambda: settled(space, bootstrap), "folded")
    assert seen(space, bootstrap, [0, 1, 2, 99]) == [1, 2, 2, 1]
    writer.send([200], [t + 2.5 * HOUR])  # now all but 1, 2 and 200 are too old
    wait_for(lambda: seen(space, bootstrap, list(range(100))) == [0, 2, 2] + [0] * 97, "the sweep has come by", 30)
    writer.send([1, 5, 5, 7], [t + 2.6 * HOUR, t + 2.6 * HOUR, t, t + 2.6 * HOUR])
    wait_for(lambda: settled(space, bootstrap), "folded")
    assert seen(space, bootstrap, [1, 5, 7, 200]) == [3, 2, 1, 1]
    assert seen(space, bootstrap, [1], "item") == [1], "items never expire here"
    prove(space, bootstrap)


def test_expiry_is_exact_under_sigkill_and_lost_disks(bootstrap: str, workers: Workers, tmp_path: Path) -> None:
    """What a key's state is must not depend on when the sweep came by, nor on what was restored."""
    space, path = new_space(bootstrap, tmp_path, EXPIRING)
    writer, random, t = Writer(space, bootstrap), np.random.default_rng(3), 1.6e9
    for round, point in enumerate(p for p in faults.POINTS if p.startswith(("commit.", "store.", "fold."))):
        worker = workers.fold(path, "w0", "--slots", "16", fault=f"{point}:4")
        deadline = time.monotonic() + 40
        while worker.poll() is None:
            t += 600
            ids = (random.zipf(1.2, 50) % 300).tolist()
            writer.send(ids, (t - random.exponential(HOUR, 50)).tolist())
            writer.send(ids, (t - random.exponential(HOUR, 50)).tolist(), "item")
            time.sleep(0.05)
            assert time.monotonic() < deadline, f"{point} was never passed\n{workers.logs()}"
        assert worker.returncode == -signal.SIGKILL, workers.logs()
        if round % 3 == 1:
            shutil.rmtree(tmp_path / "home" / "fold")
    workers.fold(path, "w0", "--slots", "16")
    wait_for(lambda: settled(space, bootstrap), "all frames folded")
    prove(space, bootstrap)


def test_a_forgotten_key_is_gone_from_readers_disk_and_changelog(bootstrap: str, workers: Workers, tmp_path: Path) -> None:
    space, path = new_space(bootstrap, tmp_path, SPEC.replace("[inputs]", 'history = "1m"\n[inputs]'), partitions=1)
    writer, t = Writer(space, bootstrap), 1.6e9
    worker = workers.fold(path)
    writer.send([17, 18], [t, t])
    wait_for(lambda: settled(space, bootstrap), "folded")
    with LocalView("user", space.name, bootstrap) as view:
        view.wait(60)
        vector = view.get([17])["cr"].vectors[0].tobytes()
        writer.send([17, 19], [t + 1, t + 1])
        command = [sys.executable, "-m", "crossrep", "forget", "user", "17", "--space", space.name, "--bootstrap", bootstrap]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "forgotten" in done.stdout
        wait_for(lambda: not view.get([17]).found[0] and view.get([18, 19]).found.all(), "a reader that was there sees it go")
        writer.send([17], [t + 2])
        wait_for(lambda: view.get([17]).counts[0] == 1, "what comes behind begins anew")
    wait_for(lambda: settled(space, bootstrap), "folded")
    prove(space, bootstrap)
    worker.terminate()
    assert worker.wait(20) == 0
    stores = tmp_path / "home" / "fold" / space.name / "w0"
    assert not any(vector in file.read_bytes() for file in stores.rglob("*") if file.is_file()), "its vector is on the disk"
    # The broker's own copy: compaction is told to be quick here; in production it comes within max.compaction.lag.ms.
    traces = {trace.topic: trace for trace in erasure.traces(space, bootstrap, Forget("user", b"17"))}
    assert traces[space.frames_topic].records == 2
    assert all(trace.until is not None for trace in traces.values())


def test_forgetting_is_exact_under_sigkill(bootstrap: str, workers: Workers, tmp_path: Path) -> None:
    space, path = new_space(bootstrap, tmp_path)
    load, random = cluster.Load(space, bootstrap), np.random.default_rng(5)
    for point in ("fold.folded", "commit.offsets", "commit.committed", "store.written"):
        worker = workers.fold(path, "w0", "--slots", "64", fault=f"{point}:5")
        deadline = time.monotonic() + 40
        while worker.poll() is None:
            load.send(100)
            erasure.order(space, bootstrap, Forget(str(random.choice(["user", "item"])), str(random.zipf(1.3) % 200).encode()))
            assert time.monotonic() < deadline, f"{point} was never passed\n{workers.logs()}"
    workers.fold(path, "w0", "--slots", "64")
    wait_for(lambda: settled(space, bootstrap), "all frames folded")
    prove(space, bootstrap)


def test_orders_that_are_wrong_are_dead_letters(bootstrap: str, workers: Workers, tmp_path: Path) -> None:
    space, path = new_space(bootstrap, tmp_path, partitions=2)
    from crossrep.columnar import forget
    from streams.proof.verify import _refused

    right = forget.encode(space, Forget("user", b"17"))
    home = forget.partition_of(space, b"17")
    producer = kafka.producer(bootstrap)
    wrong = [
        (1 - home, right),
        (home, forget.CODEC.encode({"space_hash": bytes(8), "entity": "user", "key": b"17"})),
        (home, forget.CODEC.encode({"space_hash": space.hash, "entity": "nobody", "key": b"17"})),
        (home, forget.CODEC.encode({"space_hash": space.hash, "entity": "user", "key": b""})),
        (home, right[:-1]),
    ]
    for partition, value in wrong:
        producer.produce(space.frames_topic, value, partition=partition)
    assert producer.flush(30) == 0
    writer = Writer(space, bootstrap)
    writer.send([17], [1.6e9])
    workers.fold(path)
    wait_for(lambda: settled(space, bootstrap), "folded")
    assert len(_refused(space, bootstrap)) == len(wrong)
    assert seen(space, bootstrap, [17]) == [1]
    assert json.dumps(space.toml_dict)
