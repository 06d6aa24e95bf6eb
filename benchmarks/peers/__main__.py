"""Other engines doing the work of the fold, side by side: python -m benchmarks.peers."""

from __future__ import annotations

from contextlib import ExitStack

import click

from benchmarks.common import cluster, conditions, console, middle, report
from benchmarks.peers import engines
from benchmarks.peers.workload import Load
from crossrep.cli import bootstrap_option


@click.command()
@click.option("--rows", default=1_000_000, show_default=True, help=f"For each peer; the slow ones get fewer: {engines.MOST_ROWS}.")
@click.option("--only", multiple=True, type=click.Choice(list(engines.PEERS)), help="These peers; may be repeated. Default: all.")
@click.option("--users", default=100_000, show_default=True)
@click.option("--zipf", default=1.2, show_default=True, help="Exponent of the users' activity.")
@click.option("--rows-per-frame", default=1024, show_default=True)
@click.option("--runs", default=3, show_default=True, help="Medians are reported.")
@click.option("--seed", default=0, show_default=True)
@bootstrap_option
def main(
    rows: int, only: tuple[str, ...], users: int, zipf: float, rows_per_frame: int, runs: int, seed: int, bootstrap: str | None
) -> None:
    """Drain the same rows with each peer in turn, run after run: decayed mean of 64 floats per key, RocksDB, changelog in Kafka.

    From a peer's first row until everything is committed, with an empty disk in each run. JVMs have 2 GB of heap. A peer whose commit
    interval is longer than its run commits once, at the end, and writes each key once: give those more rows.
    """
    names = list(only or engines.PEERS)
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    about = {**conditions(), "rows": rows, "users": users, "zipf": zipf, "rows_per_frame": rows_per_frame, "runs": runs}
    for name in names:
        engines.prepare(name)
    with cluster(bootstrap) as address, ExitStack() as stack:
        topics: dict[tuple[bool, int], str] = {}
        for name in names:
            kind = engines.takes_frames(name), engines.rows_for(name, rows)
            if kind not in topics:
                load = Load(kind[1], users, zipf, seed, rows_per_frame)
                topics[kind] = stack.enter_context(engines.topic_for(name, address, load))
        for number in range(runs):
            for name in names:
                kind = engines.takes_frames(name), engines.rows_for(name, rows)
                run = engines.run(name, address, kind[1], topics[kind])
                figures[name].append(run)
                console.print(f"run {number + 1}: {name} {run['rows_per_s']:,.0f} rows/s", style="dim")
    medians = {name: middle(found) for name, found in figures.items()}
    lines = [(name, f"{found['rows_per_s']:,.0f} rows/s", _beside(name, found)) for name, found in medians.items()]
    every = {name: [round(run["rows_per_s"]) for run in found] for name, found in figures.items()}
    report(f"peers: {rows:,} rows, median of {runs}", lines, {**about, "peers": medians, "every_run_rows_per_s": every})


def _beside(name: str, found: dict[str, float]) -> str:
    return (
        f"{found['cpu_seconds_per_million']:.2f} s CPU and {found['records_per_million']:,.0f} changelog records per million rows; "
        f"{found['peak_rss_mb']:,.0f} MiB; with start {found['with_start_seconds']:.1f} s; {engines.PEERS[name]}"
    )


if __name__ == "__main__":
    main()
