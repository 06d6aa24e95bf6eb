"""Rows a second through one fold worker, from frames to committed representations, beside a bare consumer of the same frames."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.common import cluster, committed, conditions, console, drain, in_process, middle, report, space_of, worker
from crossrep import kafka
from crossrep.cli import bootstrap_option
from crossrep.columnar import frames
from crossrep.columnar.aggregates import combine
from crossrep.columnar.records import RecordLayout
from crossrep.columnar.rows import ColumnRows, Rows
from crossrep.errors import CrossrepError
from crossrep.keys import Keys
from crossrep.spec import Space, fold_group
from crossrep.views.view import LocalView

DIM = 64
BATCH = 65_536  # rows made at once


def declared(partitions: int, flush: str, dim: int = DIM) -> dict[str, Any]:
    """A space of one entity with one decayed mean."""
    column = {"source": "cr", "dim": dim, "aggregate": "decayed_mean", "half_life": "3d"}
    return {"partitions": partitions, "flush": flush, "entities": {"user": {"columns": {"cr": column}}}}


def draw_users(random: np.random.Generator, n: int, users: int, zipf: float) -> list[int]:
    """Who did what: Zipf's law over `users`, or all alike if its exponent is 0."""
    return (random.zipf(zipf, n) % users if zipf else random.integers(0, users, n)).tolist()  # type: ignore[no-any-return]


def preload(space: Space, bootstrap: str, rows: int, users: int, zipf: float, rows_per_frame: int, seed: int, combined: int = 0) -> int:
    """Write rows as frames; returns how many frames. Vectors come from one pool: nothing that is measured looks at values.

    Args:
        combined: so many events at a time have those of one user merged, as `crossrep infer` does with its batches; 0: none are.
    """
    random = np.random.default_rng(seed)
    pool = random.normal(size=(BATCH, space.sources["cr"])).astype(np.float32)
    producer, sent = kafka.producer(bootstrap), 0
    for first in range(0, rows, BATCH):
        n = min(BATCH, rows - first)
        keys = Keys.of(draw_users(random, n, users, zipf))
        times = 1.6e9 + np.arange(first, first + n, dtype=np.float64) / 1000
        column = ColumnRows(pool[:n], np.ones(n), times, np.ones(n, np.bool_))
        batch = Rows("user", keys, times, np.ones(n, np.int64), {"cr": column})
        for at in range(0, n, combined or n):
            part = combine(space, batch.take(np.arange(at, min(at + combined, n)))) if combined else batch
            for partition, frame in frames.encode(space, part, rows_per_frame):
                producer.produce(space.frames_topic, frame, partition=partition)
                sent += 1
        if first // BATCH % 8 == 7:
            producer.flush(60)  # its queue holds 1 GiB
    if producer.flush(60):
        raise CrossrepError("not all frames were acknowledged")
    return sent


def fold(space: Space, bootstrap: str, rows: int, *options: str) -> dict[str, float]:
    """Drain all frames with one worker that has an empty disk, and check that every row was counted once."""
    done = committed(bootstrap, fold_group(space), [space.frames_topic])
    with tempfile.TemporaryDirectory() as folder:
        with worker(Path(folder), "fold", space.name, "--bootstrap", bootstrap, "--name", "bench", "--data", folder, *options) as process:
            flowing = process.wait(lambda: process.logged(r"partition \d+ flows"), "no partition flows")
            cpu = process.cpu()
            process.wait(done, "not all is folded", max(600.0, rows / 10_000))
            ended, cpu = time.time(), process.cpu() - cpu
            metrics, peak = process.metrics(), process.peak_rss()
            process.stop()
        with LocalView("user", space.name, bootstrap) as view:
            view.wait(600)
            ids = view.ids()
            counted = sum(int(view.get(ids[first : first + BATCH]).counts.sum()) for first in range(0, len(ids), BATCH))
    if counted != rows:
        raise CrossrepError(f"{rows} rows were written, but the representations count {counted}")
    million = rows / 1e6
    records = sum(metrics["fold_records_total"]) / million
    key = sum(map(len, ids)) / len(ids)
    return {
        "seconds": ended - flowing,
        "rows_per_s": rows / (ended - flowing),
        "with_start_seconds": ended - process.started,
        "cpu_seconds_per_million": cpu / million,
        "records_per_million": records,
        "record_bytes_per_million": records * (RecordLayout(space, "user").size + key),
        "keys": len(ids),
        "flushes": sum(metrics["fold_flushes_total"]),
        "peak_rss_mb": peak / 2**20,
    }


