"""The commands of the archive and of replays. Each imports what it needs when it runs: that takes an extra."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import click
from rich.table import Table

from crossrep import kafka
from crossrep.cli.app import bootstrap_option, cli, console, resolve
from crossrep.cli.snapshots import bound_to, place_option
from crossrep.control import spaces
from crossrep.spec import parse_duration

Command = TypeVar("Command", bound=Callable[..., Any])


class Duration(click.ParamType):
    """`60s`, `90d`: seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            return value if isinstance(value, float) else parse_duration(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def archive_option(*names: str) -> Callable[[Command], Command]:
    """Where archives lie."""
    return click.option(
        *names,
        "archive_url",
        envvar="CROSSREP_ARCHIVE",
        metavar="URL",
        help="A folder, or an URL such as s3://bucket/archive. Default: CROSSREP_ARCHIVE, or CROSSREP_HOME/archive.",
    )


@cli.command()
@click.argument("space")
@archive_option("--to")
@click.option("--follow", is_flag=True, help="Go on for ever, a run every --every.")
@click.option("--every", type=Duration(), default="60s", show_default=True, help="With --follow: from the start of a run to the next.")
@click.option("--keep", type=Duration(), help='Afterwards, remove frames appended longer ago, such as "90d". Default: keep all.')
@click.option("--compact", is_flag=True, help="Afterwards, make one file of those of an hour. --follow does so once an hour.")
@click.option("--erase", is_flag=True, help="Afterwards, take out what orders to forget are about.")
@click.option("--accept-gap", is_flag=True, help="Go on though frames were deleted before they were archived.")
@bootstrap_option
def archive(
    space: str,
    archive_url: str | None,
    follow: bool,
    every: float,
    keep: float | None,
    compact: bool,
    erase: bool,
    accept_gap: bool,
    bootstrap: str | None,
) -> None:
    """Keep the frames of SPACE as Parquet, exact at their offsets: crossrep archive kuairand-v1 --follow --keep 90d.

    It only reads the frames topic: no worker takes part. What is there says where to go on, so that it may be killed and repeated at any
    time. Every run ends with a cut: for which events the archive is complete, so that `crossrep replay` can hand over to the live stream.
    """
    from crossrep.archive import upkeep
    from crossrep.archive.store import Archive

    address, store, compacted = kafka.bootstrap_servers(bootstrap), Archive(archive_url, space), time.monotonic()
    while True:
        began = time.monotonic()
        _run(space, address, store, accept_gap)
        if keep is not None and (removed := store.retain(timedelta(seconds=keep))):
            console.print(f"removed {len(removed)} files", style="dim")
        if erase:
            with console.status("erasing"):
                console.print(f"{upkeep.erase(store):,} rows erased")
        if compact or (follow and began - compacted >= 3600):
            with console.status("compacting"):
                console.print(f"{upkeep.compact(store):,} files fewer, once they are removed", style="dim")
            compacted = began
        if not follow:
            return
        time.sleep(max(0.0, began + every - time.monotonic()))


def _run(space: str, address: str, store: Any, accept_gap: bool) -> None:
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    from crossrep.archive import archiving

    began = time.monotonic()
    with Progress(TextColumn("offsets"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task("", total=None)

        def progressed(offsets: int, total: int) -> None:
            bar.update(task, total=total)
            bar.advance(task, offsets)

        report = archiving.archive(space, address, store, accept_gap, progressed)
    seconds = max(time.monotonic() - began, 1e-9)
    rows = ", ".join(f"{count:,} {entity}" for entity, count in report.rows.items())
    total = sum(report.rows.values())
    console.print(f"{rows} rows in {report.files} files, {report.bytes:,} bytes, {seconds:.1f} s, {total / seconds:,.0f} rows/s")
    late = {number: first for number, first in report.first.items() if first > 0}
    if late:
        console.print(f"the archive begins where the topic does (partition: offset): {late}; older frames are gone", style="yellow")
    if report.refused or report.orders:
        console.print(f"{report.refused:,} refused frames left out, {report.orders:,} orders to forget kept", style="dim")
    said = f"cut {report.cut.id}" if report.cut else "no cut: the space was rewound meanwhile"
    console.print(said, style="dim")


@cli.command()
@click.argument("space")
@archive_option("--from")
def archived(space: str, archive_url: str | None) -> None:
    """What the archive of SPACE holds, and the disk it takes for a million rows: crossrep archived kuairand-v1."""
    from crossrep.archive.store import Archive

    store = Archive(archive_url, space)
    about = store.described()
    table = Table("entity", "files", "rows", "MB", "MB a million rows", "hours (UTC)", box=None)
    begins: dict[int, int] = {}
    for entity in about.declared().entities:
        files = store.files(entity)
        rows, size = sum(map(store.size, files)), sum(store.fs.size(file.path) for file in files)
        hours = [file.hour for file in files]
        begins |= {file.partition: file.first for file in reversed(files)}
        span = f"{min(hours):%Y-%m-%d %H} to {max(hours):%Y-%m-%d %H}" if hours else ""
        table.add_row(entity, f"{len(files):,}", f"{rows:,}", f"{size / 1e6:,.1f}", f"{size / max(rows, 1):,.0f}", span)
    console.print(table)
    console.print(f"vectors of model {about.model.label if about.model else '(not known)'}")
    cut = store.cut()
    console.print(f"complete up to cut {cut.id}" if cut else f"no cut yet: crossrep archive {space}")
    if late := {number: first for number, first in sorted(begins.items()) if first}:
        console.print(f"frames before these offsets are not in it (partition: offset): {late}")
    if orders := store.orders():
        console.print(f"{len(orders):,} orders to forget, not applied to the files yet: crossrep archive {space} --erase")


@cli.command()
@click.argument("source", metavar="SPACE|FILES")
@click.option("--into", required=True, metavar="NAME", help="The published space to fill; with --only-snapshot its TOML file will do.")
@archive_option("--archive")
@place_option("--to")
@click.option("--threads", type=click.IntRange(1), default=os.cpu_count() or 1, show_default="all cores", help="That fold.")
@click.option("--only-snapshot", is_flag=True, help="Write the snapshot, and nothing to Kafka.")
@click.option("--no-hand-over", is_flag=True, help="Leave the offsets of the space's inference workers alone.")
@click.option("--accept-gap", is_flag=True, help="Replay an archive that lacks frames.")
@click.option("--until", type=click.DateTime(), help="Only frames appended before. UTC, by the brokers' clock: 2026-01-31T12:00:00.")
@bootstrap_option
def replay(
    source: str,
    into: str,
    archive_url: str | None,
    url: str | None,
    threads: int,
    only_snapshot: bool,
    no_hand_over: bool,
    accept_gap: bool,
    until: datetime | None,
    bootstrap: str | None,
) -> None:
    """Fill a space from the archive of SPACE, and hand over to the live stream: crossrep replay kuairand-v1 --into kuairand-v2.

    \b
    1. The tables are built by the stream's own fold, without Kafka, and written as a snapshot of the new space.
    2. The snapshot's rows are written to the new space, each exactly once (as `crossrep import` does), and it is bound to their model.
    3. With an archive: the new space's `crossrep infer` will begin at the first event that is not in it.
    An interrupted command is repeated; it goes on where it was. With --until, the state as it was then: the events since are read again, by
    whatever model the new space is given. That is a rewind that reaches back as far as the archive does.

    The new space may have another number of partitions; and other half-lives and weights, if the archived frames hold one event a row
    (`crossrep infer --no-combine`). FILES is a folder, a file or a pattern of Parquet samples: a column of ids for every entity, `event`,
    `event_time`, and a list column for every source (`crossrep represent` makes them of events).
    """
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    from crossrep.rollout import replay as replaying  # the command has its name

    address = kafka.bootstrap_servers(bootstrap)
    space = resolve(into, address) if only_snapshot else spaces.find(into, address).space
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    began = time.monotonic()
    with Progress(*columns, console=console, transient=True) as bar:
        steps: dict[str, Any] = {}

        def progressed(step: str, rows: int, total: int) -> None:
            if step not in steps:
                steps[step] = bar.add_task(step, total=total)
            bar.advance(steps[step], rows)

        done = replaying.replay(
            source,
            space,
            address,
            archive_url,
            url,
            threads,
            seed=not only_snapshot,
            hand_over=not (no_hand_over or only_snapshot),
            accept_gap=accept_gap,
            until=None if until is None else until.replace(tzinfo=UTC).timestamp(),
            progressed=progressed,
        )
    manifest = done.manifest
    if done.rows:
        console.print(f"{done.rows:,} rows folded in {done.seconds:.1f} s: {done.rows / done.seconds:,.0f} rows/s")
    keys = ", ".join(f"{sum(part.rows for part in parts):,} {entity}" for entity, parts in manifest.parts.items())
    console.print(f"snapshot {manifest.id} of space {space.name}: {keys} rows, {manifest.bytes:,} bytes")
    if only_snapshot:
        return
    console.print(f"{done.seeded:,} rows written to {space.frames_topic}, in {time.monotonic() - began:.1f} s altogether")
    console.print(bound_to(manifest, space.name))
    for topic, numbers in done.handed_over.items():
        places = ", ".join(f"[{number}] {offset:,}" for number, offset in sorted(numbers.items()))
        console.print(f"crossrep infer {space.name} begins at {topic} {places}")
    console.print(f"they are in once its fold workers have folded them: crossrep fold {space.name}")
