"""The workers' commands. Each imports what it needs when it runs, so that `--help` is quick and missing extras hurt only who needs them."""

from __future__ import annotations

import logging
import socket
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from crossrep import kafka
from crossrep.cli import bootstrap_option, cli, console, resolve, space_option

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
        click.option("--combine/--no-combine", default=True, show_default=True, help="Merge rows of one key inside a batch."),
        click.option("--max-delay", default=0.02, show_default=True, help="Seconds a batch waits for more events."),
        click.option("--max-batch", default=1024, show_default=True, help="Events a batch."),
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


def _dataset(source: str, folder: Path | None, simulated: dict[str, int]) -> Dataset:
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


def _simulator_options(command: Command) -> Command:
    for option in (
        click.option("--seed", default=0, show_default=True),
        click.option("--items", default=5_000, show_default=True),
        click.option("--users", default=20_000, show_default=True),
        click.option("--events", default=200_000, show_default=True, help="Impressions, spread over two weeks of event time."),
    ):
        command = option(command)
    return command


@cli.command()
@click.argument("source", type=click.Choice(["kuairand", "simulated"]))
@click.argument("folder", required=False, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="The model's folder.")
@_simulator_options
def train(source: str, folder: Path | None, out: Path, **simulated: int) -> None:
    """Train the upstream model on the first days: crossrep train kuairand DIR --out MODEL.

    Prints its AUC on later days beside logistic regression's. Weights are safetensors, with a JSON manifest.
    """
    from models import train as training

    metrics = training.train(_dataset(source, folder, simulated), out, seed=simulated["seed"])
    console.print(f"test AUC {metrics['auc']:.4f} (logistic regression: {metrics['logistic_auc']:.4f}); model in {out}")


@cli.command()
@click.argument("space")
@click.option("--model", "folder", required=True, type=click.Path(file_okay=False, path_type=Path), help="A folder `train` wrote.")
@_worker_options(6067)
@_pipeline_options
@click.option("--threads", default=1, show_default=True, help="CPU threads of the model.")
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "auto"]), default="float32", show_default=True, help="Never mix two in one space."
)
def infer(space: str, folder: Path, threads: int, dtype: str, verbose: bool, bootstrap: str | None, **options: Any) -> None:
    """Run the upstream model over impressions and clicks, and write frames, exactly once.

    SPACE is a published space's name, or its TOML file. Run several, each with its own --name, to share the work. SIGTERM finishes the
    batch under way and stops.
    """
    import torch

    from models import upstream
    from streams import infer as worker

    _logging(verbose)
    torch.set_num_threads(threads)
    address = kafka.bootstrap_servers(bootstrap)
    worker.run(resolve(space, address), address, upstream.load(folder, dtype=dtype), _pipeline_settings(**options))


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
@click.option("--slots", default=65_536, show_default=True, help="Most keys in memory per entity and partition.")
@click.option("--rocksdb-mb", default=256, show_default=True, help="RocksDB's cache and write buffers, all partitions together.")
@click.option("--min-free-mb", default=256, show_default=True, help="Least free space on the data folder's disk; with less, it waits.")
@click.option("--flush-rows", default=50_000, show_default=True, help="Dirty rows that flush a partition before its interval is over.")
@click.option("--session-timeout", default=10.0, show_default=True, help="Seconds of silence after which partitions move.")
def fold(
    space: str,
    bootstrap: str | None,
    name: str | None,
    port: int,
    verbose: bool,
    data: Path | None,
    slots: int,
    rocksdb_mb: int,
    flush_rows: int,
    session_timeout: float,
    min_free_mb: int,
) -> None:
    """Fold frames into representations, exactly once. Run as many as there are partitions, each with its own --name.

    SPACE is a published space's name, or its TOML file. SIGTERM flushes and stops.
    """
    from streams import fold as worker

    _logging(verbose)
    address = kafka.bootstrap_servers(bootstrap)
    options = worker.FoldOptions(
        name=name or socket.gethostname(),
        folder=data or kafka.home() / "fold",
        port=port,
        flush_rows=flush_rows,
        slots=slots,
        rocksdb_mb=rocksdb_mb,
        session_timeout=session_timeout,
        min_free_mb=min_free_mb,
    )
    worker.run(resolve(space, address), address, options)


@cli.command()
@click.argument("source", type=click.Choice(["kuairand"]))
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@_publish_options
def publish(source: str, folder: Path, space: str, bootstrap: str | None, rate: float | None, limit: int | None) -> None:
    """Send features, impressions and clicks of a real data set, in event-time order: crossrep publish kuairand DIR --space SPACE."""
    _publish(_dataset(source, folder, {}), space, bootstrap, rate, limit)


