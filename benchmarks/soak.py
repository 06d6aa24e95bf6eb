"""Is a fold worker's memory bounded, and flat, at full load? One worker for minutes, with more keys than it holds, and its RSS over time.

The keys are Zipf over several times what the slabs hold, and more bytes than RocksDB may cache: keys are evicted, read again and compacted
all the time. Frames are encoded once and sent over and over. A broker of its own, in a folder of its own, deletes them right behind the
worker's progress, so that the disk holds minutes of frames for as long as it takes.
"""

from __future__ import annotations

import itertools
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import click
import numpy as np
from confluent_kafka import ConsumerGroupTopicPartitions, TopicPartition
from confluent_kafka.admin import AlterConfigOpType, ConfigEntry, ConfigResource, ResourceType
from numpy.typing import NDArray
from rich.table import Table

from benchmarks.common import Worker, committed, conditions, console, space_of, worker
from benchmarks.fold import BATCH, DIM, declared
from crossrep import kafka
from crossrep.columnar import frames
from crossrep.columnar.rows import ColumnRows, Rows
from crossrep.errors import CrossrepError
from crossrep.keys import Keys
from crossrep.spec import Space, fold_group
from crossrep.views.view import LocalView
from streams import broker
from streams.broker import server
from streams.stateful.fold_options import FoldOptions
from streams.stateful.memory import memory_bound

MIB = 1 << 20
LEAD = 1500  # frames that the feeder is ahead of the worker's progress: seconds of work, 100 MB
GROWTH = 0.05  # more than that from 20 % of the time to the end is a leak
WINDOW = 15  # samples whose median stands for a moment
# Kafka looks every five minutes for what it may delete, and then waits another one: at full load that is 15 GB.
SPRY = {"log.retention.check.interval.ms": "3000"}
SEGMENTS = {"segment.bytes": str(64 * MIB), "file.delete.delay.ms": "1000"}  # only whole segments are deleted or compacted


@dataclass(frozen=True)
class Load:
    """What is sent."""

    rows: int  # encoded once, then sent over and over
    keys: int
    zipf: float
    rows_per_frame: int
    seed: int

    def ids(self) -> NDArray[np.int64]:
        """The keys of all rows, with the Zipf law over exactly `keys` of them."""
        chances = np.arange(1, self.keys + 1) ** -self.zipf
        return np.random.default_rng(self.seed).choice(self.keys, self.rows, p=chances / chances.sum())

    def frames(self, space: Space) -> Iterator[tuple[int, bytes, int]]:
        """Partition, frame, rows."""
        ids = self.ids()
        pool = np.random.default_rng(self.seed).normal(size=(BATCH, DIM)).astype(np.float32)
        for first in range(0, self.rows, BATCH):
            keys = Keys.of(ids[first : first + BATCH].tolist())
            n = len(keys)
            times = 1.6e9 + np.arange(first, first + n, dtype=np.float64) / 1000
            batch = Rows("user", keys, times, np.ones(n, np.int64), {"cr": ColumnRows(pool[:n], np.ones(n), times, np.ones(n, np.bool_))})
            counts = np.bincount(keys.partitions(space.partitions), minlength=space.partitions).tolist()
            for partition, frame in frames.encode(space, batch, self.rows_per_frame):
                rows = min(self.rows_per_frame, counts[partition])
                counts[partition] -= rows
                yield partition, frame, rows


