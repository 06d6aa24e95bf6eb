"""Runs one peer: `run(name, bootstrap, rows)`. Every run is checked: the engine's changelog must count every row."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from benchmarks.common import committed
from benchmarks.peers import kafka_streams, quix, workload
from benchmarks.peers.process import process
from benchmarks.peers.workload import Load
from crossrep.errors import CrossrepError

# Name -> what it is, in words.
PEERS = {
    "kafka-streams": "records, at least once, defaults",
    "kafka-streams-once": "records, exactly_once_v2, defaults",
    "kafka-streams-best": "records, at least once, 256 MB cache, 30 s commit, 2 threads, big polls",
    "kafka-streams-once-best": "records, exactly_once_v2, 256 MB cache, 10 s commit, 2 threads, big polls",
    "kafka-streams-frames": "our frames, its own stores, exactly_once_v2, defaults",
    "kafka-streams-frames-best": "our frames, its own stores, exactly_once_v2, 2 threads, 256 MB cache, 10 s commit",
    "kafka-streams-heap-200ms": "our frames, a hand-made heap cache, exactly_once_v2, 2 threads, 200 ms commit",
    "kafka-streams-heap-1s": "the same, 1 s commit",
    "kafka-streams-heap-10s": "the same, 10 s commit",
    "quix": "records, at least once, defaults (5 s commit)",
    "quix-once": "records, exactly once, defaults (5 s commit)",
    "faust": "records, at least once, a Table with RocksDB, 0.5 s commit",
}
MOST_ROWS = {"quix": 300_000, "quix-once": 300_000, "faust": 20_000}  # they are slow: more would take minutes and say the same


def rows_for(name: str, rows: int) -> int:
    """How many of these rows a peer is given."""
    return min(rows, MOST_ROWS.get(name, rows))


def takes_frames(name: str) -> bool:
    """Does it read frames, not one record per sample?"""
    return name in kafka_streams.SETUPS and kafka_streams.SETUPS[name].takes_frames


def topic_for(name: str, bootstrap: str, load: Load) -> AbstractContextManager[str]:
    """A preloaded topic of the kind this peer reads; deleted again."""
    return (workload.frames_topic if takes_frames(name) else workload.records_topic)(bootstrap, load)


def prepare(name: str) -> None:
    """Fetch, compile or install what a peer needs; nothing the second time."""
    if name in kafka_streams.SETUPS:
        kafka_streams.prepare()
    elif name in quix.GUARANTEES:
        quix.prepare()


def run(name: str, bootstrap: str, rows: int, topic: str | None = None) -> dict[str, float]:
    """Drain a topic with one peer, in a process of its own with an empty disk, from its first row until all is committed.

    Args:
        rows: how many there are in `topic`; without one, a topic of so many is written first (`rows_for` says how many are wise).

    Raises:
        CrossrepError: it failed, or its changelog does not count every row once.
    """
    if topic is None:
        with topic_for(name, bootstrap, Load(rows)) as written:
            return run(name, bootstrap, rows, written)
    prepare(name)
    application = workload.unique(name)
    done = committed(bootstrap, application, [topic])
    with _folder() as folder:
        try:
            with process(_command(name, bootstrap, topic, application, rows, folder), folder) as program:
                program.wait(lambda: program.first() is not None, f"{name} has no first row", 120)
                before, first = program.cpu(), program.first() or 0.0
                program.wait(done, f"{name} has not committed all")
                ended, cpu, peak = time.time(), program.cpu(), program.peak_rss()
                program.stop()
            counted, records = workload.counted(bootstrap, workload.changelogs(bootstrap, application))
        finally:
            workload.forget(bootstrap, application)
    if counted != rows:
        raise CrossrepError(f"{rows} rows were written, but the changelog of {name} counts {counted}")
    million = rows / 1e6
    return {
        "rows": rows,
        "seconds": ended - first,
        "rows_per_s": rows / (ended - first),
        "with_start_seconds": ended - program.started,
        "cpu_seconds_per_million": (cpu - before) / million,
        "cpu_seconds_with_start": cpu,
        "records_per_million": records / million,
        "peak_rss_mb": peak / 2**20,
    }


def _command(name: str, bootstrap: str, topic: str, application: str, rows: int, folder: Path) -> list[str]:
    if name in kafka_streams.SETUPS:
        return kafka_streams.command(name, bootstrap, topic, application, rows, folder)
    if name in quix.GUARANTEES:
        return quix.command(name, bootstrap, topic, application, rows, folder)
    return [sys.executable, "-m", "benchmarks.peers.faust_program", bootstrap, topic, application, str(folder / "state")]


@contextmanager
def _folder() -> Iterator[Path]:
    # Only a JVM that was killed leaves something that is still being written.
    with tempfile.TemporaryDirectory(prefix="crossrep-peer-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)
