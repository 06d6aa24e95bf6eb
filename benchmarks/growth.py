"""How the cost of a row grows along each axis: python -m benchmarks.growth. Drawn by benchmarks.plots."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
from rich.progress import Progress
from rich.table import Table

from benchmarks import fold, plots
from benchmarks.common import cluster, conditions, console, middle, space_of
from crossrep.cli import bootstrap_option

AXES = ("keys", "dims", "rows_per_frame", "skew", "partitions")
FLUSH = "200ms"

Figures = dict[str, float]


@dataclass(frozen=True)
class Case:
    """What is folded: the base case, but for what is given. Cases of several axes that are the same are measured once."""

    rows: int
    users: int = 100_000
    zipf: float = 1.2
    dim: int = fold.DIM
    rows_per_frame: int = 1024
    partitions: int = 4


def cases(rows: int, far: bool) -> dict[str, dict[float, Case]]:
    """Axis -> value on it -> case."""
    base = Case(rows)
    # Two rows a key, or fewer than six in seven of a million keys would occur at all.
    keys: dict[float, Case] = {
        n: replace(base, rows=rows * max(1, n // 500_000), users=n, zipf=0) for n in [10**4, 10**5, 10**6, *[10**7] * far]
    }
    return {
        "keys": keys,
        "dims": {n: replace(base, dim=n) for n in (32, 64, 128, 256, 512)},
        "rows_per_frame": {n: replace(base, rows_per_frame=n) for n in (32, 128, 512, 1024, 4096)},
        "skew": {zipf: replace(base, zipf=zipf) for zipf in (0, 1.1, 1.2, 1.5, 2.0)},
        "partitions": {n: replace(base, partitions=n) for n in (1, 2, 4, 8, 16, 32)},
    }


def measure(bootstrap: str, case: Case, seed: int) -> Figures:
    """Fold one case once, with new topics and an empty disk."""
    with space_of(fold.declared(case.partitions, FLUSH, case.dim), bootstrap) as space:
        sent = fold.preload(space, bootstrap, case.rows, case.users, case.zipf, case.rows_per_frame, seed)
        found = fold.fold(space, bootstrap, case.rows)
    # Frames end with their partition's share of what was made at once, and before frames.MAX_BYTES: fewer rows than asked for.
    return {**found, "rows_per_frame": case.rows / sent}


def point(value: float, case: Case, runs: list[Figures]) -> dict[str, Any]:
    """One case's medians, and what is drawn of every run."""
    found = middle(runs)
    return {
        "value": value,
        "rows": case.rows,
        "keys": round(found["keys"]),
        "rows_per_frame": round(found["rows_per_frame"], 1),
        "rows_per_s": round(found["rows_per_s"]),
        "cpu_us_per_row": round(found["cpu_seconds_per_million"], 3),
        "records_per_million": round(found["records_per_million"]),
        "record_bytes_per_million": round(found["record_bytes_per_million"]),
        "peak_rss_mb": round(found["peak_rss_mb"]),
        "every_run": {
            "rows_per_s": [round(run["rows_per_s"]) for run in runs],
            "cpu_us_per_row": [round(run["cpu_seconds_per_million"], 3) for run in runs],
        },
    }


def save(path: Path, measured: dict[str, Any]) -> None:
    """Put these axes into the file; axes that were not measured stay as they are, each under its own conditions."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = json.loads(path.read_text()) if path.exists() else {}
    found = {**kept, **measured}
    path.write_text(json.dumps({axis: found[axis] for axis in AXES if axis in found}, indent=1) + "\n")


def table(axis: str, about: dict[str, Any], points: list[dict[str, Any]]) -> Table:
    titles = ("rows", "keys", "rows a frame", "rows/s", "µs CPU a row", "records a million", "their MB", "peak MiB")
    printed = Table(axis, *titles, title=f"{axis}: median of {about['runs']}", box=None, title_justify="left")
    for each in points:
        printed.add_row(
            f"{each['value']:,}",
            f"{each['rows']:,}",
            f"{each['keys']:,}",
            f"{each['rows_per_frame']:,.0f}",
            f"{each['rows_per_s']:,}",
            f"{each['cpu_us_per_row']:.2f}",
            f"{each['records_per_million']:,}",
            f"{each['record_bytes_per_million'] / 1e6:,.1f}",
            f"{each['peak_rss_mb']:,}",
        )
    return printed


@click.command()
@click.option("--rows", default=1_000_000, show_default=True, help="Of the base case; more for many keys.")
@click.option("--only", multiple=True, type=click.Choice(AXES), help="This axis; may be repeated. Default: all.")
@click.option("--far", is_flag=True, help="Also 10^7 keys: 20 times as many rows, 15 GB of disk, 10 GB of memory.")
@click.option("--runs", default=3, show_default=True, help="Medians are reported.")
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--out",
    default=plots.FOLDER / "growth.json",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where figures go.  [default: docs/performance/growth.json]",
)
@bootstrap_option
def main(rows: int, only: tuple[str, ...], far: bool, runs: int, seed: int, out: Path, bootstrap: str | None) -> None:
    """Measure what a row costs one fold worker along each axis: keys, dims, rows per frame, skew, partitions on the worker.

    One axis at a time, from one base case: 64 dims of float16, Zipf 1.2 over 100,000 users, 1,024 rows a frame, 4 partitions, flush 200 ms,
    --rows rows. From the moment the first partition flows until the last frame is committed, with an empty disk and new topics in each run;
    every run is checked to count every row once.

    Along keys users are all alike, so that keys really occur; where they are over 500,000, rows are twice as many. What every run costs
    whatever its rows is about a second and a tenth of one of CPU.

    The figures go to --out, which keeps axes that are not measured now, and are drawn beside it (python -m benchmarks.plots draws them
    again). 20 points of some fifteen seconds each, for every run.
    """
    chosen = {axis: points for axis, points in cases(rows, far).items() if axis in (only or AXES)}
    todo = list(dict.fromkeys(case for points in chosen.values() for case in points.values()))
    about = {**conditions(), "base_rows": rows, "flush": FLUSH, "seed": seed}
    found: dict[Case, list[Figures]] = {case: [] for case in todo}
    measured: dict[str, Any] = {}
    with cluster(bootstrap) as address, Progress(console=console) as bar:
        fold.warm_up(address)
        task = bar.add_task("folding", total=runs * sum(case.rows for case in todo))
        for run in range(1, runs + 1):
            for case in todo:
                places = [f"{axis} {value:,}" for axis, points in chosen.items() for value, each in points.items() if each == case]
                bar.update(task, description=f"run {run}: {places[0]}")
                found[case].append(measure(address, case, seed))
                last = found[case][-1]
                told = f"{last['rows_per_s']:,.0f} rows/s, {last['cpu_seconds_per_million']:.2f} µs CPU a row"
                bar.console.print(f"run {run}: {', '.join(places)}: {told}", style="dim")
                bar.advance(task, case.rows)
            measured = {
                axis: {"conditions": {**about, "runs": run}, "points": [point(value, case, found[case]) for value, case in points.items()]}
                for axis, points in chosen.items()
            }
            save(out, measured)
    for axis, each in measured.items():
        console.print(table(axis, each["conditions"], each["points"]))
    console.print(f"figures: {out}, drawn: {plots.growth(out)}")


if __name__ == "__main__":
    main()
