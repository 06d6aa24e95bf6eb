"""What the benchmarks share: a broker, spaces that go when they are done, worker processes that can be watched, and the report."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import platform
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

import click
import psutil
from confluent_kafka import ConsumerGroupTopicPartitions, TopicPartition
from rich.console import Console
from rich.table import Table

from crossrep import kafka
from crossrep.errors import CrossrepError
from crossrep.spec import Space
from streams import broker, topics

ROOT = Path(__file__).parent.parent
console = Console(width=None if sys.stdout.isatty() else 120)
_numbers = itertools.count()


@contextmanager
def cluster(bootstrap: str | None) -> Iterator[str]:
    """The cluster to measure: the one named, or this machine's own broker, stopped again if it was not running."""
    if bootstrap or "KAFKA_BOOTSTRAP" in os.environ:
        yield kafka.bootstrap_servers(bootstrap)
        return
    folder = kafka.home() / "kafka"
    running = broker.status(folder)
    address = (running or broker.up(folder)).bootstrap
    try:
        yield address
    finally:
        if running is None:
            broker.down(folder)


@contextmanager
def space_of(declared: dict[str, Any], bootstrap: str) -> Iterator[Space]:
    """A space of its own with input topics of its own; deleted again."""
    name = f"bench-{os.getpid()}-{next(_numbers)}"
    inputs = {"impressions": "impressions", "clicks": "clicks", "user_features": "users", "item_features": "items"}
    space = Space.from_dict({**declared, "name": name, "inputs": {field: f"{name}.{topic}" for field, topic in inputs.items()}})
    topics.create(space, bootstrap)
    try:
        yield space
    finally:
        admin = kafka.admin(bootstrap)
        for future in admin.delete_topics([topic.name for topic in topics.plan(space)]).values():
            future.result(kafka.REQUEST_TIMEOUT)
        producer = kafka.producer(bootstrap)
        for control in topics.CONTROL:
            producer.produce(control.name, None, name)
        producer.flush(kafka.REQUEST_TIMEOUT)


