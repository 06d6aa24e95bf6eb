"""The command itself, what its modules share, and look-ups: get, similar."""

from __future__ import annotations

import importlib.util
import sys
from datetime import UTC, datetime

import click
from rich.console import Console
from rich.table import Table

from crossrep.control import spaces
from crossrep.errors import CrossrepError
from crossrep.spec import Space
from crossrep.views.view import LocalView

console = Console(width=None if sys.stdout.isatty() else 130)  # not the 80 columns rich assumes of a pipe

HELP = """Streaming, exactly-once aggregation of user, item and cross representations.

\b
The flow, and the commands in the order you meet them:
  crossrep kafka up                      a real Kafka on this machine (or set KAFKA_BOOTSTRAP)
  crossrep topics create SPEC.toml       a space: one model version, one aggregation spec
  crossrep train kuairand DIR            the upstream model (or: train simulated)
  crossrep models list                   the registry: versions of models
  crossrep infer SPACE --model MODEL     events → representations of every sample, as frames
  crossrep fold SPACE                    frames → one exactly-once average per user and item
  crossrep publish kuairand DIR          events (or: crossrep simulate)
  crossrep get user 17 --space SPACE     what a reader sees
  crossrep serve SPACE                   look-ups over HTTP, for services
  crossrep snapshot SPACE                the state as Parquet, exact at recorded offsets
  crossrep sql "select ..."              SQL over a snapshot
  crossrep drift                         what moved between two snapshots
  crossrep history user 17               what happened to a key
  crossrep import SPACE --into NAME      seed a new space with a snapshot
  crossrep archive SPACE                 keep all samples as Parquet
  crossrep replay SPACE --into NAME      fill a new space from the archive, and hand over to the live stream
  crossrep samples SPACE                 impressions and clicks → labelled samples
  crossrep training-set SPACE            samples, with what was known before each, as Parquet
  crossrep leaks SPACE                   does a training set know the future?
  crossrep space promote SPACE           readers of `current` switch to it; space list, compare, retire
  crossrep verify SPACE                  proof: state against all recorded frames, also while they flow
  crossrep doctor SPACE                  production settings, and what mends them
  crossrep forget user 17 --space SPACE  erase a key, in the stream's order
  crossrep rewind SPACE --ago 3h         take back what a bad model has written
  crossrep study transfer DIR --out OUT  what representations are worth on real data; also: upstreams, retrieval, gca
`make demo` runs all of it. Every command explains itself with --help."""


class Commands(click.Group):
    """Lists commands in the order they were added, which is the flow's."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=Commands, help=HELP)
@click.version_option(package_name="crossrep")
def cli() -> None:
    pass


bootstrap_option = click.option(
    "--bootstrap", metavar="HOST:PORT", help="The Kafka cluster. Default: KAFKA_BOOTSTRAP, or the broker `crossrep kafka up` started."
)
space_option = click.option(
    "--space", required=True, envvar="CROSSREP_SPACE", metavar="NAME", help="A published space, such as kuairand-v1; to read, current too."
)


def resolve(space: str, bootstrap: str | None) -> Space:
    """A space by name, as published, or by its TOML file."""
    return Space.load(space) if space.endswith(".toml") else spaces.find(space, bootstrap).space


@cli.command()
@click.argument("entity")
@click.argument("ids", nargs=-1, required=True)
@space_option
@bootstrap_option
@click.option("--at", type=click.DateTime(), help="Decay weights to this time, UTC. Default: the stream's own time.")
@click.option("--vectors", is_flag=True, help="Print the vectors too.")
def get(entity: str, ids: tuple[str, ...], space: str, bootstrap: str | None, at: datetime | None, vectors: bool) -> None:
    """What a reader sees of one or more ids: crossrep get user 17 --space kuairand-v1."""
    with LocalView(entity, space, bootstrap) as view:
        view.wait(300)
        answer = view.get(ids, at.replace(tzinfo=UTC).timestamp() if at else None)
    table = Table("id", "events", "newest event", "column", "weight", "newest in column", "|vector|", box=None)
    for i, id in enumerate(ids):
        if not answer.found[i]:
            table.add_row(id, "not found")
            continue
        for n, (name, values) in enumerate(answer.items()):
            about = (id, str(answer.counts[i]), _time(answer.event_times[i])) if n == 0 else ("", "", "")
            norm = float((values.vectors[i].astype(float) ** 2).sum() ** 0.5)
            weight = "" if values.weights[i] != values.weights[i] else f"{values.weights[i]:.6g}"
            table.add_row(*about, name, weight, _time(values.times[i]), f"{norm:.4f}" if values.vectors.shape[1] else "")
            if vectors:
                table.add_row("", "", "", "", "", "", " ".join(f"{x:.5g}" for x in values.vectors[i]))
    console.print(table)
    if answer.found.any():
        console.print(f"of {answer.space}, weights decayed to {_time(float(answer.at))}", style="dim")
    if not answer.found.all():
        console.print(
            f"[dim]no event of them is folded: never seen, expired, forgotten, or workers are behind. See: crossrep doctor {space}"
        )
        sys.exit(1)


@cli.command()
@click.argument("entity")
@click.argument("id")
@space_option
@bootstrap_option
@click.option("--column", help="Whose vectors to compare. Default: the entity's `latest` column, such as ir, or else its first.")
@click.option("-k", default=10, show_default=True, help="How many.")
def similar(entity: str, id: str, space: str, bootstrap: str | None, column: str | None, k: int) -> None:
    """Nearest ids by cosine: crossrep similar item 17 --space kuairand-v1 --column cr."""
    with LocalView(entity, spaces.resolve(space, bootstrap).space.name, bootstrap) as view:
        view.wait(300)
        columns = {name: c for name, c in view.space.entities[entity].columns.items() if c.dim}
        chosen = column or next((name for name, c in columns.items() if c.aggregate == "latest"), next(iter(columns), ""))
        try:
            nearest = view.nearest(chosen, id, k)
        except KeyError as error:
            raise CrossrepError(error.args[0]) from None
        counts = view.get([name for name, _ in nearest]).counts
    table = Table(entity, f"cosine of {chosen}", "events", box=None)
    for (name, cosine), count in zip(nearest, counts):
        table.add_row(name, f"{cosine:.4f}", str(count))
    console.print(table)


def _time(seconds: float) -> str:
    if not -1e11 < seconds < 1e11:
        return "never"
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")


def main() -> None:
    """The console script's entry."""
    for package in ("models", "streams", "serve", "study"):
        if importlib.util.find_spec(package) is not None:
            importlib.import_module(f"{package}.cli")  # adds its commands; absent where only the readers' package is installed
    try:
        cli(standalone_mode=False)
    except click.exceptions.Exit as exit:
        sys.exit(exit.exit_code)
    except click.Abort:
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (CrossrepError, TimeoutError) as error:
        click.secho(f"crossrep: {error}", fg="red", err=True)
        sys.exit(1)