@cli.command()
@_simulator_options
@_publish_options
def simulate(space: str, bootstrap: str | None, rate: float | None, limit: int | None, **simulated: int) -> None:
    """Send features, impressions and clicks of a simulated platform: Zipf items, sessions, drifting interests. Any size, seeded."""
    _publish(_dataset("simulated", None, simulated), space, bootstrap, rate, limit)


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
@click.argument("space")
@click.option("--sample", metavar="SHARE", default="100%", help='Only a share of the keys, chosen by hash: "1%".')
@click.option("--live", metavar="DURATION", help='Take the state now as given, watch for so long ("60s"), and verify what came since.')
@click.option("--as-is", is_flag=True, help="Do not wait until the frames already written are folded.")
@click.option("--events", is_flag=True, help="Compare counts with the source events too. Needs a quiet moment.")
@click.option(
    "--stores",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="Instead: compare a worker's RocksDB (FOLDER/partition-N) with the changelog. The worker may be running.",
)
@bootstrap_option
def verify(space: str, sample: str, live: str | None, as_is: bool, events: bool, stores: Path | None, bootstrap: str | None) -> None:
    """Prove the state: every key against an independent float64 computation over all recorded frames. Exits 1 if anything differs.

    Works while events flow. Where retention has deleted the first frames: --live 60s. Where there are too many keys: --sample 1%.
    """
    from rich.progress import Progress

    from crossrep.spec import parse_duration
    from streams import crosschecks
    from streams import verify as proof

    if sum(map(bool, (stores, live, events))) > 1:
        raise click.UsageError("--live, --events and --stores exclude each other")
    try:
        watched = parse_duration(live) if live else 0.0
    except ValueError as error:
        raise click.UsageError(f"--live {live!r} is {error}") from None
    share = _share(sample)
    address = kafka.bootstrap_servers(bootstrap)
    known = resolve(space, address)
    found: list[proof.Verdict | crosschecks.Check] = []
    if stores:
        with console.status("reading stores and changelog"):
            checks = crosschecks.stores(known, address, stores, share)
        console.print(crosschecks.table(checks))
        found += checks
    else:
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("watching, then recomputing" if live else "recomputing from frames", total=None)

            def progressed(done: int, total: int) -> None:
                progress.update(task, completed=done, total=total)

            verdicts = proof.verify(known, address, progressed, share, watched, as_is)
        console.print(proof.table(verdicts))
        found += verdicts
    if events:
        with console.status("counting events"):
            checks = crosschecks.events(known, address, share)
        console.print(crosschecks.table(checks))
        found += checks
    for difference in found:
        for example in difference.examples:
            click.echo(f"  {example}")
    if any(difference.differences for difference in found):
        raise click.ClickException(f"differences found: {sum(difference.differences for difference in found):,}")