def feed(space: Space, bootstrap: str, load: Load, stop: Event, sent: Any, starved: Any) -> None:
    """Keep the worker's backlog at LEAD frames until told to stop, and delete what it has committed. Runs in a process of its own.

    Args:
        sent: Value; rows acknowledged, once this ends.
        starved: Value; the share of looks at which the backlog was nearly empty.
    """
    prepared = list(load.frames(space))
    producer, admin = kafka.producer(bootstrap), kafka.admin(bootstrap)
    group = ConsumerGroupTopicPartitions(fold_group(space), [TopicPartition(space.frames_topic, n) for n in range(space.partitions)])
    ends: Counter[int] = Counter()
    rows = looks = empty = 0
    deleted = time.monotonic()
    supply = itertools.cycle(prepared)
    while not stop.is_set():
        found = admin.list_consumer_group_offsets([group])[group.group_id].result(kafka.REQUEST_TIMEOUT).topic_partitions
        done = {part.partition: max(0, part.offset) for part in found}
        lead = sum(ends.values()) - sum(done.values())
        if rows and any(done.values()):
            looks, empty = looks + 1, empty + (lead < LEAD // 10)
        for partition, frame, count in itertools.islice(supply, max(0, LEAD - lead)):
            producer.produce(space.frames_topic, frame, partition=partition)
            ends[partition] += 1
            rows += count
        if producer.flush(kafka.REQUEST_TIMEOUT):
            raise CrossrepError("not all frames were acknowledged")
        if time.monotonic() - deleted > 2 and any(done.values()):
            deleted = time.monotonic()
            before = [TopicPartition(space.frames_topic, n, offset) for n, offset in done.items() if offset]
            for future in admin.delete_records(before).values():
                future.result(kafka.REQUEST_TIMEOUT)
        stop.wait(0.1)
    sent.value, starved.value = rows, empty / max(1, looks)


@contextmanager
def spry_broker(folder: Path) -> Iterator[str]:
    """A broker that deletes at once what it may delete; gone afterwards, with its data."""
    server.SETTINGS.update(SPRY)
    try:
        yield broker.up(folder).bootstrap
    finally:
        broker.down(folder, kill=True)


def keep_small(space: Space, bootstrap: str) -> None:
    """Give the topics that grow small segments, so that deletion and compaction keep up."""
    admin = kafka.admin(bootstrap)
    names = [space.frames_topic, space.history_topic, *(space.representations_topic(entity) for entity in space.entities)]
    entries = [ConfigEntry(key, value, incremental_operation=AlterConfigOpType.SET) for key, value in SEGMENTS.items()]
    resources = [ConfigResource(ResourceType.TOPIC, name, incremental_configs=entries) for name in names]
    for future in admin.incremental_alter_configs(resources).values():
        future.result(kafka.REQUEST_TIMEOUT)


@dataclass(frozen=True)
class Sample:
    """The worker at one moment."""

    seconds: float  # since it first flowed
    rss: int  # bytes
    files: int  # bytes of the RSS that are mapped files: libraries, which the kernel may drop
    rows: float
    keys: float  # in the slabs
    cpu: float  # seconds


def sample(process: Worker, began: float) -> Sample:
    metrics, memory = process.metrics(), process.memory()
    rows, keys = sum(metrics["fold_rows_total"]), sum(metrics["fold_keys_in_memory"])
    return Sample(time.monotonic() - began, memory.rss, memory.shared, rows, keys, process.cpu())


def watch(process: Worker, stores: Path, minutes: float) -> list[Sample]:
    """A sample a second; a line a minute."""
    began = time.monotonic()
    samples = [sample(process, began)]
    told = samples[0]
    for second in range(1, int(minutes * 60) + 1):
        process.wait(lambda due=began + second: time.monotonic() >= due, "the worker under load")  # type: ignore[misc]
        samples.append(now := sample(process, began))
        if second % 60 == 0 or second == int(minutes * 60):
            rate = (now.rows - told.rows) / (now.seconds - told.seconds)
            console.print(
                f"{now.seconds / 60:5.1f} min: {rate:9,.0f} rows/s, RSS {now.rss / MIB:6,.0f} MiB (files {now.files / MIB:.0f}), "
                f"{now.keys:,.0f} keys in memory, stores {_size(stores) / MIB:,.0f} MiB on disk",
                style="dim",
            )
            told = now
    return samples


def _size(folder: Path) -> int:
    """Bytes of all files; RocksDB deletes them as we look."""
    sizes = []
    for path in folder.rglob("*"):
        try:
            sizes.append(path.stat().st_size)
        except FileNotFoundError:
            continue
    return sum(sizes)


def at(samples: list[Sample], seconds: float) -> float:
    """RSS around a moment, bytes: a median, since a flush comes and goes within one sample."""
    middle = int(np.argmin([abs(each.seconds - seconds) for each in samples]))
    first = min(max(0, middle - WINDOW // 2), max(0, len(samples) - WINDOW))
    return float(np.median([each.rss for each in samples[first : first + WINDOW]]))


def slope(samples: list[Sample]) -> tuple[float, float]:
    """Bytes an hour by least squares, and the standard error. Neighbouring samples resemble each other, so the true error is greater."""
    hours, rss = np.array([each.seconds / 3600 for each in samples]), np.array([float(each.rss) for each in samples])
    spread = ((hours - hours.mean()) ** 2).sum()
    steepness = float(((hours - hours.mean()) * (rss - rss.mean())).sum() / spread)
    left = rss - rss.mean() - steepness * (hours - hours.mean())
    return steepness, float(np.sqrt((left**2).sum() / max(1, len(samples) - 2) / spread))


def sparkline(samples: list[Sample], width: int = 100) -> str:
    """RSS over time, from 0 to its maximum, one character for a stretch of time."""
    heights = [np.mean([each.rss for each in part]) for part in np.array_split(np.array(samples, object), min(width, len(samples)))]
    marks, most = "▁▂▃▄▅▆▇█", max(heights)
    return "".join(marks[min(7, int(8 * height / most))] for height in heights)


def soak(space: Space, bootstrap: str, minutes: float, load: Load, folder: Path, *options: str) -> tuple[list[Sample], dict[str, float]]:
    """Run it. Returns the samples, and what is known at the end."""
    context = multiprocessing.get_context("spawn")
    stop, sent, starved = context.Event(), context.Value("q", 0), context.Value("d", 0.0)
    feeder = context.Process(target=feed, args=(space, bootstrap, load, stop, sent, starved), daemon=True)
    with worker(folder, "fold", space.name, "--bootstrap", bootstrap, "--name", "soak", "--data", str(folder), *options) as process:
        process.wait(process.ready, "not ready")
        idle = process.memory().rss
        feeder.start()
        try:
            process.wait(lambda: sum(process.metrics()["fold_rows_total"]) or not feeder.is_alive(), "no row is folded", every=0.2)
            samples = watch(process, folder / space.name, minutes)
        finally:
            stop.set()
            feeder.join(120)
        if feeder.exitcode != 0:
            raise CrossrepError(f"the feeder ended with {feeder.exitcode}; its own message is above")
        process.wait(committed(bootstrap, fold_group(space), [space.frames_topic]), "not all is folded", every=0.1)
        peak = process.peak_rss()
        restored = sum(process.metrics()["fold_restored_records"])
        process.stop()
    with LocalView("user", space.name, bootstrap) as view:
        view.wait(600)
        counted = int(view.get(view.ids()).counts.sum())
    if counted != sent.value:
        raise CrossrepError(f"{sent.value:,} rows were sent, but the representations count {counted:,}")
    return samples, {"idle": idle, "peak": peak, "rows": sent.value, "starved": starved.value, "restored": restored}


@click.command()
@click.option("--minutes", default=10.0, show_default=True, type=click.FloatRange(0.3), help="Below 5, warming up may pass for growth.")
@click.option("--keys", default=1_000_000, show_default=True, help="Over which the load's Zipf law goes.")
@click.option("--zipf", default=0.8, show_default=True, help="Its exponent: the smaller, the more keys are hot.")
@click.option("--pool", default=2_000_000, show_default=True, help="Rows that are encoded once and sent over and over.")
@click.option("--partitions", default=4, show_default=True)
@click.option("--rows-per-frame", default=512, show_default=True)
@click.option("--slots", default=FoldOptions.slots, show_default=True, help="As of crossrep fold.")
@click.option("--rocksdb-mb", default=FoldOptions.rocksdb_mb, show_default=True, help="As of crossrep fold.")
@click.option("--seed", default=0, show_default=True)
def main(
    minutes: float, keys: int, zipf: float, pool: int, partitions: int, rows_per_frame: int, slots: int, rocksdb_mb: int, seed: int
) -> None:
    """Keep one fold worker at full load (64 × float16, exactly once) and watch its memory. Exit 1 if it grew by over 5 % after warming up.

    Starts a broker of its own in a temporary folder. Takes the minutes asked for and about two more, and up to 10 GB of disk.
    """
    about = conditions()
    load = Load(pool, keys, zipf, rows_per_frame, seed)
    held, used = partitions * slots, len(np.unique(load.ids()))
    if used < 1.5 * held:
        raise click.UsageError(
            f"{used:,} keys occur in the pool, but {held:,} fit into memory: more --keys, a larger --pool, a smaller --zipf"
        )
    console.print(f"{used:,} keys over {held:,} slots; {about['cores']} cores, {about['cpu_busy_before']:.0%} busy elsewhere", style="dim")
    folder = Path(tempfile.mkdtemp(prefix="crossrep-soak-"))
    (folder / "data").mkdir()
    try:
        with spry_broker(folder / "kafka") as bootstrap, space_of(declared(partitions, "200ms"), bootstrap) as space:
            keep_small(space, bootstrap)
            bound = memory_bound(space, FoldOptions("soak", folder, slots=slots, rocksdb_mb=rocksdb_mb))
            samples, known = soak(space, bootstrap, minutes, load, folder / "data", "--slots", str(slots), "--rocksdb-mb", str(rocksdb_mb))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    report(samples, known, bound)
    grown = at(samples, samples[-1].seconds) / at(samples, 0.2 * samples[-1].seconds) - 1
    console.print(f"from 20 % of the time to the end, RSS grew by {grown:+.1%}: {'not flat' if grown > GROWTH else 'flat'}")
    last = samples[-1]
    click.echo(
        f"soak: minutes={last.seconds / 60:.1f} rows={known['rows']:.0f} rss_warm_mb={at(samples, 60) / MIB:.0f} "
        f"rss_end_mb={at(samples, last.seconds) / MIB:.0f} rss_max_mb={known['peak'] / MIB:.0f} "
        f"slope_mb_per_hour={slope(samples[len(samples) // 2 :])[0] / MIB:.1f}"
    )
    sys.exit(int(grown > GROWTH))


def report(samples: list[Sample], known: dict[str, float], bound: dict[str, int]) -> None:
    """The table, RSS over time, and the bound beside what was measured."""
    first, last = samples[0], samples[-1]
    steepness, error = slope(samples[len(samples) // 2 :])
    table = Table("what", "figure", "beside", title="soak", box=None, title_justify="left")
    for line in (
        ("RSS idle", f"{known['idle'] / MIB:,.0f} MiB", "ready, before the first frame"),
        ("  warm", f"{at(samples, 60) / MIB:,.0f} MiB", "after a minute"),
        ("  at the end", f"{at(samples, last.seconds) / MIB:,.0f} MiB", f"{last.files / MIB:.0f} MiB of it mapped files"),
        ("  at most", f"{known['peak'] / MIB:,.0f} MiB", f"bound {sum(bound.values()) / MIB:,.0f} MiB"),
        ("  slope", f"{steepness / MIB:+,.1f} ± {error / MIB:.1f} MiB an hour", "second half"),
        ("rows folded", f"{known['rows']:,.0f}", "counted exactly in the representations"),
        ("  a second", f"{(last.rows - first.rows) / (last.seconds - first.seconds):,.0f}", f"{_cores(first, last):.2f} cores busy"),
        ("backlog nearly empty", f"{known['starved']:.0%} of the time", "else full load"),
        ("restored", f"{known['restored']:.0f} records", ""),
    ):
        table.add_row(*line)
    console.print(table)
    console.print(f"RSS from 0 to {max(each.rss for each in samples) / MIB:,.0f} MiB: {sparkline(samples)}")
    console.print("bound: " + ", ".join(f"{part} {size / MIB:,.0f}" for part, size in bound.items()) + " MiB")


def _cores(first: Sample, last: Sample) -> float:
    return (last.cpu - first.cpu) / (last.seconds - first.seconds)


if __name__ == "__main__":
    main()
