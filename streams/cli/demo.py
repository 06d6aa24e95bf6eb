"""The commands that send events: a data set's, simulated ones, the demo."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from crossrep import kafka
from crossrep.cli import bootstrap_option, cli, console, resolve, space_option
from models.cli import dataset as dataset_of
from models.cli import simulator_options

if TYPE_CHECKING:
    from models.datasets import Dataset

Command = TypeVar("Command", bound=Callable[..., Any])


def _publish_options(command: Command) -> Command:
    for option in (
        bootstrap_option,
        click.option("--limit", type=click.IntRange(1), help="Stop after that many impressions."),
        click.option("--rate", type=click.FloatRange(0, min_open=True), help="Events a second. Default: as fast as Kafka takes them."),
        space_option,
    ):
        command = option(command)
    return command


@cli.command()
@click.argument("source", type=click.Choice(["kuairand"]))
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@_publish_options
def publish(source: str, folder: Path, space: str, bootstrap: str | None, rate: float | None, limit: int | None) -> None:
    """Send features, impressions and clicks of a real data set, in event-time order: crossrep publish kuairand DIR --space SPACE."""
    _publish(dataset_of(source, folder, {}), space, bootstrap, rate, limit)


@cli.command()
@simulator_options
@_publish_options
def simulate(space: str, bootstrap: str | None, rate: float | None, limit: int | None, **simulated: int) -> None:
    """Send features, impressions and clicks of a simulated platform: Zipf items, sessions, drifting interests. Any size, seeded."""
    _publish(dataset_of("simulated", None, simulated), space, bootstrap, rate, limit)


def _publish(dataset: Dataset, space: str, bootstrap: str | None, rate: float | None, limit: int | None) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from streams.demo import publish

    address = kafka.bootstrap_servers(bootstrap)
    inputs = resolve(space, address).inputs
    features = publish.publish_features(dataset, inputs, address)
    console.print(f"features of {features.users:,} users and {features.items:,} items are published")
    columns = (TextColumn("impressions"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=min(dataset.size, limit or dataset.size))
        sent = publish.publish_events(
            dataset, inputs, address, rate, limit, progressed=lambda sent: progress.update(task, completed=sent.impressions)
        )
    rate_seen = sent.events / max(sent.seconds, 1e-9)
    console.print(f"{sent.impressions:,} impressions and {sent.clicks:,} clicks in {sent.seconds:.1f} s ({rate_seen:,.0f} events/s)")


@cli.command()
@click.option(
    "--kuairand", type=click.Path(exists=True, file_okay=False, path_type=Path), help="KuaiRand's folder. Default: simulated events."
)
@simulator_options
@bootstrap_option
def demo(kuairand: Path | None, bootstrap: str | None, **simulated: int) -> None:
    """The main job end to end: Kafka, a space, training, workers, two weeks of events, freshness, and the proof. Exits 1 if it fails."""
    from streams.demo import job as whole

    dataset = dataset_of("kuairand" if kuairand else "simulated", kuairand, simulated)
    console.print(f"[bold]0[/] {dataset.size:,} impressions {'of KuaiRand' if kuairand else 'simulated (no KuaiRand folder given)'}")
    try:
        proved = whole.run(dataset, bootstrap, console)
    except KeyboardInterrupt:
        console.print("stopped; run it again whenever you like. Kafka keeps running: crossrep kafka down")
        sys.exit(130)
    sys.exit(0 if proved else 1)
