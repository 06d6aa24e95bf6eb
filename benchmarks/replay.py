"""Rows a second that `crossrep replay` folds from an archive, beside reading the same Parquet and doing nothing with it. No Kafka."""

from __future__ import annotations

import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from statistics import median

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.common import conditions, console, report
from benchmarks.fold import BATCH, DIM, declared, draw_users
from crossrep.archive import columns
from crossrep.archive.columns import Frame
from crossrep.archive.store import About, Archive
from crossrep.columnar import frames
from crossrep.columnar.rows import Rows
from crossrep.rollout import replay_archive, replay_tables
from crossrep.snapshots.store import Replayed, Store
from crossrep.spec import Space
from crossrep.writer import rows_of

FILE_ROWS = 500_000
FRAME_ROWS = 512


def fill(store: Archive, space: Space, rows: int, users: int, zipf: float, seed: int) -> float:
    """Write an archive as `crossrep archive` does; seconds that making the files took."""
    random = np.random.default_rng(seed)
    store.begin(About(space=space.name, spec_hash=space.hash.hex(), spec=space.toml_dict, topic_id="none"))
    pool = random.normal(size=(BATCH, DIM)).astype(np.float32)
    waiting: dict[int, list[Frame]] = {number: [] for number in range(space.partitions)}
    offsets, seconds = dict.fromkeys(waiting, 0), 0.0

    def publish(number: int) -> float:
        found, waiting[number] = waiting[number], []
        began = time.perf_counter()
        data = columns.encoded(space, "user", number, found)
        store.put(store.path("user", number, found[0].offset, offsets[number], 1.7e9), data)
        return time.perf_counter() - began

    for first in range(0, rows, BATCH):
        n = min(BATCH, rows - first)
        ids = draw_users(random, n, users, zipf)
        events = np.where(random.random(n) < 0.1, "click", "impression")
        batch: Rows = rows_of(space, "user", ids, events, 1.6e9 + (first + np.arange(n)) / 1000, {"cr": pool[:n]})
        for number, value in frames.encode(space, batch, FRAME_ROWS):
            decoded = frames.decode(space, value, partition=number)
            waiting[number].append(Frame(decoded, frames.vectors_as_sent(value), offsets[number], 1.7e9, None))
            offsets[number] += 1
            if sum(len(frame.rows) for frame in waiting[number]) >= FILE_ROWS:
                seconds += publish(number)
    return seconds + sum(publish(number) for number in waiting if waiting[number])


def bare(store: Archive, threads: int) -> float:
    """Seconds to read every column of every file, in as many threads."""

    def read(path: str) -> None:
        with pa.memory_map(path) as file:
            opened = pq.ParquetFile(file)
            for group in range(opened.num_row_groups):
                opened.read_row_group(group, use_threads=False)

    began = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, (file.path for file in store.files("user"))))
    return time.perf_counter() - began


def replay(store: Archive, space: Space, threads: int) -> tuple[float, float]:
    """Seconds to fold, and seconds to write the snapshot."""
    source = replay_archive.of_archive(store, space, None)
    began = time.perf_counter()
    tables = replay_tables.fold(space, source.tasks, threads)
    folded = time.perf_counter() - began
    assert int(tables["user"].state.count.sum()) == source.rows
    with tempfile.TemporaryDirectory() as folder:
        replay_tables.publish(Store(folder, space.name), space, tables, Replayed(source=store.root, cut=None))
    return folded, time.perf_counter() - began - folded


@click.command()
@click.option("--rows", default=5_000_000, show_default=True)
@click.option("--users", default=100_000, show_default=True)
@click.option("--zipf", default=1.2, show_default=True, help="0: all users alike.")
@click.option("--partitions", default=4, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--runs", default=3, show_default=True, help="Medians are reported.")
@click.option("--seed", default=0, show_default=True)
def main(rows: int, users: int, zipf: float, partitions: int, threads: int, runs: int, seed: int) -> None:
    """Replay an archive of uncombined rows of 64 float16, alternating with a bare reader of the same files."""
    about = {**conditions(), "rows": rows, "users": users, "zipf": zipf, "partitions": partitions, "threads": threads, "runs": runs}
    space = Space.from_dict({**declared(partitions, "200ms"), "name": "bench"})
    bares, folds, writes = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        store = Archive(folder, space.name)
        written = fill(store, space, rows, users, zipf, seed)
        size = sum(store.fs.size(file.path) for file in store.files("user"))
        replay(store, space, threads)  # compiles, and has the files in the page cache
        for run in range(runs):
            bares.append(bare(store, threads))
            folded, saved = replay(store, space, threads)
            folds.append(folded)
            writes.append(saved)
            console.print(f"run {run + 1}: {rows / folded:,.0f} rows/s; bare {rows / bares[-1]:,.0f}", style="dim")
    limit, rate = rows / median(bares), rows / median(folds)
    lines = [
        ("bare reader", f"{limit:,.0f} rows/s", f"{size / median(bares) / 1e6:,.0f} MB/s, {threads} threads"),
        ("replay", f"{rate:,.0f} rows/s", f"{rate / limit:.0%} of the bare reader"),
        ("  and its snapshot", f"{median(writes):.2f} s", ""),
        ("archive files", f"{size / rows:.0f} MB a million rows", f"made at {rows / written:,.0f} rows/s, one thread"),
    ]
    figures = {"rows_per_s": rate, "bare_rows_per_s": limit, "ratio_to_bare": rate / limit, "snapshot_seconds": median(writes)}
    report(
        f"replay: {rows:,} rows, median of {runs}",
        lines,
        {**about, **figures, "bytes_per_row": size / rows, "encode_rows_per_s": rows / written},
    )


if __name__ == "__main__":
    main()
