"""The commands around upstream models: training, daily training with its gate, the registry. Each imports what it needs when it runs."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from rich.table import Table

from crossrep.cli import bootstrap_option, cli, console, resolve

if TYPE_CHECKING:
    from models.daily import State
    from models.datasets import Dataset
    from models.registry import Entry

Command = TypeVar("Command", bound=Callable[..., Any])

registry_option = click.option(
    "--registry",
    "url",
    envvar="CROSSREP_REGISTRY",
    metavar="URL",
    help="A folder, or an URL such as s3://bucket/models. Default: CROSSREP_REGISTRY, or CROSSREP_HOME/models.",
)


def simulator_options(command: Command) -> Command:
    for option in (
        click.option("--seed", default=0, show_default=True),
        click.option("--items", default=5_000, show_default=True),
        click.option("--users", default=20_000, show_default=True),
        click.option("--events", default=200_000, show_default=True, help="Impressions, spread over two weeks of event time."),
    ):
        command = option(command)
    return command


def dataset(source: str, folder: Path | None, simulated: dict[str, int]) -> Dataset:
    """The data set a command names: KuaiRand in a folder, or the simulator."""
    if source == "kuairand":
        from models.datasets import kuairand

        if folder is None:
            raise click.UsageError("kuairand needs its folder: crossrep ... kuairand DIR (the data: https://kuairand.com)")
        return kuairand.load(folder)
    from models.datasets import simulator

    try:
        return simulator.simulate(**simulated)
    except ValueError as error:
        raise click.UsageError(str(error)) from None


@cli.command()
@click.argument("source", type=click.Choice(["kuairand", "simulated"]))
@click.argument("folder", required=False, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Train once: the model's folder.")
@click.option("--resume", type=click.Path(file_okay=False, path_type=Path), metavar="DIR", help="Train daily: where the state is kept.")
@click.option("--samples", metavar="PATH", help="Learn from these samples (Parquet) instead of SOURCE's log; features stay SOURCE's.")
@click.option("--shared-branch", is_flag=True, help="One branch for ads and content, instead of one each.")
@click.option("--task", "tasks", multiple=True, metavar="LABEL", help="Predict it besides the click: long_view, is_like ... Repeatable.")
@click.option("--epochs", type=click.IntRange(1), default=1, show_default=True, help="Once: at most so many passes.")
@click.option(
    "--patience", type=click.IntRange(1), help="Once: end after so many passes without a better AUC on later days; keep the best."
)
@click.option("--device", default="cpu", show_default=True, help="Once: cpu, cuda, cuda:1, or auto: CUDA where there is one.")
@click.option("--mixed", is_flag=True, help="Once: multiply in bfloat16 where the device does so in hardware.")
@click.option(
    "--rates/--no-rates", default=None, help="Once: click rates and counts of ids, of the training days, as features too. Default: yes."
)
@click.option("--first-days", type=click.IntRange(1), default=7, show_default=True, help="Daily: learnt together, to begin with.")
@click.option("--until", type=click.DateTime(["%Y-%m-%d"]), help="Daily: the last day to learn. Default: all there are.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Daily: AUC by day, as FILE.svg or .png.")
@click.option("--name", help="Register the model under this name. Daily: if the gate lets it pass.")
@click.option("--tolerance", type=click.FloatRange(0), default=0.001, show_default=True, help="Daily: AUC that a new version may lose.")
@click.option("--for-space", metavar="SPACE", help="Register the model for this space alone.")
@registry_option
@simulator_options
def train(
    source: str,
    folder: Path | None,
    out: Path | None,
    resume: Path | None,
    samples: str | None,
    shared_branch: bool,
    tasks: tuple[str, ...],
    epochs: int,
    patience: int | None,
    device: str,
    mixed: bool,
    rates: bool | None,
    name: str | None,
    for_space: str | None,
    url: str | None,
    first_days: int,
    until: datetime | None,
    plot: Path | None,
    tolerance: float,
    **simulated: int,
) -> None:
    """Train the upstream model: once, on the first days (--out), or day by day, going on where the last run was (--resume).

    \b
      crossrep train kuairand DIR --out model
      crossrep train kuairand DIR --out model --task long_view --epochs 4 --patience 1 --device auto --mixed
      crossrep train kuairand DIR --resume training --plot auc.svg --name kuairand

    Once: prints the AUC on later days beside logistic regression's. Cut off, the same command goes on where it was and ends with the same
    model; loss and AUC are beside the bar. Daily: every day is tested with the model that has learnt all days
    before it, then learnt from; a table shows each day's AUC beside that of the model that stopped after the first days. With --name, the
    newest model that has been tested is registered if its AUC on the newest day is no worse than the newest version's, less --tolerance.
    """
    if (out is None) == (resume is None):
        raise click.UsageError("give one of them: --out MODEL to train once, --resume DIR to train daily")
    if plot is not None and resume is None:
        raise click.UsageError("--plot shows days: it goes with --resume")
    if rates and resume is not None:
        raise click.UsageError("--rates are counted once, over all training days: they go with --out, not with --resume")
    data = dataset(source, folder, simulated)
    if samples is not None:
        from models.datasets import samples as labelled

        data = labelled.over(data, samples)
    architecture = {"shared": shared_branch, "tasks": list(tasks)}
    if resume is not None:
        state = _train_daily(data, resume, architecture, first_days, until.date() if until else None, simulated["seed"], plot)
        if name is not None and state is not None:
            _pass_gate(data, resume, url, name, tolerance, for_space)
    elif out is not None:
        from models import train as training

        options: dict[str, Any] = {"epochs": epochs, "patience": patience, "device": device, "mixed": mixed, "rates": rates is not False}
        metrics = training.train(data, out, seed=simulated["seed"], architecture=architecture, **options)
        console.print(f"test AUC {metrics['auc']:.4f} (logistic regression: {metrics['logistic_auc']:.4f}); model in {out}")
        if name is not None:
            _say_registered(_register(url, out, name, for_space))


def _train_daily(
    data: Dataset, folder: Path, architecture: dict[str, Any], first_days: int, until: date | None, seed: int, plot: Path | None
) -> State:
    from models import curves, daily

    state = daily.run(data, folder, first_days=first_days, until=until, seed=seed, architecture=architecture)
    tested = [day for day in state.days if day.auc is not None]
    if tested:
        console.print(curves.table(state.days))
    console.print(f"{len(state.days)} days are learnt, {state.days[0].date} to {state.days[-1].date}, {len(tested)} of them tested before")
    if plot is not None:
        curves.plot(state.days, str(plot))
        console.print(f"plotted: {plot}")
    return state


def _pass_gate(data: Dataset, folder: Path, url: str | None, name: str, tolerance: float, space: str | None) -> None:
    from models import gate
    from models.registry import Registry

    verdict = gate.gate(data, folder, Registry(url), name, tolerance, space)
    console.print(gate.table(verdict))
    console.print(f"gate: {verdict.reason}")


def _register(url: str | None, folder: Path, name: str, space: str | None) -> Entry:
    from models.registry import Registry

    return Registry(url).add(folder, name, space=space)


def _say_registered(entry: Entry) -> None:
    console.print(f"registered as {entry.reference}. Run it: crossrep infer SPACE --model {entry.reference}")


@cli.group("models")
def models_group() -> None:
    """The registry of upstream models: versions that never change, referred to as NAME@3, the newest as NAME@latest."""


@models_group.command("list")
@click.argument("name", required=False)
@registry_option
def list_models(name: str | None, url: str | None) -> None:
    """All versions, or those of NAME, oldest first."""
    from models.registry import Registry, digest

    registry = Registry(url)
    table = Table("model", "registered", "trained until", "AUC", "for space", "in place of", "digest", box=None)
    for entry in (entry for each in ([name] if name else registry.names()) for entry in registry.versions(each)):
        known, metrics = entry.registered, entry.manifest.get("metrics") or {}
        former = f"{known.name}@{known.parent}" if known.parent else ""
        until, auc = str(entry.manifest.get("trained_until", "")), metrics.get("auc")
        figures = (until, f"{auc:.4f}" if auc is not None else "", known.space or "any")
        table.add_row(entry.reference, _moment(known.at), *figures, former, digest(entry.manifest, entry.reference)[:12])
    console.print(table)
    if not table.row_count:
        console.print(f"nothing in {registry.url}. Register a model: crossrep models add FOLDER NAME")


@models_group.command()
@click.argument("reference")
@registry_option
def show(reference: str, url: str | None) -> None:
    """All that is known of a version: crossrep models show kuairand@3."""
    from models.registry import Registry, digest

    entry = Registry(url).find(reference)
    manifest, known = entry.manifest, entry.registered
    table = Table(show_header=False, box=None)
    table.add_row("model", entry.reference)
    table.add_row("digest", digest(manifest, entry.reference))
    table.add_row("registered", f"{_moment(known.at)} by crossrep {known.crossrep}")
    table.add_row("for space", known.space or "any that it fits")
    table.add_row("in place of", f"{known.name}@{known.parent}" if known.parent else "none")
    for key, value in manifest.items():
        if key not in ("registered", "name"):
            table.add_row(key, _told(value))
    console.print(table)


@models_group.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("name")
@click.option("--for-space", metavar="SPACE", help="The only space it may write to. Default: any that it fits.")
@registry_option
def add(folder: Path, name: str, for_space: str | None, url: str | None) -> None:
    """Register the model in FOLDER as the next version of NAME: crossrep models add model kuairand."""
    _say_registered(_register(url, folder, name, for_space))


@models_group.command("get")
@click.argument("reference")
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@registry_option
def get_model(reference: str, folder: Path, url: str | None) -> None:
    """Copy a version to FOLDER, every file checked against its SHA-256: crossrep models get kuairand@3 model."""
    from models.registry import Registry

    registry = Registry(url)
    entry = registry.find(reference)
    registry.fetch(entry, folder)
    console.print(f"{entry.reference} is in {folder}")


@models_group.command("space")
@click.argument("reference")
@click.option("--like", required=True, metavar="SPACE", help="A published space's name, or its TOML file.")
@click.option("--name", help="The new space's. Default: the next number, such as kuairand-v2 after kuairand-v1.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="A new file instead of the terminal.")
@registry_option
@bootstrap_option
def make_space(reference: str, like: str, name: str | None, out: Path | None, url: str | None, bootstrap: str | None) -> None:
    """The TOML of a new space for a version: crossrep models space kuairand@2 --like kuairand-v1 --out spaces/kuairand-v2.toml.

    It aggregates as the old one does. The dims are the model's, of each output that a column takes; one that the model does not give is an
    error. REFERENCE may be a model's folder.
    """
    from crossrep.errors import DataError
    from models import declare, registry, upstream

    folder, identity = registry.resolve(reference, url)
    text = declare.declare(resolve(like, bootstrap), upstream.read_manifest(folder)["outputs"], identity.label, name)
    if out is None:
        click.echo(text, nl=False)
        return
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise DataError(f"{out} cannot be written: {error}") from None
    console.print(f"{out} is written. Create its topics: crossrep topics create {out}")


def _moment(at: datetime) -> str:
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S}"


def _told(value: object) -> str:
    """A manifest's value in one cell."""
    if isinstance(value, dict):
        return "\n".join(f"{key} {_told(inside)}" for key, inside in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
