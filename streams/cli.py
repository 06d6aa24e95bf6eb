"""The workers' commands. Each imports what it needs when it runs: `--help` is quick, and missing extras hurt only who needs them."""

from __future__ import annotations

import logging
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from crossrep import kafka
from crossrep.cli import bootstrap_option, cli, console, resolve, space_option
from crossrep.cli.archive import Duration
from models.cli import dataset as dataset_of
from models.cli import registry_option, simulator_options
from streams import cli_operations as cli_operations  # adds the operators' commands

if TYPE_CHECKING:
    from models.datasets import Dataset
    from streams.broker import Broker
    from streams.pipeline import Options

Command = TypeVar("Command", bound=Callable[..., Any])


@cli.group("kafka")
def kafka_group() -> None:
    """A real Apache Kafka on this machine, without Docker or Java: one broker, or a cluster of three."""


@kafka_group.command("up")
@click.option("--port", type=int, help="The first broker's; a second and third take the next two. Default: free ones, kept from then on.")
@click.option("--brokers", type=int, help="1, or 3 to outlive the loss of one. Default: as many as there are data of, or 1.")
def kafka_up(port: int | None, brokers: int | None) -> None:
    """Start it (the first time fetches 45 MB of jars). Other commands find it by themselves.

    With --brokers 3 it is what production has on three machines: each record is kept three times and a write is acknowledged when two
    have it, so that any one broker may be killed, paused or lost, and the others go on within seconds. Each takes 150 to 500 MB of memory.
    To go from one to three, or back, wipe first: crossrep kafka down --wipe.

    Where it runs already, this starts those of its brokers that were lost.
    """
    from streams import broker

    running = broker.up(kafka.home() / "kafka", port=port, brokers=brokers)
    _print_kafka(f"Kafka {broker.KAFKA_VERSION} runs", running)


@kafka_group.command("down")
@click.option("--wipe", is_flag=True, help="Delete its data too.")
def kafka_down(wipe: bool) -> None:
    """Stop it, all of its brokers; its data is kept."""
    from streams import broker

    stopped = broker.down(kafka.home() / "kafka")
    if wipe:
        broker.wipe(kafka.home() / "kafka")
    console.print("stopped" if stopped else "was not running")


@kafka_group.command("status")
def kafka_status() -> None:
    """Is it running, and where? Of several brokers, a line for each. Exits 1 if not, or if too few answer to go on: 1 of 3."""
    from streams import broker

    running = broker.status(kafka.home() / "kafka")
    if running is None:
        raise click.ClickException("not running. Start it: crossrep kafka up")
    up = sum(node.answers for node in running.nodes)
    _print_kafka("running" if up == running.size else f"{up} of {running.size} brokers answer", running)
    if up <= running.size // 2:
        raise click.ClickException("too few brokers answer: without a majority nothing can be written. Start the others: crossrep kafka up")


def _print_kafka(what: str, running: Broker) -> None:
    if running.size == 1:
        console.print(f"{what} at {running.bootstrap} (pid {running.pid}, data in {running.folder})")
        return
    console.print(f"{what} at {running.bootstrap} (data in {running.folder})")
    nodes = {node.number: node for node in running.nodes}
    for number, address in enumerate(running.bootstrap.split(","), 1):
        node = nodes.get(number)
        if node is None:
            state = "stopped. Start it: crossrep kafka up"
        else:
            state = f"{'answers' if node.answers else 'runs but does not answer'} (pid {node.pid})"
        console.print(f"  broker {number} at {address}: {state}")


@cli.group("topics")
def topics_group() -> None:
    """A space's topics, derived from its TOML."""