class Process:
    """A program under measurement: started, watched, killed. Its output goes to `log`."""

    def __init__(self, command: list[str], log: Path, folder: Path = ROOT, stdin: int | None = None):
        self.log = log
        self.started = time.time()
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with log.open("wb") as out:
            self._process = subprocess.Popen(command, stdin=stdin, stdout=out, stderr=out, cwd=folder, env=environment)
        self._watched = psutil.Process(self._process.pid)

    def wait(self, done: Callable[[], Any], what: str, timeout: float = 600.0, every: float = 0.02) -> Any:
        """What `done` returns once it is true.

        Raises:
            CrossrepError: the program ended, or it took too long.
        """
        deadline = time.monotonic() + timeout
        while not (result := done()):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise CrossrepError(f"{what}: the program ended or took over {timeout:.0f} s:\n{self.log.read_text()[-3000:]}")
            time.sleep(every)
        return result

    def cpu(self) -> float:
        """CPU seconds used so far, all threads."""
        times = self._watched.cpu_times()
        return float(times.user + times.system)

    def memory(self) -> Any:
        """What it has now, in bytes: `rss`, and of that `shared`, mapped files."""
        return self._watched.memory_info()

    def peak_rss(self) -> int:
        """Bytes, the most this process ever had; where Linux does not tell, what it has now."""
        with suppress(OSError):
            peak = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{self._watched.pid}/status").read_text())
            if peak:
                return int(peak[1]) * 1024
        return int(self._watched.memory_info().rss)

    def kill(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


class Worker(Process):
    """One `crossrep` worker process."""

    def __init__(self, folder: Path, args: list[str]):
        self.port = broker.free_port()
        command = [sys.executable, "-m", "crossrep", *args, "--port", str(self.port)]
        super().__init__(command, folder / f"{args[0]}-{next(_numbers)}.log")

    def logged(self, pattern: str) -> float | None:
        """When (seconds since 1970) the worker first logged a line with this pattern; None if it has not."""
        found = re.search(rf"^(\S+ \S+) \S .*{pattern}", self.log.read_text(), re.MULTILINE)
        return datetime.strptime(found[1], "%Y-%m-%d %H:%M:%S,%f").timestamp() if found else None

    def ready(self) -> bool:
        with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{self.port}/ready", timeout=2):
            return True
        return False

    def metrics(self) -> dict[str, list[float]]:
        """Values by name, one for each partition, without the prefix `crossrep_`."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=10) as response:
            text = response.read().decode()
        values: dict[str, list[float]] = {}
        for name, value in re.findall(r"^crossrep_(\w+)(?:\{.*\})? (\S+)$", text, re.MULTILINE):
            values.setdefault(name, []).append(float(value))
        return values

    def stop(self) -> None:
        """SIGTERM, and wait: a worker flushes and leaves."""
        self._process.terminate()
        self._process.wait(60)


@contextmanager
def worker(folder: Path, *args: str) -> Iterator[Worker]:
    """Run `crossrep ARGS`; whatever is left of it in the end is killed."""
    running = Worker(folder, list(args))
    try:
        yield running
    finally:
        running.kill()


def committed(bootstrap: str, group: str, inputs: list[str], transactions: bool = False) -> Callable[[], bool]:
    """Says, within milliseconds, whether the group has committed all that is in these topics now. (`verify.unfolded` takes over a second.)

    Args:
        transactions: the topics were written in transactions, so that the last offset is a marker, which nobody consumes.
    """
    client, admin = kafka.consumer(bootstrap), kafka.admin(bootstrap)
    ends = {}
    for topic in inputs:
        for number in client.list_topics(topic, timeout=kafka.REQUEST_TIMEOUT).topics[topic].partitions:
            ends[topic, number] = max(0, kafka.watermarks(client, topic, number)[1] - transactions)
    client.close()
    asked = ConsumerGroupTopicPartitions(group, [TopicPartition(topic, number) for topic, number in ends])

    def done() -> bool:
        found = admin.list_consumer_group_offsets([asked])[group].result(kafka.REQUEST_TIMEOUT).topic_partitions
        return all(part.offset >= ends[part.topic, part.partition] or ends[part.topic, part.partition] == 0 for part in found)

    return done


def in_process(call: Callable[..., Any], *args: Any) -> Any:
    """The result of a call in a fresh process, so that nothing shares its interpreter lock."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(call, args)


def drain(bootstrap: str, names: list[str], sink: str = "", records: int = 0, size: int = 0) -> dict[str, float]:
    """A bare, well-tuned, read_committed consumer reads topics from beginning to end and drops every message: the limit of any reader.

    Args:
        sink: also write `records` records of `size` bytes to this topic, evenly over what is read: the limit of whoever writes as much.
    """
    client = kafka.consumer(bootstrap, config=kafka.ENDS)
    producer = kafka.producer(bootstrap) if records else None
    parts = [
        TopicPartition(name, n, 0)
        for name in names
        for n in client.list_topics(name, timeout=kafka.REQUEST_TIMEOUT).topics[name].partitions
    ]
    total = sum(kafka.watermarks(client, part.topic, part.partition)[1] for part in parts)
    messages = read = written = 0
    left = {(part.topic, part.partition) for part in parts}
    cpu, started = time.process_time(), time.monotonic()
    client.assign(parts)
    while left:
        for message in client.consume(1000, 0.01):
            if message.error() is None:
                messages, read = messages + 1, read + len(message.value())
            elif kafka.is_end(message):
                left.discard((message.topic(), message.partition()))
            else:
                raise CrossrepError(message.error().str())
        due = records if not left else records * messages // max(1, total)
        if producer is not None and due > written:
            batch = [{"key": b"%d" % n, "value": bytes(size)} for n in range(written, due)]
            for first in range(0, len(batch), 50_000):
                producer.produce_batch(sink, batch[first : first + 50_000])
                producer.poll(0)
            written = due
    if producer is not None and producer.flush(60):
        raise CrossrepError("not all records were acknowledged")
    figures = {"messages": messages, "bytes": read, "seconds": time.monotonic() - started, "cpu": time.process_time() - cpu}
    client.close()
    return figures


def middle(runs: list[dict[str, float]]) -> dict[str, float]:
    """The median of every figure over the runs."""
    return {name: median(run[name] for run in runs) for name in runs[0]}


def conditions() -> dict[str, Any]:
    """What the figures depend on: the machine, and the load it already has."""
    busy = psutil.cpu_percent(1.0) / 100
    return {"machine": machine(), "cores": os.cpu_count(), "cpu_busy_before": busy, "python": platform.python_version()}


def machine() -> str:
    """Its processor and memory, in words."""
    model = platform.processor() or platform.machine()
    with suppress(OSError):
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
        model = found[1] if found else model
    return f"{psutil.cpu_count()} cores, {model}, {psutil.virtual_memory().total / 2**30:.0f} GiB"


def report(title: str, lines: list[tuple[str, str, str]], figures: dict[str, Any] | None) -> None:
    """Print a table of (what, figure, beside it), then all figures, if any, as one line of JSON."""
    table = Table("what", "figure", "beside", title=title, box=None, title_justify="left")
    for line in lines:
        table.add_row(*line)
    console.print(table)
    if figures is not None:
        click.echo(json.dumps(figures, default=lambda value: round(value, 4)))
