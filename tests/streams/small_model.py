"""A small trained upstream model and a space that fits it, for the tests that run `crossrep infer`."""

from __future__ import annotations

import atexit
import dataclasses
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from confluent_kafka import KafkaException, TopicPartition

from crossrep import kafka
from crossrep.spec import Space
from models.datasets import Dataset, kuairand, simulator
from models.datasets.base import only, select
from streams.demo import publish
from tests import cluster
from tests.cluster import Workers

INPUTS = """
name = "{name}"
partitions = {partitions}
flush = "50ms"
[inputs]
impressions = "events.impressions.{name}"
clicks = "events.clicks.{name}"
user_features = "features.user.{name}"
item_features = "features.item.{name}"
[weights]
impression = 1.0
click = 4.0
"""

SPEC = (
    INPUTS
    + """
[entities.user.columns.cr]
source = "cr"
dim = 64
aggregate = "decayed_mean"
half_life = "3d"
[entities.user.columns.ur]
source = "ur"
dim = 32
aggregate = "latest"
[entities.user.columns.clicks]
source = "cr"
dim = 0
aggregate = "decayed_mean"
half_life = "1d"
events = ["click"]
[entities.item.columns.cr]
source = "cr"
dim = 64
aggregate = "decayed_mean"
half_life = "7d"
[entities.item.columns.ir]
source = "ir"
dim = 32
aggregate = "latest"
"""
)

# `crossrep ARGS`, stopped by SIGSTOP at the n-th pass of a fault point: what a suspended machine or a long pause looks like to the others.
_STOPS_ITSELF = """
import os, signal, sys
from state import faults
name, left = sys.argv[1], [int(sys.argv[2])]
def point(passed):
    if passed == name:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
faults.point = point
sys.argv = ["crossrep", *sys.argv[3:]]
from crossrep.cli import main
main()
"""


@functools.cache
def small_model() -> Path:
    """The model's folder; trained once a session, in seconds."""
    from models import train

    folder = Path(tempfile.mkdtemp(prefix="crossrep-model-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    train.train(small_dataset(), folder, baseline=False, progress=False)
    return folder


def small_dataset(events: int = 6000, seed: int = 0) -> Dataset:
    return simulator.simulate(events=events, users=300, items=150, seed=seed)


def one_day(impressions: int = 15_000) -> Dataset:
    """About a day of KuaiRand where it is at hand, else of the simulator."""
    places = [os.environ.get("CROSSREP_KUAIRAND"), cluster.ROOT.parent / "shared" / "data" / "kuairand_pure_apr25_may08"]
    for place in places:
        if place and Path(place).is_dir():
            whole = kuairand.load(Path(place))
            return only(whole, select(next(iter(whole.impressions())), slice(impressions)))
    return small_dataset(impressions, seed=1)


class Feed:
    """Publishes a data set piece by piece, over and over while a test wants load, and counts what was acknowledged."""

    def __init__(self, space: Space, dataset: Dataset, bootstrap: str):
        self.impressions = self.clicks = 0
        self._space, self._dataset, self._bootstrap = space, dataset, bootstrap
        self._runs = list(dataset.impressions())
        assert len(self._runs) == 1, "meant for small data sets"
        publish.publish_features(dataset, space.inputs, bootstrap)

    @property
    def events(self) -> int:
        return self.impressions + self.clicks

    @property
    def counts(self) -> dict[str, int]:
        """What every entity's counts must sum to."""
        return dict.fromkeys(self._space.entities, self.events)

    def send(self, impressions: int = 100) -> None:
        """The next ones, from the beginning again behind the end."""
        start = self.impressions % self._dataset.size
        run = select(self._runs[0], slice(start, start + impressions))
        piece = dataclasses.replace(self._dataset, impressions=lambda: iter([run]), size=len(run))
        sent = publish.publish_events(piece, self._space.inputs, self._bootstrap)
        assert sent.impressions == len(run)
        self.impressions += sent.impressions
        self.clicks += sent.clicks

    def send_rest(self) -> None:
        """Whatever of the data set was never sent."""
        if self.impressions < self._dataset.size:
            self.send(self._dataset.size)


def start_infer(
    workers: Workers, path: Path, name: str = "i0", *more: str, fault: str | None = None, port: int | None = None
) -> subprocess.Popen[bytes]:
    return workers.start(*_infer(path, name, *more, port=port), fault=fault)


def start_infer_that_stops(workers: Workers, path: Path, point: str, after: int) -> subprocess.Popen[bytes]:
    """An inference worker that SIGSTOPs itself at the `after`-th pass of a fault point."""
    name = f"zombie-{point}"
    command = [sys.executable, "-c", _STOPS_ITSELF, point, str(after), *_infer(path, name)]
    environment = {**os.environ, "CROSSREP_HOME": str(workers.folder / "home"), "PYTHONPATH": str(cluster.ROOT)}
    log = workers.folder / f"{len(workers.running)}-{name}.log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment, cwd=cluster.ROOT)
    workers.running.append(process)
    return process


def _infer(path: Path, name: str, *more: str, port: int | None = None) -> list[str]:
    options = ["--name", name, "--port", str(port or cluster.free_port()), "--session-timeout", "3", *more]
    return ["infer", str(path), "--model", str(small_model()), *options]


def is_stopped(process: subprocess.Popen[bytes]) -> bool:
    """Does the process lie stopped (SIGSTOP)? Asked of the kernel; a process that ended is an error."""
    assert process.poll() is None, f"ended with {process.returncode} instead of stopping"
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def consumed(topics: list[str], group: str, bootstrap: str) -> bool:
    """Has the group committed everything in these topics, and is nothing of it still in an open transaction?"""
    client = kafka.consumer(bootstrap, group)
    try:
        parts = [TopicPartition(t, p) for t in topics for p in client.list_topics(t, timeout=30).topics[t].partitions]
        ends = [kafka.watermarks(client, part.topic, part.partition)[1] for part in parts]
        committed = client.committed(parts, timeout=30)
        return all(c.error is None and max(c.offset, 0) == end for c, end in zip(committed, ends))
    except KafkaException:
        return False  # offsets of an open transaction: not stable yet
    finally:
        client.close()


def nothing_open(topic: str, bootstrap: str) -> bool:
    """Is no transaction open on the topic? A reader that is read_committed sees nothing behind the first open one."""
    committed = kafka.consumer(bootstrap)
    all_of_it = kafka.consumer(bootstrap, config={"isolation.level": "read_uncommitted"})
    try:
        numbers = committed.list_topics(topic, timeout=30).topics[topic].partitions
        return all(kafka.watermarks(committed, topic, n) == kafka.watermarks(all_of_it, topic, n) for n in numbers)
    finally:
        committed.close()
        all_of_it.close()


def inferred(space: Space, bootstrap: str) -> bool:
    """Is every event turned into frames, and are the frames visible?"""
    inputs = [space.inputs.impressions, space.inputs.clicks]
    return consumed(inputs, f"infer.{space.name}", bootstrap) and nothing_open(space.frames_topic, bootstrap)