@topics_group.command("create")
@click.argument("spec", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--replication", default=-1, help="Replicas of new topics. Default: the cluster's. In production 3.")
@bootstrap_option
def topics_create(spec: Path, replication: int, bootstrap: str | None) -> None:
    """Create what is missing, check what exists, publish the space. Safe to repeat."""
    from crossrep.spec import Space
    from streams import topics

    space = Space.load(spec)
    created = topics.create(space, kafka.bootstrap_servers(bootstrap), replication)
    for name in created:
        console.print(f"created {name}")
    console.print(f"space {space.name} (hash {space.hash.hex()}) is published; {len(created)} topics created")


@topics_group.command("check")
@click.argument("space")
@bootstrap_option
def topics_check(space: str, bootstrap: str | None) -> None:
    """Do the topics and the published space fit? What every worker asks before it starts."""
    from streams import topics

    address = kafka.bootstrap_servers(bootstrap)
    topics.check(resolve(space, address), address)
    console.print(f"{space}: everything fits")


def _worker_options(default_port: int) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for option in (
            click.option("-v", "--verbose", is_flag=True, help="Log everything, Faust and aiokafka too."),
            click.option("--port", default=default_port, show_default=True, help="Of /ready and /metrics."),
            click.option("--name", help="Stable name of this worker, unique in its space. Default: the host's name."),
            bootstrap_option,
        ):
            command = option(command)
        return command

    return decorate


def _logging(verbose: bool) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname).1s %(name)s: %(message)s")
    for name in ("streams", "state", "crossrep", "models"):
        logging.getLogger(name).setLevel(logging.INFO)
    if verbose:
        logging.getLogger().setLevel(logging.INFO)


def _pipeline_options(command: Command) -> Command:
    for option in (
        click.option("--session-timeout", default=10.0, show_default=True, help="Seconds of silence after which partitions move."),
        click.option(
            "--start",
            type=click.Choice(["earliest", "latest"]),
            help="Where to begin without offsets in a space that has frames.",
        ),
        click.option("--combine/--no-combine", default=None, help="Merge rows of one key inside a batch. Default: as the space declares."),
        click.option("--max-delay", default=0.02, show_default=True, help="Seconds a batch waits for more events."),
        click.option("--max-batch", default=4096, show_default=True, help="Events a batch."),
    ):
        command = option(command)
    return command


def _pipeline_settings(**options: Any) -> Options:
    from streams.pipeline import Options

    return Options(**{**options, "name": options["name"] or socket.gethostname()})


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
@click.argument("space")
@click.option("--model", "reference", required=True, metavar="MODEL", help="A folder `train` wrote, or a registered version: kuairand@3.")
@registry_option
@_worker_options(6067)
@_pipeline_options
@click.option("--threads", default=1, show_default=True, help="CPU threads of the model.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    show_default=True,
    help="Of the model. auto: bfloat16 where the CPU multiplies it in hardware and the model's vectors stay the same, else float32.",
)
@click.option(
    "--accept-model",
    is_flag=True,
    help="Take the place of the model that has written to SPACE until now. Right if both give the same vectors (it was converted), or if "
    "nothing of the former one is left (after a rewind to before its first frame).",
)
def infer(
    space: str,
    reference: str,
    url: str | None,
    threads: int,
    dtype: str,
    accept_model: bool,
    verbose: bool,
    bootstrap: str | None,
    **options: Any,
) -> None:
    """Run the upstream model over impressions and clicks, and write frames, exactly once.

    SPACE is a published space's name, or its TOML file. Run several, each with its own --name, to share the work. SIGTERM finishes the
    batch under way and stops. A space takes the vectors of one model only: the first worker's. Another one is refused.
    """
    import torch

    from models import registry, upstream
    from streams import infer as worker

    _logging(verbose)
    torch.set_num_threads(threads)
    address = kafka.bootstrap_servers(bootstrap)
    folder, identity = registry.resolve(reference, url)
    found = resolve(space, address)
    model = upstream.load(folder, outputs=tuple(found.sources), dtype=dtype)
    worker.run(found, address, model, identity, _pipeline_settings(**options), accept_model)


@cli.command()
@click.argument("files")
@click.option("--model", "reference", required=True, metavar="MODEL", help="A folder `train` wrote, or a registered version: kuairand@3.")
@registry_option
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="A folder for files of the same names.")
@space_option
@bootstrap_option
def represent(files: str, reference: str, url: str | None, out: Path, space: str, bootstrap: str | None) -> None:
    """Parquet of events → Parquet of samples, for a replay: crossrep represent 'events/*.parquet' --model MODEL --out samples --space NAME.

    The model's outputs are added to the columns user_id, item_id, event, event_time, scenario and branch. Features are those published
    now. Then: crossrep replay 'samples/*.parquet' --into NAME
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from models import registry, upstream
    from streams import represent as representing

    address = kafka.bootstrap_servers(bootstrap)
    folder, identity = registry.resolve(reference, url)
    columns = (TextColumn("events"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)

        def progressed(events: int, total: int) -> None:
            bar.update(task, total=total)
            bar.advance(task, events)

        total = representing.represent(files, resolve(space, address), upstream.load(folder), identity, address, out, progressed)
    console.print(f"{total:,} samples in {out}")


@cli.command()
@click.argument("space")
@_worker_options(6068)
@_pipeline_options
def frame(space: str, verbose: bool, bootstrap: str | None, **options: Any) -> None:
    """Turn one-record-per-sample outputs of other teams' models (topic inference.SPACE) into frames, exactly once."""
    from streams import frame as worker

    _logging(verbose)
    address = kafka.bootstrap_servers(bootstrap)
    worker.run(resolve(space, address), address, _pipeline_settings(**options))


