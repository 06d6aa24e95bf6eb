"""Commands for training sets. Each imports what it needs when it runs: that takes an extra."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource
from rich.table import Table

from crossrep import kafka
from crossrep.cli.app import bootstrap_option, cli, console
from crossrep.cli.archive import Duration, archive_option
from crossrep.cli.snapshots import place_option
from crossrep.control import spaces

if TYPE_CHECKING:
    from crossrep.archive.store import Archive
    from crossrep.spec import Space
    from crossrep.training.attach import Attached, Progressed


@cli.command("training-set")
@click.argument("space")
@place_option("--to", folder="training-sets")
@archive_option("--archive")
@click.option("--since", type=click.DateTime(), help="Impressions from this event time on, UTC. Default: all that are retained.")
@click.option("--until", type=click.DateTime(), help="Impressions before this event time, UTC.")
@click.option(
    "--delay", type=Duration(), default="1ms", show_default=True, help="How old a representation is when it is served, such as 1s."
)
@click.option("--memory-mb", type=click.IntRange(1), default=1024, show_default=True, help="Of archived rows held at a time.")
@click.option("--keep", type=click.IntRange(min=1), metavar="N", help="Afterwards, remove all but the newest N. Default: keep all.")
@click.option("--topic", is_flag=True, help="To topic training.SPACE instead of files: all samples that came since the last time.")
@click.option("--follow", is_flag=True, help="With --topic: go on for ever, a run every --every.")
@click.option("--every", type=Duration(), default="10m", show_default=True, help="With --follow: from the start of a run to the next.")
@click.option("--start", type=click.Choice(["earliest", "latest"]), help="With --topic: where to begin if the progress is lost.")
@click.option("--accept-gap", is_flag=True, help="With --topic: go on though samples were deleted before they were published.")
@bootstrap_option
@click.pass_context
def training_set(
    ctx: click.Context,
    space: str,
    url: str | None,
    archive_url: str | None,
    since: datetime | None,
    until: datetime | None,
    delay: float,
    memory_mb: int,
    keep: int | None,
    topic: bool,
    follow: bool,
    every: float,
    start: str | None,
    accept_gap: bool,
    bootstrap: str | None,
) -> None:
    """Write the labelled samples of SPACE as Parquet, or to a topic, each with what was known of its user and item before the impression.

    Samples come from topic samples.SPACE (crossrep samples), exactly up to the offsets that the manifest records. What was known comes from
    the archive (crossrep archive): the rows of strictly earlier event time, folded as the stream folds them, weights decayed to the
    impression's time. Run crossrep archive before it: samples of impressions that the archive does not know yet are left out.

    With --topic they go to topic training.SPACE, in the order of samples.SPACE and each exactly once, however often the command is killed
    and repeated: every run goes on behind the last one. Samples that the archive does not know yet wait for the next run.

    \b
      crossrep training-set kuairand-v1                            a set of files, of all samples that there are
      crossrep training-set kuairand-v1 --topic                    what came since the last time; from cron, behind crossrep archive
      crossrep training-set kuairand-v1 --topic --follow           the same every ten minutes
    """
    _refuse_mixed(ctx, topic, for_files=("url", "since", "until", "keep"), for_topics=("follow", "every", "start", "accept_gap"))
    from crossrep.archive.store import Archive
    from crossrep.training.sets import Chosen, TrainingSets, make

    address = kafka.bootstrap_servers(bootstrap)
    published, archive = spaces.find(space, address), Archive(archive_url, space)
    spaces.refuse_retiring(published)
    if topic:
        while True:
            began = time.monotonic()
            _publish(published.space, address, archive, delay, start, accept_gap, memory_mb << 20)
            if not follow:
                return
            time.sleep(max(0.0, began + every - time.monotonic()))
    store = TrainingSets(url, space)
    chosen = Chosen(since and since.replace(tzinfo=UTC), until and until.replace(tzinfo=UTC), delay)
    began = time.monotonic()
    with _bars() as progressed:
        made = make(published.space, address, store, archive, chosen, memory_mb << 20, progressed)
    seconds = max(time.monotonic() - began, 1e-9)
    _print(made.entities, made.rows, made.clicked)
    console.print(f"training set {made.id}: {sum(made.sizes().values()):,} bytes in {seconds:.1f} s, {made.rows / seconds:,.0f} samples/s")
    if made.left_out:
        console.print(f"{made.left_out:,} samples are left out: the archive does not know their impressions yet. crossrep archive {space}")
    if keep is not None:
        for id in store.retain(keep):
            console.print(f"removed {id}")


def _refuse_mixed(ctx: click.Context, topic: bool, for_files: tuple[str, ...], for_topics: tuple[str, ...]) -> None:
    """Raise UsageError if an option is given that means nothing for this destination."""
    given = {name for name in ctx.params if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    for param in ctx.command.params:
        if param.name in given.intersection(for_files if topic else for_topics):
            why = "is for files: a topic gets every sample once, and keeps it for its retention.ms" if topic else "needs --topic"
            raise click.UsageError(f"{param.opts[0]} {why}")


def _publish(space: Space, address: str, archive: Archive, delay: float, start: str | None, accept_gap: bool, memory: int) -> None:
    from crossrep.training.topic import publish

    began = time.monotonic()
    with _bars() as progressed:
        added = publish(space, address, archive, delay, start, accept_gap, memory, progressed)
    seconds = max(time.monotonic() - began, 1e-9)
    if added.samples:
        _print(added.entities, added.samples, added.clicked)
    console.print(f"{added.samples:,} samples to {space.training_topic} in {seconds:.1f} s, {added.samples / seconds:,.0f} samples/s")
    if added.waiting:
        console.print(
            f"{added.waiting:,} samples wait: the archive does not know the impressions of some yet. crossrep archive {space.name}"
        )


@contextmanager
def _bars() -> Iterator[Progressed]:
    """A progress bar for each thing that is done."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        tasks: dict[str, Any] = {}

        def progressed(what: str, further: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
            progress.advance(tasks[what], further)

        yield progressed


def _print(entities: dict[str, Attached], rows: int, clicked: int) -> None:
    table = Table("entity", "samples", "known before", "archived rows", "of several events", "samples these blur", box=None)
    for entity, about in entities.items():
        share = f"{about.found / rows:.1%}" if rows else ""
        table.add_row(entity, f"{rows:,}", share, f"{about.rows:,}", f"{about.combined:,}", f"{about.blurred:,}")
    console.print(table)
    console.print(f"{clicked:,} of {rows:,} samples are clicked ({clicked / max(rows, 1):.2%})")
    if any(about.combined for about in entities.values()):
        console.print(
            "Rows of several events count only if all of them are earlier: samples know nothing of the future, but may lack some of the "
            "newest past. Where the space declares combine = false there are no such rows",
            style="yellow",
        )


@cli.command()
@click.argument("space")
@click.argument("id", required=False)
@place_option("--from", folder="training-sets")
@archive_option("--archive")
@click.option("--topic", is_flag=True, help="Check topic training.SPACE instead of a set.")
@click.option("--rows", type=click.IntRange(1), default=1000, show_default=True, help="Samples to check, at random.")
@click.option("--seed", default=0, show_default=True, help="Another one checks others.")
@bootstrap_option
def leaks(
    space: str, id: str | None, url: str | None, archive_url: str | None, topic: bool, rows: int, seed: int, bootstrap: str | None
) -> None:
    """Does a training set know the future? Checks set ID of SPACE, or the newest, and exits 1 if it does, or is wrong otherwise.

    For some of its samples, what is attached is computed again in another way: the archived events strictly before the impression, one by
    one, by the definition. Kafka is not asked, unless it is about a topic: crossrep leaks kuairand-v1 --topic.
    """
    from crossrep.archive.store import Archive
    from crossrep.training import leaks as checking
    from crossrep.training.sets import TrainingSets

    if topic and id:
        raise click.UsageError("an ID is that of a set of files; --topic checks the topic")
    archive = Archive(archive_url, space)
    with _bars() as progressed:
        if topic:
            address = kafka.bootstrap_servers(bootstrap)
            published = spaces.find(space, address).space
            what = f"topic {published.training_topic}"
            checked, findings = checking.check_topic(published, address, archive, rows, seed, progressed)
        else:
            store = TrainingSets(url, space)
            made = store.find(id)
            what = f"training set {made.id}"
            checked, findings = checking.check(store, made, archive, rows, seed, progressed)
    if findings:
        table = Table("sample", "entity", "key", "", "what is wrong", box=None)
        for found in findings[:50]:
            table.add_row(found.sample_id, found.entity, found.key, "[red]future[/]" if found.future else "", found.problem)
        console.print(table)
    wrong, future = {found.sample_id for found in findings}, {found.sample_id for found in findings if found.future}
    console.print(f"{checked:,} samples of {what} checked: {len(future):,} know the future, {len(wrong - future):,} are wrong otherwise")
    sys.exit(1 if findings else 0)
