"""Archived rows a second that `crossrep training-set` sorts and folds for samples, beside reading the same Parquet. No Kafka."""

from __future__ import annotations

import tempfile
import time
from statistics import median

import click
import numpy as np

from benchmarks.common import conditions, console, report
from benchmarks.fold import declared, draw_users
from benchmarks.replay import bare, fill
from crossrep.archive.store import Archive
from crossrep.control.cuts import Cut
from crossrep.keys import Keys
from crossrep.spec import Space
from crossrep.training.sweep import Moments, Used, attach, unknown


def answer(archive: Archive, space: Space, moments: Moments, memory: int) -> tuple[float, Used]:
    """Seconds to answer all moments."""
    cut = Cut(id="", groups={}, ends=archive.progress("user"), skipped={})
    began, used = time.perf_counter(), Used()
    known = unknown(space.entities["user"], len(moments.keys))
    partitions = moments.keys.partitions(space.partitions)
    for number in range(space.partitions):
        here = np.flatnonzero(partitions == number)
        asked = Moments(moments.keys.take(here), moments.before[here], moments.at[here])
        attach(archive, cut, "user", number, asked, known, here, used, memory)
    assert int((known.counts > 0).sum()) > len(moments.keys) // 2
    return time.perf_counter() - began, used


@click.command()
@click.option("--rows", default=4_000_000, show_default=True)
@click.option("--samples", default=1_000_000, show_default=True)
@click.option("--users", default=100_000, show_default=True)
@click.option("--zipf", default=1.2, show_default=True, help="0: all users alike.")
@click.option("--partitions", default=4, show_default=True)
@click.option("--memory-mb", default=1024, show_default=True)
@click.option("--runs", default=3, show_default=True, help="Medians are reported.")
@click.option("--seed", default=0, show_default=True)
def main(rows: int, samples: int, users: int, zipf: float, partitions: int, memory_mb: int, runs: int, seed: int) -> None:
    """Attach to samples of the same users and times, alternating with a bare reader of the archive's files. One thread."""
    about = {**conditions(), "rows": rows, "samples": samples, "users": users, "zipf": zipf, "partitions": partitions, "runs": runs}
    space = Space.from_dict({**declared(partitions, "200ms"), "name": "bench"})
    random = np.random.default_rng(seed + 1)
    times = 1.6e9 + np.sort(random.integers(0, rows, samples)) / 1000
    moments = Moments(Keys.of(draw_users(random, samples, users, zipf)), times, times)
    bares, answers = [], []
    with tempfile.TemporaryDirectory() as folder:
        archive = Archive(folder, space.name)
        fill(archive, space, rows, users, zipf, seed)
        answer(archive, space, moments, memory_mb << 20)  # compiles, and has the files in the page cache
        for run in range(runs):
            bares.append(bare(archive, 1))
            seconds, used = answer(archive, space, moments, memory_mb << 20)
            answers.append(seconds)
            console.print(f"run {run + 1}: {rows / seconds:,.0f} rows/s in {used.passes} passes; bare {rows / bares[-1]:,.0f}", style="dim")
    limit, rate = rows / median(bares), rows / median(answers)
    lines = [
        ("bare reader", f"{limit:,.0f} rows/s", "one thread"),
        ("attach", f"{rate:,.0f} rows/s", f"{rate / limit:.0%} of the bare reader; {samples / median(answers):,.0f} samples/s"),
    ]
    figures = {"rows_per_s": rate, "samples_per_s": samples / median(answers), "bare_rows_per_s": limit, "ratio_to_bare": rate / limit}
    report(f"attach: {rows:,} rows, {samples:,} samples, median of {runs}", lines, {**about, **figures})


if __name__ == "__main__":
    main()
