"""The commands of Kafka: a broker on this machine, a space's topics."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from crossrep import kafka
from crossrep.cli import bootstrap_option, cli, console, resolve

if TYPE_CHECKING:
    from streams.broker import Broker


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
