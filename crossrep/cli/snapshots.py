"""The analysts' commands: snapshots and what is asked of them. Each imports what it needs when it runs: that takes an extra."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from rich.console import Console
from rich.table import Table

from crossrep import kafka
from crossrep.cli.app import bootstrap_option, cli, console, space_option
from crossrep.control import spaces
from crossrep.errors import CrossrepError, DataError

if TYPE_CHECKING:
    from crossrep.snapshots.store import Manifest, Store

Command = TypeVar("Command", bound=Callable[..., Any])


def place_option(*names: str, folder: str = "snapshots") -> Callable[[Command], Command]:
    """Where snapshots lie, or what else has a folder of its own in CROSSREP_HOME."""
    variable = f"CROSSREP_{folder.upper().replace('-', '_')}"
    return click.option(
        *names,
        "url",
        envvar=variable,
        metavar="URL",
        help=f"A folder, or an URL such as s3://bucket/{folder}. Default: {variable}, or CROSSREP_HOME/{folder}.",
    )


def _store(url: str | None, name: str, bootstrap: str | None = None) -> Store:
    """The snapshots of a space. Kafka is asked only where there are none of that name: it may be an alias."""
    from crossrep.snapshots.store import Store

    store = Store(url, name)
    if store.ids():
        return store
    try:
        return Store(url, spaces.resolve(name, bootstrap).space.name)
    except CrossrepError:
        return store  # says that there is no snapshot


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

    from crossrep.snapshots import taking
    from crossrep.snapshots.store import Store
    from crossrep.views import changelog

    address = kafka.bootstrap_servers(bootstrap)
    published = spaces.resolve(space, address)
    store = Store(url, published.space.name)
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

    store = _store(url, space)
    table = Table("snapshot", "taken", "rows", "MB", "model", "crossrep", box=None)
    for found in store.published():
        rows = ", ".join(f"{sum(part.rows for part in parts):,} {entity}" for entity, parts in found.parts.items())
        model = found.model.label if found.model else "not known"
        table.add_row(found.id, f"{found.created:%Y-%m-%d %H:%M:%S} UTC", rows, f"{found.bytes / 1e6:.1f}", model, found.crossrep)
    console.print(table)
    if not table.row_count:
        console.print(f"none of {space!r} in {store.url}. Take one: crossrep snapshot {space}")


@cli.command()
@click.argument("query")
@space_option
@place_option("--from")
@click.option("--snapshot", "id", metavar="ID", help="Which one: see `crossrep snapshots`. Default: the newest.")
@click.option(
    "--format", type=click.Choice(["table", "csv", "json", "parquet"]), default="table", show_default=True, help="json: an object a line."
)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="A file instead of the terminal; parquet needs one.")
def sql(query: str, space: str, url: str | None, id: str | None, format: str, out: Path | None) -> None:
    """Ask a snapshot in SQL (DuckDB): crossrep sql "select id, count from user order by count desc limit 10" --space kuairand-v1.

    \b
    There is a view for every entity, named like it. Macros:
      cosine(a, b)                             of two vectors
      half_life('user.cr')                     of a column, in seconds
      confidence(weight, time, at, half_life)  the weight that is left at a time;
                                               without half_life where the space has only one
    "describe user" lists what a view holds. Only queries are taken, and nothing but the snapshot's files is needed: no Kafka.
    """
    from crossrep.snapshots import sql as questions

    if format == "parquet" and out is None:
        raise click.UsageError("--format parquet needs a file: --out FILE")
    store = _store(url, space)
    manifest = store.find(id)
    answer = questions.ask(store, manifest, query)
    if format == "parquet":
        questions.write_parquet(answer, manifest, str(out))
        return
    try:
        with out.open("w", encoding="utf-8") if out else nullcontext(click.get_text_stream("stdout")) as file:
            if format == "table":
                shown, more = questions.table(answer, manifest)
                print_to = Console(file=file, width=250) if out else console
                print_to.print(shown)
                if more:
                    print_to.print(f"and {more:,} rows more: limit the query, or take --format csv", style="dim")
            else:
                (questions.write_csv if format == "csv" else questions.write_json)(answer, manifest, file)
    except OSError as error:
        raise DataError(f"{out or 'the output'} cannot be written: {error}") from None


@cli.command()
@click.argument("a", required=False)
@click.argument("b", required=False)
@space_option
@place_option("--from")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Histograms too: FILE.png, .svg or .pdf.")
def drift(a: str | None, b: str | None, space: str, url: str | None, plot: Path | None) -> None:
    """What moved between snapshots A and B: crossrep drift 20260101T000000.000000Z 20260102T000000.000000Z --space kuairand-v1.

    Without A and B: the two newest. Without B: A and the newest. For every column: the keys it covers, how many came, went and changed,
    the angle and the distance between the two mean vectors, the median length of vectors, and how far each key's own vector has turned.
    """
    from crossrep.snapshots import drift as drifts

    store = _store(url, space)
    if a is None:
        ids = [found.id for found in store.published()]
        if len(ids) < 2:
            raise DataError(f"{len(ids)} snapshots of space {space!r} in {store.url}: two are needed. Take one: crossrep snapshot {space}")
        a, b = ids[-2:]
    first, second = store.find(a), store.find(b)
    with console.status("comparing"):
        found = drifts.drift(store, first, second)
    console.print(f"{first.id} → {second.id}")
    console.print(drifts.table(found))
    if plot is not None:
        drifts.plot(found, first, second, str(plot))
        console.print(f"plotted: {plot}")


@cli.command()
@click.argument("entity")
@click.argument("id")
@space_option
@bootstrap_option
@click.option("-n", "last", type=click.IntRange(min=1), default=50, show_default=True, help="Show the last so many.")
@click.option("--archive", "archive_url", metavar="URL", help="Also frames that the topic keeps no more, from the space's archive there.")
def history(entity: str, id: str, space: str, bootstrap: str | None, last: int, archive_url: str | None) -> None:
    """What happened to a key: crossrep history user 17 --space kuairand-v1.

    Every frame that holds it, replayed in order, and every order to forget it, as far back as frames are retained. Of each column: the
    weight that the frame adds → the weight that is held then, and |the length of the mean|; both as the frames shown alone give them.
    With --archive, frames reach back as far as the archive does, without those from before an order to forget.
    """
    from rich.progress import Progress

    from crossrep.snapshots import key_history

    address = kafka.bootstrap_servers(bootstrap)
    known, key = spaces.resolve(space, address).space, id.encode()
    earlier: key_history.Earlier = lambda number, before: iter(())  # noqa: E731
    if archive_url is not None:
        from crossrep.archive.store import Archive

        store = Archive(archive_url, known.name)
        earlier = lambda number, before: store.of_key(entity, key, number, before)  # noqa: E731
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(f"reading {known.frames_topic}", total=None)
        found = key_history.history(known, entity, key, address, lambda offsets: progress.advance(task, offsets), earlier)
    if found.happened:
        console.print(key_history.table(found, known, entity, last))
    shown = f"the last {last:,} of them" if len(found.happened) > last else "all of them"
    console.print(
        f"{len(found.happened):,} entries in {known.frames_topic}[{found.partition}], offsets {found.first:,} to {found.end:,}: {shown}"
    )
    if found.record is None:
        console.print(f"{entity} {id} is not held now")
    else:
        console.print(f"{entity} {id} has {int(found.record['count'][0]):,} events now")
        if found.older > 0:
            console.print(f"{found.older:,} of them are of frames that are not retained any more")


@cli.command("import")
@click.argument("source", metavar="SPACE")
@click.option("--into", required=True, metavar="NAME", help="The published space to seed.")
@click.option("--snapshot", "id", metavar="ID", help="Which one: see `crossrep snapshots`. Default: the newest.")
@click.option("--add", is_flag=True, help="Also into a space that holds frames already; their events are added up.")
@place_option("--from")
@bootstrap_option
def import_snapshot(source: str, into: str, id: str | None, add: bool, url: str | None, bootstrap: str | None) -> None:
    """Seed a space with a snapshot of SPACE: crossrep import kuairand-v1 --into kuairand-v2.

    For another number of partitions, or a new name. Both must declare the same columns. The rows go through the space's frames topic, as
    partials, for its fold workers; each exactly once: an import that was interrupted goes on where it was when the command is repeated.
    The space is bound to the model that made the snapshot's vectors, if that is known; one that is bound to another is refused.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from crossrep.rollout import seeding

    address = kafka.bootstrap_servers(bootstrap)
    store, space = _store(url, source, address), spaces.find(into, address).space
    manifest = store.find(id)
    columns = (TextColumn("rows"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=manifest.rows)
        written = seeding.seed(store, manifest, space, address, add, lambda rows: progress.advance(task, rows))
    before = manifest.rows - written
    console.print(f"{written:,} rows of snapshot {manifest.id} written to {space.frames_topic}; {before:,} were there already")
    console.print(bound_to(manifest, into))
    console.print(f"they are in once its fold workers have folded them: crossrep fold {into}")


def bound_to(manifest: Manifest, into: str) -> str:
    """What an import of the snapshot has said of the space's model, for people."""
    if manifest.model is not None:
        return f"space {into} is that of model {manifest.model.label} ({manifest.model.digest[:12]}) now, whose vectors these are"
    return f"nothing says which model made these vectors, so they bind space {into} to none: see to it that no other one writes there"
