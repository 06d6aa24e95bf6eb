"""What broker tests share: spaces of their own, worker processes that can be killed, load, and waiting until all is folded."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
from confluent_kafka.admin import AlterConfigOpType, ConfigEntry, ConfigResource, ResourceType

from crossrep import kafka
from crossrep.columnar import frames
from crossrep.spec import Space
from crossrep.writer import rows_of
from streams import topics
from streams.broker import free_port as free_port
from streams.proof.verify import Verdict, unfolded, verify

ROOT = Path(__file__).parent.parent
_names = itertools.count()

SPEC = """
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
[entities.user.columns.cr]
source = "cr"
dim = 8
aggregate = "decayed_mean"
half_life = "1h"
[entities.user.columns.ur]
source = "ur"
dim = 4
aggregate = "latest"
[entities.user.columns.clicks]
source = "cr"
dim = 0
aggregate = "decayed_mean"
half_life = "1d"
events = ["click"]
[entities.item.columns.cr]
source = "cr"
dim = 8
aggregate = "decayed_mean"
half_life = "2d"
[entities.item.columns.ir]
source = "ir"
dim = 4
aggregate = "latest"
"""


def new_space(bootstrap: str, folder: Path, spec: str = SPEC, partitions: int = 4, replication: int = 1) -> tuple[Space, Path]:
    """A space with topics of its own, and its TOML file."""
    name = f"t{os.getpid()}-{next(_names)}"
    path = folder / f"{name}.toml"
    path.write_text(spec.format(name=name, partitions=partitions))
    space = Space.load(path)
    topics.create(space, bootstrap, replication)
    return space, path


class Workers:
    """Processes of `crossrep`, their output in files."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.running: list[subprocess.Popen[bytes]] = []

    def start(self, *args: str, fault: str | None = None, before: str = "") -> subprocess.Popen[bytes]:
        """Start `crossrep ARGS`, to be killed at a fault point if one is named; `before` is Python that runs first in the new process."""
        environment = {**os.environ, "CROSSREP_HOME": str(self.folder / "home"), "PYTHONPATH": str(ROOT)}
        if fault:
            environment["CROSSREP_FAULT"] = fault
        log = (self.folder / f"{len(self.running)}-{args[0]}.log").open("wb")
        program = ["-c", f"{before}\nfrom crossrep.cli import main\nmain()"] if before else ["-m", "crossrep"]
        process = subprocess.Popen([sys.executable, *program, *args], stdout=log, stderr=log, env=environment, cwd=ROOT)
        self.running.append(process)
        return process

    def fold(self, space: Path, name: str = "w0", *more: str, fault: str | None = None, port: int | None = None) -> subprocess.Popen[bytes]:
        options = ["--name", name, "--port", str(port or free_port()), "--session-timeout", "3", *more]
        return self.start("fold", str(space), *options, fault=fault)

    def kill_all(self) -> None:
        for process in self.running:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(signal.SIGCONT)
                    process.kill()
                process.wait()

    def logs(self) -> str:
        return "\n".join(f"== {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in sorted(self.folder.glob("*.log")))


def wait_for(condition: Callable[[], bool], what: str, timeout: float = 60.0, every: float = 0.05) -> float:
    """Seconds until the condition holds; fails the test if it never does."""
    started = time.monotonic()
    while not condition():
        if time.monotonic() - started > timeout:
            raise AssertionError(f"not within {timeout:.0f} s: {what}")
        time.sleep(every)
    return time.monotonic() - started


def alter(bootstrap: str, topic: str, key: str, value: str) -> None:
    """Give a topic another setting, and wait until the cluster says so."""
    admin = kafka.admin(bootstrap)
    entry = ConfigEntry(key, value, incremental_operation=AlterConfigOpType.SET)
    for future in admin.incremental_alter_configs([ConfigResource(ResourceType.TOPIC, topic, incremental_configs=[entry])]).values():
        future.result(30)
    wait_for(lambda: kafka.settings(bootstrap, topic)[key] == value, f"{topic}: {key}={value}")


def ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


class Load:
    """Random rows of users and items as another team's model would write them, and the true counts."""

    def __init__(self, space: Space, bootstrap: str, seed: int = 0):
        self.space, self.counts = space, dict.fromkeys(space.entities, 0)
        self._producer = kafka.producer(bootstrap)
        self._random = np.random.default_rng(seed)
        self._time = 1.6e9

    def send(self, rows: int, keys: int = 200, max_rows: int = 64) -> None:
        """Write `rows` rows per entity, uncombined, some of them late and at equal times, and wait until they are acknowledged."""
        random = self._random
        times = np.round(self._time + random.exponential(600, rows).cumsum() - random.exponential(3600, rows))
        self._time = float(times.max())
        events = np.where(random.random(rows) < 0.3, "click", "impression")
        dims = self.space.sources
        sources = {name: random.normal(size=(rows, dim)).astype(np.float32) for name, dim in dims.items()}
        for entity in self.space.entities:
            ids = (random.zipf(1.3, rows) % keys).tolist()
            batch = rows_of(self.space, entity, ids, events, times, sources)
            for partition, frame in frames.encode(self.space, batch, max_rows):
                self._producer.produce(self.space.frames_topic, frame, partition=partition)
            self.counts[entity] += rows
        assert self._producer.flush(30) == 0


def settled(space: Space, bootstrap: str) -> bool:
    """Is every frame folded and committed?"""
    return not unfolded(space, bootstrap)


def prove(space: Space, bootstrap: str, counts: dict[str, int] | None = None) -> list[Verdict]:
    """Every key's count and vectors equal the independent computation, and the sums equal what was sent."""
    verdicts = verify(space, bootstrap)
    for verdict in verdicts:
        assert verdict.differences == 0, verdict
        assert verdict.wrong_counts == 0, verdict
        if counts is not None:
            assert verdict.events == counts[verdict.entity], verdict
    return verdicts
