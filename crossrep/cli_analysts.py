"""The analysts' commands: snapshots and what is asked of them. Each imports what it needs when it runs: that takes an extra."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any, TypeVar

import click
from rich.table import Table

from crossrep import kafka, spaces
from crossrep.cli import bootstrap_option, cli, console

Command = TypeVar("Command", bound=Callable[..., Any])


def place_option(*names: str) -> Callable[[Command], Command]:
    """Where snapshots lie."""
    return click.option(
        *names,
        "url",
        envvar="CROSSREP_SNAPSHOTS",
        metavar="URL",
        help="A folder, or an URL such as s3://bucket/snapshots. Default: CROSSREP_SNAPSHOTS, or CROSSREP_HOME/snapshots.",
    )


@cli.command()
@click.argument("space")
@place_option("--to")
@click.option("--keep", type=click.IntRange(min=1), metavar="N", help="Afterwards, remove all but the newest N. Default: keep all.")
@bootstrap_option
def snapshot(space: str, url: str | None, keep: int | None, bootstrap: str | None) -> None:
    """Write the state of SPACE as Parquet: one file per entity and partition, each exact at the offset that the manifest records.

    It only reads the changelog: no worker takes part, and none needs to run. Readers see it once it is whole; what a killed run has left
    is removed by the next one. Nothing is claimed across partitions: each is exact at its own offset.
    """
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    from crossrep import changelog, taking
    from crossrep.snapshots import Store

    address = kafka.bootstrap_servers(bootstrap)
    published, store = spaces.find(space, address), Store(url, space)
    total = changelog.sizes(published.space, list(published.space.entities), address)
    columns = (TextColumn("records"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    began = datetime.now()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=total)
        taken = taking.take(published, address, store, lambda offsets: progress.advance(task, offsets))
    seconds = max((datetime.now() - began).total_seconds(), 1e-9)
    for entity, parts in taken.parts.items():
        console.print(f"{sum(part.rows for part in parts):,} {entity} rows in {len(parts)} files")
    console.print(f"snapshot {taken.id}: {taken.bytes:,} bytes in {seconds:.1f} s, {taken.rows / seconds:,.0f} rows/s")
    for removed in store.retain(keep):
        console.print(f"removed {removed}", style="dim")


@cli.command()
@click.argument("space")
@place_option("--from")
def snapshots(space: str, url: str | None) -> None:
    """The snapshots of SPACE, oldest first. The newest is what other commands take unless they are told."""
    from crossrep.snapshots import Store

    store = Store(url, space)
    table = Table("snapshot", "taken", "rows", "MB", "crossrep", box=None)
    for found in store.published():
        rows = ", ".join(f"{sum(part.rows for part in parts):,} {entity}" for entity, parts in found.parts.items())
        table.add_row(found.id, f"{found.created:%Y-%m-%d %H:%M:%S} UTC", rows, f"{found.bytes / 1e6:.1f}", found.crossrep)
    console.print(table)
    if not table.row_count:
        console.print(f"none of {space!r} in {store.url}. Take one: crossrep snapshot {space}")
