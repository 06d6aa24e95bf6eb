"""Commands for training sets. Each imports what it needs when it runs: that takes an extra."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from crossrep import kafka, spaces
from crossrep.cli import bootstrap_option, cli, console
from crossrep.cli_analysts import place_option
from crossrep.cli_archive import Duration, archive_option

if TYPE_CHECKING:
    from crossrep.attached import Progressed
    from crossrep.training_sets import TrainingSet


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
@bootstrap_option
def training_set(
    space: str,
    url: str | None,
    archive_url: str | None,
    since: datetime | None,
    until: datetime | None,
    delay: float | None,
    memory_mb: int,
    keep: int | None,
    bootstrap: str | None,
) -> None:
    """Write the labelled samples of SPACE as Parquet, each with what was known of its user and item before the impression.

    Samples come from topic samples.SPACE (crossrep samples), exactly up to the offsets that the manifest records. What was known comes from
    the archive (crossrep archive): the rows of strictly earlier event time, folded as the stream folds them, weights decayed to the
    impression's time. Run crossrep archive before it: samples of impressions that the archive does not know yet are left out.
    """
    from crossrep.archive import Archive
    from crossrep.training_sets import Chosen, TrainingSets, make

    address = kafka.bootstrap_servers(bootstrap)
    published, store = spaces.find(space, address).space, TrainingSets(url, space)
    chosen = Chosen(since and since.replace(tzinfo=UTC), until and until.replace(tzinfo=UTC), delay or 0.0)
    began = datetime.now()
    with _bars() as progressed:
        made = make(published, address, store, Archive(archive_url, space), chosen, memory_mb << 20, progressed)
    seconds = max((datetime.now() - began).total_seconds(), 1e-9)
    _print(made)
    console.print(f"training set {made.id}: {sum(made.sizes().values()):,} bytes in {seconds:.1f} s, {made.rows / seconds:,.0f} samples/s")
    if made.left_out:
        console.print(f"{made.left_out:,} samples are left out: the archive does not know their impressions yet. crossrep archive {space}")
    if keep is not None:
        for id in store.retain(keep):
            console.print(f"removed {id}")


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


def _print(made: TrainingSet) -> None:
    table = Table("entity", "samples", "known before", "archived rows", "of several events", "samples these blur", box=None)
    for entity, about in made.entities.items():
        share = f"{about.found / made.rows:.1%}" if made.rows else ""
        table.add_row(entity, f"{made.rows:,}", share, f"{about.rows:,}", f"{about.combined:,}", f"{about.blurred:,}")
    console.print(table)
    console.print(f"{made.clicked:,} of {made.rows:,} samples are clicked ({made.clicked / max(made.rows, 1):.2%})")
    if any(about.combined for about in made.entities.values()):
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
@click.option("--rows", type=click.IntRange(1), default=1000, show_default=True, help="Samples to check, at random.")
@click.option("--seed", default=0, show_default=True, help="Another one checks others.")
def leaks(space: str, id: str | None, url: str | None, archive_url: str | None, rows: int, seed: int) -> None:
    """Does a training set know the future? Checks set ID of SPACE, or the newest, and exits 1 if it does, or is wrong otherwise.

    For some of its samples, what is attached is computed again in another way: the archived events strictly before the impression, one by
    one, by the definition. Kafka is not asked.
    """
    from crossrep import leaks as checking
    from crossrep.archive import Archive
    from crossrep.training_sets import TrainingSets

    store = TrainingSets(url, space)
    made = store.find(id)
    with _bars() as progressed:
        checked, findings = checking.check(store, made, Archive(archive_url, space), rows, seed, progressed)
    if findings:
        table = Table("sample", "entity", "key", "", "what is wrong", box=None)
        for found in findings[:50]:
            table.add_row(found.sample_id, found.entity, found.key, "[red]future[/]" if found.future else "", found.problem)
        console.print(table)
    wrong, future = {found.sample_id for found in findings}, {found.sample_id for found in findings if found.future}
    console.print(
        f"{checked:,} samples of training set {made.id} checked: {len(future):,} know the future, "
        f"{len(wrong - future):,} are wrong otherwise"
    )
    sys.exit(1 if findings else 0)