def warm_up(bootstrap: str) -> None:
    """Fold a million rows that do not count: a broker that has just started spends half a core on compiling itself."""
    with space_of(declared(4, "200ms"), bootstrap) as space:
        preload(space, bootstrap, 1_000_000, 100_000, 1.2, 1024, 0)
        fold(space, bootstrap, 1_000_000)


@click.command()
@click.option("--rows", default=2_000_000, show_default=True)
@click.option("--users", default=100_000, show_default=True)
@click.option("--zipf", default=1.2, show_default=True, help="Exponent of the users' activity; 0: all alike.")
@click.option("--partitions", default=4, show_default=True)
@click.option("--rows-per-frame", default=1024, show_default=True)
@click.option("--combined", default=0, help="Events of which those of one user are merged before they are framed.  [default: none are]")
@click.option("--flush", default="200ms", show_default=True, help="The space's flush interval.")
@click.option("--slots", type=int, help="Keys that the worker holds in memory, a partition.  [default: as crossrep fold]")
@click.option("--runs", default=3, show_default=True, help="Medians are reported.")
@click.option("--seed", default=0, show_default=True)
@bootstrap_option
def main(
    rows: int,
    users: int,
    zipf: float,
    partitions: int,
    rows_per_frame: int,
    combined: int,
    flush: str,
    slots: int | None,
    runs: int,
    seed: int,
    bootstrap: str | None,
) -> None:
    """Fold rows of 64 float16 with one worker, alternating with a bare consumer of the same topic.

    From the moment the first partition flows until the last frame is committed, with an empty disk and new topics in each run.
    """
    about = {**conditions(), "rows": rows, "users": users, "zipf": zipf, "partitions": partitions, "flush": flush, "combined": combined}
    about |= {"slots": slots, "runs": runs}
    drained, folded = [], []
    with cluster(bootstrap) as address:
        warm_up(address)
        for run in range(runs):
            with space_of(declared(partitions, flush), address) as space:
                written = preload(space, address, rows, users, zipf, rows_per_frame, seed, combined)
                drained.append(in_process(drain, address, [space.frames_topic]))
                folded.append(fold(space, address, rows, *(("--slots", str(slots)) if slots else ())))
            console.print(f"run {run + 1}: {folded[-1]['rows_per_s']:,.0f} rows/s; bare {rows / drained[-1]['seconds']:,.0f}", style="dim")
    bare, mine = middle(drained), middle(folded)
    limit = rows / bare["seconds"]
    cores = mine["cpu_seconds_per_million"] * mine["rows_per_s"] / 1e6
    lines = [
        ("bare consumer", f"{limit:,.0f} rows/s", f"{bare['bytes'] / bare['seconds'] / 1e6:,.0f} MB/s, {bare['messages']:,.0f} frames"),
        ("fold worker", f"{mine['rows_per_s']:,.0f} rows/s", f"{mine['rows_per_s'] / limit:.0%} of the bare consumer"),
        ("  its CPU", f"{mine['cpu_seconds_per_million']:.2f} s per million rows", f"{cores:.2f} of {about['cores']} cores busy"),
        ("  changelog records", f"{mine['records_per_million']:,.0f} per million rows", f"{mine['flushes']:.0f} transactions"),
        ("  memory", f"{mine['peak_rss_mb']:,.0f} MiB at most", f"{users:,} users at most"),
        ("  with process start", f"{mine['with_start_seconds']:.1f} s", f"{mine['seconds']:.1f} s from the first frame on"),
        ("rows counted", f"{rows:,}", "exactly, in every run"),
    ]
    report(
        f"fold: {rows:,} rows, median of {runs}",
        lines,
        {
            **about,
            **mine,
            "frames": written,
            "bare_rows_per_s": limit,
            "bare_cpu_seconds_per_million": bare["cpu"] / rows * 1e6,
            "ratio_to_bare": mine["rows_per_s"] / limit,
            "every_run_rows_per_s": [round(run["rows_per_s"]) for run in folded],
        },
    )


if __name__ == "__main__":
    main()
