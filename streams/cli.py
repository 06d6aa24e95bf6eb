"""The workers' commands. Each imports what it needs when it runs, so that `--help` is quick and missing extras hurt only who needs them."""

from __future__ import annotations

import logging
import socket
from pathlib import Path

import click
from rich.table import Table

from crossrep import kafka
from crossrep.cli import bootstrap_option, cli, console, resolve


@cli.group("kafka")
def kafka_group() -> None:
    """A real single-node Apache Kafka on this machine, without Docker or Java."""


@kafka_group.command("up")
@click.option("--port", type=int, help="Default: a free one, kept from then on.")
def kafka_up(port: int | None) -> None:
    """Start it (the first time fetches 45 MB of jars). Other commands find it by themselves."""
    from streams import broker

    running = broker.up(kafka.home() / "kafka", port=port)
    console.print(f"Kafka {broker.KAFKA_VERSION} runs at {running.bootstrap} (pid {running.pid}, data in {running.folder})")


@kafka_group.command("down")
@click.option("--wipe", is_flag=True, help="Delete its data too.")
def kafka_down(wipe: bool) -> None:
    """Stop it; its data is kept."""
    from streams import broker

    stopped = broker.down(kafka.home() / "kafka")
    if wipe:
        broker.wipe(kafka.home() / "kafka")
    console.print("stopped" if stopped else "was not running")


@kafka_group.command("status")
def kafka_status() -> None:
    """Is it running, and where? Exits 1 if not."""
    from streams import broker

    running = broker.status(kafka.home() / "kafka")
    if running is None:
        raise click.ClickException("not running. Start it: crossrep kafka up")
    console.print(f"running at {running.bootstrap} (pid {running.pid}, data in {running.folder})")


@cli.group("topics")
def topics_group() -> None:
    """A space's topics, derived from its TOML."""


@topics_group.command("create")
@click.argument("spec", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--replication", default=1, show_default=True, help="3 in production, with min.insync.replicas 2.")
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


def _worker_options(default_port: int):  # type: ignore[no-untyped-def]
    def decorate(command):  # type: ignore[no-untyped-def]
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


@cli.command()
@click.argument("space")
@_worker_options(6066)
@click.option("--data", type=click.Path(file_okay=False, path_type=Path), help="Data folder. Default: CROSSREP_HOME/fold.")
@click.option("--slots", default=65_536, show_default=True, help="Most keys in memory per entity and partition.")
@click.option("--rocksdb-mb", default=256, show_default=True, help="RocksDB's cache and write buffers, all partitions together.")
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
    )
    worker.run(resolve(space, address), address, options)


@cli.command()
@click.argument("space")
@bootstrap_option
def verify(space: str, bootstrap: str | None) -> None:
    """Prove the state: every key against an independent float64 computation over all recorded frames. Exits 1 if anything differs."""
    from rich.progress import Progress

    from streams import verify as proof

    address = kafka.bootstrap_servers(bootstrap)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("recomputing from frames", total=None)
        verdicts = proof.verify(resolve(space, address), address, lambda done, total: progress.update(task, completed=done, total=total))
    console.print(verdict_table(verdicts))
    if any(verdict.differences for verdict in verdicts):
        raise click.ClickException("state and frames differ")


def verdict_table(verdicts) -> Table:  # type: ignore[no-untyped-def]
    """Verdicts as people read them."""
    table = Table("entity", "keys", "events", "wrong counts", "worst vector", "worst weight", "differences", box=None)
    for v in verdicts:
        worst = (f"{v.worst_vector:.1e}", f"{v.worst_weight:.1e}")
        table.add_row(v.entity, f"{v.keys:,}", f"{v.events:,}", str(v.wrong_counts), *worst, str(v.differences))
    return table