@cli.command()
@click.argument("space")
@_worker_options(6066)
@click.option("--data", type=click.Path(file_okay=False, path_type=Path), help="Data folder. Default: CROSSREP_HOME/fold.")
@click.option(
    "--slots",
    type=click.IntRange(1),
    help="Most keys in memory per entity and partition.  [default: 65,536, doubled as often as half of the memory suffices at the worst]",
)
@click.option("--rocksdb-mb", default=256, show_default=True, help="RocksDB's write buffers, all partitions together.")
@click.option("--min-free-mb", default=256, show_default=True, help="Least free space on the data folder's disk; with less, it waits.")
@click.option("--flush-rows", default=200_000, show_default=True, help="Rows that flush a partition before its interval is over.")
@click.option("--session-timeout", default=10.0, show_default=True, help="Seconds of silence after which partitions move.")
def fold(
    space: str,
    bootstrap: str | None,
    name: str | None,
    port: int,
    verbose: bool,
    data: Path | None,
    slots: int | None,
    rocksdb_mb: int,
    flush_rows: int,
    session_timeout: float,
    min_free_mb: int,
) -> None:
    """Fold frames into representations, exactly once. Run as many as there are partitions, each with its own --name.

    SPACE is a published space's name, or its TOML file. SIGTERM flushes and stops.
    """
    from streams import fold as worker
    from streams import memory

    _logging(verbose)
    address = kafka.bootstrap_servers(bootstrap)
    found = resolve(space, address)
    options = worker.FoldOptions(
        name=name or socket.gethostname(),
        folder=data or kafka.home() / "fold",
        port=port,
        flush_rows=flush_rows,
        rocksdb_mb=rocksdb_mb,
        session_timeout=session_timeout,
        min_free_mb=min_free_mb,
    )
    worker.run(found, address, replace(options, slots=slots or memory.slots_within(found, options, memory.installed() // 2)))


@cli.command()
@click.argument("space")
@_worker_options(6069)
@click.option("--window", type=Duration(), default="30m", show_default=True, help="A click labels an impression for so long.")
@click.option("--lateness", type=Duration(), default="30m", show_default=True, help="How late an event may be; costs memory.")
@click.option("--start", type=click.Choice(["earliest", "latest"]), help="Where to begin without offsets in a space that has samples.")
@click.option("--session-timeout", default=10.0, show_default=True, help="Seconds of silence after which partitions move.")
def samples(space: str, verbose: bool, bootstrap: str | None, name: str | None, **options: Any) -> None:
    """Join impressions with their clicks, by event time, to labelled samples on topic samples.SPACE, exactly once.

    SPACE is a published space's name, or its TOML file. A sample is written when the window behind its impression is over, and again, under
    the same sample id, should a late click change its label. Run as many as the impressions have partitions, each with its own --name.
    Then: crossrep training-set SPACE.
    """
    from streams import samples as worker

    _logging(verbose)
    address = kafka.bootstrap_servers(bootstrap)
    chosen = worker.Options(name=name or socket.gethostname(), folder=kafka.home() / "samples", **options)
    worker.run(resolve(space, address), address, chosen)


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

    from streams import publish

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
    from streams import demo as whole

    dataset = dataset_of("kuairand" if kuairand else "simulated", kuairand, simulated)
    console.print(f"[bold]0[/] {dataset.size:,} impressions {'of KuaiRand' if kuairand else 'simulated (no KuaiRand folder given)'}")
    try:
        proved = whole.run(dataset, bootstrap, console)
    except KeyboardInterrupt:
        console.print("stopped; run it again whenever you like. Kafka keeps running: crossrep kafka down")
        sys.exit(130)
    sys.exit(0 if proved else 1)
