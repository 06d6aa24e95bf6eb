"""`crossrep space`: which spaces there are, who works for them and reads them, and which one readers are to follow."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

import click
from rich.table import Table

from crossrep import kafka
from crossrep.cli.app import bootstrap_option, cli, console
from crossrep.control import readers, spaces, workers
from crossrep.control.spaces import Published
from crossrep.control.workers import Standing
from crossrep.errors import CrossrepError
from crossrep.rollout import comparing, promoting
from crossrep.rollout.comparing import EntityPair, Side, Weights
from crossrep.views import changelog

CURRENT = "current"


@cli.group("space")
def space_group() -> None:
    """Spaces side by side: list, compare, promote, retire.

    Readers that are given the name `current` instead of a space's follow promotions: crossrep serve current, LocalView(space="current").

    \b
      crossrep space list                                which there are, and who reads them
      crossrep space compare kuairand-v1 kuairand-v2     is the new one as good?
      crossrep space promote kuairand-v2                 readers of `current` go over to it
      crossrep space promote kuairand-v1 --yes           and back, at once
      crossrep space retire kuairand-v1                  delete what nobody reads any more
    docs/spaces.md tells the whole story.
    """


@space_group.command("list")
@bootstrap_option
def list_spaces(bootstrap: str | None) -> None:
    """Spaces published on this cluster: what stands for them, how far their workers are behind, and how many readers they have.

    `behind` counts offsets: events that `infer` and `samples` have still to take, frames that `fold` has. Readers say every ten seconds
    that they are there.
    """
    address = kafka.bootstrap_servers(bootstrap)
    published = spaces.read_all(address)
    known, reading = spaces.aliases(published), readers.readers(address)
    table = Table("space", "stands for it", "partitions", "entities", "workers", "behind", "readers", box=None)
    for name in sorted(published.keys() - known):
        called = ", ".join(alias.name for alias in known.values() if alias.space == name)
        try:
            found = spaces.decode(name, published[name])
            standing = [each for each in workers.standings(found.space, address).values() if each.used]
        except CrossrepError as error:
            table.add_row(name, called, "", str(error))
            continue
        working = ", ".join(f"{len(each.members)} {each.role}" for each in standing) or "never any"
        behind = ", ".join(f"{each.lag:,} {each.role}" for each in standing)
        count = sum(reader.recent for reader in reading if reader.space == name)
        state = " (being retired)" if found.retiring else " (being rewound)" if found.rewinding else ""
        space = found.space
        table.add_row(name + state, called, str(space.partitions), ", ".join(space.entities), working, behind, str(count))
    console.print(table)
    for alias in known.values():
        if alias.space not in published:
            console.print(f"[red]{alias.name} stands for {alias.space}, which is gone. Promote another: crossrep space promote NAME[/]")


@space_group.command()
@click.argument("name")
@bootstrap_option
def show(name: str, bootstrap: str | None) -> None:
    """One space: its columns, workers and readers. Or an alias, such as current: what it stands for, and stood for before."""
    address = kafka.bootstrap_servers(bootstrap)
    published = spaces.read_all(address)
    if alias := spaces.aliases(published).get(name):
        history = Table("space", "promoted", box=None)
        for promotion in alias.history:
            history.add_row(promotion.space, _time(promotion.at))
        console.print(f"{name} stands for {alias.space}", history, sep="\n")
        return
    space = spaces.find(name, address).space
    console.print(f"{name}: hash {space.hash.hex()}, {space.partitions} partitions, vectors in frames {space.vectors}")
    columns = Table("entity", "column", "aggregate", "source", "dim", box=None)
    for entity, declared in space.entities.items():
        for column, of in declared.columns.items():
            columns.add_row(entity, column, of.aggregate, of.source, str(of.dim))
    console.print(columns)
    console.print(_workers({name: workers.standings(space, address)}))
    there = Table("reader", "of", "host", "behind", "last heard of", "group", box=None)
    for reader in readers.readers(address, name):
        heard = _time(reader.at) if reader.recent else f"{_time(reader.at)}, gone?"
        there.add_row(reader.kind, reader.entity, reader.host, f"{reader.lag:,}", heard, reader.group)
    console.print(there if there.row_count else "nobody reads it")


@space_group.command()
@click.argument("a")
@click.argument("b")
@click.option("--sample", default=comparing.SAMPLE, show_default=True, type=click.IntRange(0), help="Keys whose neighbours are compared.")
@click.option("--seed", default=0, show_default=True, help="Of that sample.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@bootstrap_option
def compare(a: str, b: str, sample: int, seed: int, as_json: bool, bootstrap: str | None) -> None:
    """Two spaces side by side: crossrep space compare kuairand-v1 kuairand-v2. Either may be an alias: crossrep space compare current NEW.

    \b
    keys        how many each has, and how many keys of A are in B too
    weight      how much evidence is left, of 10, 50 and 90 % of the keys at most, decayed to the later stream time of the two
    neighbours  of a sample of the keys in both: how many of its 10 nearest by cosine are the same. Vectors of two spaces cannot be
                compared, neighbours can
    behind      offsets that the workers have still to take
    """
    address = kafka.bootstrap_servers(bootstrap)
    first, second = spaces.resolve(a, address), spaces.resolve(b, address)
    with _reading([first, second], address) as progressed:
        pairs = comparing.compare(first, second, address, sample, seed, progressed)
    standing = {published.space.name: workers.standings(published.space, address) for published in (first, second)}
    lacking = comparing.missing(first.space, second.space)
    if as_json:
        behind = {name: {each.role: each.lag for each in of.values() if each.used} for name, of in standing.items()}
        said = {"a": first.space.name, "b": second.space.name, "missing": lacking, "behind": behind, "entities": comparing.as_json(pairs)}
        click.echo(json.dumps(said, indent=1))
        return
    console.print(f"{first.space.name} → {second.space.name}")
    console.print(_entities(pairs), _columns(pairs), _workers(standing), sep="\n")
    for line in lacking:
        console.print(f"[yellow]{second.space.name}: {line}[/]")


@space_group.command()
@click.argument("space")
@click.option("--as", "alias", default=CURRENT, show_default=True, metavar="NAME", help="What readers follow, one for each product.")
@click.option("--yes", is_flag=True, help="At once, whatever speaks against it: nothing is asked or read. For a rollback in a hurry.")
@bootstrap_option
def promote(space: str, alias: str, yes: bool, bootstrap: str | None) -> None:
    """Let readers of `current` go over to SPACE: crossrep space promote kuairand-v2. Rolling back is promoting the former one.

    Each loads the new space beside the one it answers from, and switches in one step once it has caught up: no gap, no mixed answer.

    Refused unless --yes is given, when the space's workers are behind and do not catch up within ten seconds; when it has less than 99 % of
    the keys of the space that is current, in any entity; or when an entity or a column is missing or has other dimensions.
    """
    address = kafka.bootstrap_servers(bootstrap)
    if not yes:
        published = spaces.read_all(address)
        known = spaces.aliases(published).get(alias)
        new = spaces.find(space, address)
        former = spaces.decode(known.space, published[known.space]) if known is not None and known.space in published else None
        if former is not None and former.space.name == space:
            console.print(f"{alias} stands for {space} already")
            return
        with _reading([new, former] if former else [], address) as progressed:
            against = promoting.objections(former, new, address, progressed)
        if against:
            for objection in against:
                click.echo(objection, err=True)
            raise CrossrepError(f"{space} is not promoted. All the same: crossrep space promote {space} --as {alias} --yes")
    before = promoting.promote(alias, space, address)
    console.print(f"{alias} stands for {space}" + (f"; back again: crossrep space promote {before} --as {alias} --yes" if before else ""))


@contextmanager
def _reading(both: list[Published], address: str) -> Iterator[comparing.Progressed]:
    """A bar on the error stream, so that --json stays JSON."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    total = 0
    if both:
        entities = comparing.shared(both[0].space, both[1].space)
        total = sum(changelog.sizes(published.space, entities, address) for published in both)
    columns = (TextColumn("records"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("", total=total)
        yield lambda offsets: progress.advance(task, offsets)


def _entities(pairs: list[EntityPair]) -> Table:
    table = Table("entity", "keys", "of A in B", "events", "stream time", box=None)
    for pair in pairs:
        keys, events = f"{pair.a.keys:,} → {pair.b.keys:,}", f"{pair.a.events:,} → {pair.b.events:,}"
        table.add_row(pair.entity, keys, f"{pair.coverage:.2%}", events, f"{_stream(pair.a)} → {_stream(pair.b)}")
    return table


def _columns(pairs: list[EntityPair]) -> Table:
    table = Table("column", "keys that have it", "weight p10, p50, p90: A", "B", "same neighbours", "by chance", "sample", box=None)
    for pair in pairs:
        for column in pair.columns:
            covered = " → ".join(f"{count:,}" for count in column.covered)
            near = ("", "", "")
            if column.overlap is not None and column.by_chance is not None:
                near = (f"{column.overlap:.1%}", f"{column.by_chance:.1%}", f"{column.sampled:,}")
            table.add_row(f"{pair.entity}.{column.name}", covered, *map(_weights, column.weights), *near)
    return table


def _workers(standing: dict[str, dict[str, Standing]]) -> Table:
    table = Table("space", "workers", "members", "behind", box=None)
    for name, of in standing.items():
        for each in of.values():
            if each.used:
                table.add_row(name, each.role, ", ".join(each.members) or "nobody", f"{each.lag:,}")
        if not any(each.used for each in of.values()):
            table.add_row(name, "never any")
    return table


def _weights(weights: Weights) -> str:
    return "" if weights is None else ", ".join(f"{weight:.3g}" for weight in weights)


def _stream(side: Side) -> str:
    return "none" if side.stream_time is None else _time(side.stream_time)


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")