def _share(text: str) -> float:
    """`"1%"` or `"0.01"` as 0.01."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise click.UsageError(f'--sample {text!r} is no share of the keys: write "1%" or "0.01"')
    return share


@cli.command()
@click.argument("space")
@click.option("--strict", is_flag=True, help="Exit 1 on warnings too.")
@click.option("--production", is_flag=True, help="Judge a cluster of one broker as strictly as one of several.")
@click.option(
    "--reassignment",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Also write a file for kafka-reassign-partitions.sh: three replicas of everything.",
)
@bootstrap_option
def doctor(space: str, strict: bool, production: bool, reassignment: Path | None, bootstrap: str | None) -> None:
    """Check the cluster's settings and the workers' lag, and name the commands that mend. Exits 1 on a problem. Changes nothing."""
    import json

    from streams import cluster_facts
    from streams import doctor as examination

    address = kafka.bootstrap_servers(bootstrap)
    facts = cluster_facts.gather(resolve(space, address), address, production)
    findings = examination.examine(facts)
    console.print(examination.table(findings))
    for finding in (finding for finding in findings if finding.fixes):
        console.print(f"\nto mend {finding.check}:", style="bold")
        for fix in finding.fixes:
            click.echo(f"  {fix}")  # as it is, to be copied: neither wrapped nor coloured
    if reassignment is not None:
        reassignment.write_text(json.dumps(examination.reassignment(facts)))
    status = examination.Status
    count = {kind: sum(finding.status is kind for finding in findings) for kind in status}
    click.echo("\n" + "  ".join(f"{kind}: {count[kind]}" for kind in status))
    if count[status.PROBLEM] or (strict and count[status.WARNING]):
        sys.exit(1)


@cli.command()
@click.argument("entity")
@click.argument("id")
@space_option
@bootstrap_option
@click.option("--check", is_flag=True, help="Give no order: only look what is still recorded, if anything. Exits 1 then.")
def forget(entity: str, id: str, space: str, bootstrap: str | None, check: bool) -> None:
    """Erase a key: crossrep forget user 17 --space kuairand-v1.

    The order goes to the frames topic, so it is ordered with the stream: what came before is deleted everywhere, what comes behind begins
    anew. Stop its events at the source first. Waits until the order is folded, then lists what the brokers still hold on disk, and when
    that is gone.
    """
    from crossrep.forget import Forget
    from streams import erasure

    address = kafka.bootstrap_servers(bootstrap)
    known, key = resolve(space, address), Forget(entity, id.encode())
    if not check:
        order = erasure.order(known, address, key)
        console.print(f"ordered at {known.frames_topic}[{order.partition}]@{order.offset}; waiting until it is folded")
        erasure.wait(known, address, order)
        console.print(f"forgotten: state, disk and readers no longer hold what was known of {entity} {id}")
    with console.status("reading what is still recorded"):
        found = erasure.traces(known, address, key)
    console.print(erasure.table(found))
    if any(trace.records for trace in found):
        console.print(f"what is left goes at the times above; then prove it: crossrep forget {entity} {id} --space {space} --check")
        sys.exit(int(check))
    console.print("nothing of it is left")


@cli.command()
@click.argument("space")
@click.option("--to", type=click.DateTime(), help="UTC, by the brokers' clock: 2026-01-31T12:00:00.")
@click.option("--ago", metavar="DURATION", help='Instead of --to: "90m", "3h".')
@click.option(
    "--keep-frames",
    is_flag=True,
    help="Fold the frames since again. Default: leave them out, and read their events again.",
)
@click.option("--dry-run", is_flag=True, help="Only say what would happen.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@bootstrap_option
def rewind(space: str, bootstrap: str | None, to: datetime | None, ago: str | None, keep_frames: bool, dry_run: bool, yes: bool) -> None:
    """Take the state back to an earlier time, and make what came since again: crossrep rewind kuairand-v1 --ago 3h.

    For when a bad model has written nonsense. Stop all fold and infer workers, rewind, and start them with the good model: the events
    since are read again, the nonsense is left out. How far back that goes, the space's `history` says.
    """
    from rich.progress import Progress

    from crossrep.spec import parse_duration
    from streams import rewind as rewinding

    if (to is None) == (ago is None):
        raise click.UsageError("say when: --to TIME or --ago DURATION")
    try:
        moment = int(to.replace(tzinfo=UTC).timestamp() if to else time.time() - parse_duration(ago))
    except ValueError as error:
        raise click.UsageError(f"--ago {ago!r} is {error}") from None
    address = kafka.bootstrap_servers(bootstrap)
    known = resolve(space, address)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("reading what the frames since were made of", total=None)
        plan = rewinding.plan(
            known, address, moment, not keep_frames, lambda done, total: progress.update(task, completed=done, total=total)
        )
    console.print(rewinding.table(plan))
    for group, places in plan.rereads.items():
        where = ", ".join(f"{topic}[{number}] from {offset:,}" for (topic, number), offset in sorted(places.items()))
        console.print(f"{group} reads again: {where}")
    if plan.foreign:
        console.print(f"[yellow]{plan.foreign:,} frames behind the cut were written by others' models: their writers must send again[/]")
    if dry_run or not (yes or click.confirm("rewind?")):
        return
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("writing former records", total=len(plan.steps))
        rewinding.apply(known, address, plan, lambda: progress.advance(task))
    console.print("rewound. Start the workers again; readers see the former state now")


@cli.command()
@click.option(
    "--kuairand", type=click.Path(exists=True, file_okay=False, path_type=Path), help="KuaiRand's folder. Default: simulated events."
)
@_simulator_options
@bootstrap_option
def demo(kuairand: Path | None, bootstrap: str | None, **simulated: int) -> None:
    """The main job end to end: Kafka, a space, training, workers, two weeks of events, freshness, and the proof. Exits 1 if it fails."""
    from streams import demo as whole

    dataset = _dataset("kuairand" if kuairand else "simulated", kuairand, simulated)
    console.print(f"[bold]0[/] {dataset.size:,} impressions {'of KuaiRand' if kuairand else 'simulated (no KuaiRand folder given)'}")
    try:
        proved = whole.run(dataset, bootstrap, console)
    except KeyboardInterrupt:
        console.print("stopped; run it again whenever you like. Kafka keeps running: crossrep kafka down")
        sys.exit(130)
    sys.exit(0 if proved else 1)
