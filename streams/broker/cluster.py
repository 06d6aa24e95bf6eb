"""Starts and stops the nodes of a folder's Kafka, and says which of them live."""

from __future__ import annotations

import base64
import os
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from streams.broker import jars, server
from streams.broker.jars import KAFKA_VERSION, BrokerError
from streams.broker.ports import free_port, ports
from streams.broker.record import Record
from streams.broker.server import Place

START = 60.0  # seconds that nodes have to answer when they are started
ANSWER = 3.0  # seconds that a node has to answer `status`


@dataclass(frozen=True)
class Node:
    """A node whose process lives. One that is paused, or still starting, does not answer."""

    number: int  # from 1
    address: str
    pid: int
    answers: bool = True


@dataclass(frozen=True)
class Broker:
    """A Kafka that runs: the addresses of all its nodes, comma-separated; the nodes that live; the folder that holds all it owns."""

    bootstrap: str
    nodes: tuple[Node, ...]
    folder: Path

    @property
    def pid(self) -> int:
        """The process of the only broker; of the first that lives where there are several."""
        return self.nodes[0].pid

    @property
    def size(self) -> int:
        """How many brokers there are, those that do not run included."""
        return len(self.bootstrap.split(","))


def up(folder: Path, *, port: int | None = None, brokers: int | None = None, progress: bool = True, timeout: float = START) -> Broker:
    """Return the Kafka of `folder`, starting each of its nodes that does not run.

    The first start fetches about 45 MB of jars into the Maven cache.

    Args:
        port: the first broker's; a second and third take the next two. Default: those of the last start, or free ones.
        brokers: 1, or 3 that keep each record three times. Default: as many as the folder has data of, or 1.
        timeout: seconds that what is started has to answer.

    Raises:
        BrokerError: the folder has data of another number of brokers, or they cannot be started.
    """
    folder = _folder(folder)
    with _locked(folder), _bar(progress) as bar:
        record = Record.of(folder)
        size = _size(folder, record)
        brokers = brokers or size or 1
        if brokers not in (1, 3):
            # Of two controllers neither may be lost, so two brokers would be worse than one.
            raise BrokerError(f"cannot start {brokers} brokers: 1, or 3 to outlive the loss of one")
        if size not in (0, brokers):
            raise BrokerError(
                f"{folder} has the data of {_counted(size)}, and {_counted(brokers)} cannot go on with them; "
                f"ask for {size}, or wipe them first: crossrep kafka down --wipe"
            )
        wanted = tuple(port + number for number in range(brokers)) if port else None
        if _living(folder, record):
            if wanted not in (None, record.ports):
                raise BrokerError(f"the broker of {folder} already runs on {record.bootstrap}; stop it before asking for port {port}")
        else:
            record = Record(wanted or ports(record.ports[:brokers], brokers), (), (0,) * brokers)
        # It may still be starting, if whoever started it was killed meanwhile: so even those that run are waited for.
        record = _start(folder, record, set(range(1, brokers + 1)), bar, timeout)
        return Broker(record.bootstrap, _nodes(folder, record), folder)


def down(folder: Path, *, kill: bool = False) -> bool:
    """Stop the Kafka of `folder`, keeping its data; `kill` does it at once, as a crash would. False when none of it ran."""
    return _stop(folder, None, kill)


def stop_node(folder: Path, number: int, *, kill: bool = False) -> bool:
    """Stop one node, keeping its data; `kill` does it at once, as a crash would. False when it did not run.

    Raises:
        BrokerError: there is no such node.
    """
    return _stop(folder, number, kill)


def start_node(folder: Path, number: int) -> Node:
    """Start one node that was stopped, on the same port and data, and wait until it answers and is in service.

    Its replicas may be catching up still. A node whose process lives is only waited for.

    Raises:
        BrokerError: there is no such node, it does not answer in time, or too few others run for it to be of use.
    """
    folder = folder.expanduser().resolve()
    _check_number(folder, number)
    with _locked(folder), _bar(False) as bar:
        record = Record.of(folder)
        together = _living(folder, record).keys() | {number}
        if len(together) < _majority(len(record.ports)):
            raise BrokerError(
                f"node {number} of {folder} cannot serve alone: no other node runs, and controllers need a majority, "
                f"{_majority(len(record.ports))} of {len(record.ports)}; start all of them together with `up`"
            )
        record = _start(folder, record, {number}, bar, START)
        return next(node for node in _nodes(folder, record) if node.number == number)


def wipe(folder: Path) -> None:
    """Remove the topics, offsets and logs of the stopped Kafka of `folder`; its ports are kept for the next start.

    Raises:
        BrokerError: it runs, or the data cannot be removed.
    """
    folder = folder.expanduser().resolve()
    if not folder.is_dir():
        return
    with _locked(folder):
        living = _living(folder, Record.of(folder))
        if living:
            raise BrokerError(f"the broker of {folder} runs (pid {min(living.values())}); stop it before wiping its data")
        try:
            for path in (folder / "kafka-data", folder / "kafka-data.new", *folder.glob("node-*")):
                if path.exists():
                    shutil.rmtree(path)
            (folder / "server.log").unlink(missing_ok=True)
        except OSError as error:
            raise BrokerError(f"cannot remove the broker's data in {folder}: {error}; check the folder's permissions") from error


def status(folder: Path) -> Broker | None:
    """Return the Kafka of `folder` if any of its nodes answers, else None. Nodes that do not run are left out of `nodes`."""
    folder = folder.expanduser().resolve()
    record = Record.of(folder)
    nodes = _nodes(folder, record)
    if not nodes:
        return None
    with ThreadPoolExecutor(len(nodes)) as pool:
        answers = pool.map(lambda node: bool(server.answers(node.address, ANSWER)), nodes)
    nodes = tuple(replace(node, answers=answer) for node, answer in zip(nodes, answers))
    return Broker(record.bootstrap, nodes, folder) if any(node.answers for node in nodes) else None


def _size(folder: Path, record: Record) -> int:
    """How many brokers this folder has data of; 0 after a wipe."""
    if (folder / "kafka-data").exists():
        return 1
    numbers = [int(path.parent.name.removeprefix("node-")) for path in folder.glob("node-[0-9]/kafka-data")]
    return max(*numbers, len(record.ports), 0) if numbers else 0


def _majority(size: int) -> int:
    return size // 2 + 1


def _counted(size: int) -> str:
    return f"{size} broker{'s' * (size > 1)}"


def _check_number(folder: Path, number: int) -> None:
    size = len(Record.of(folder).ports)
    if not 1 <= number <= size:
        raise BrokerError(f"{folder} has no node {number}: it has {_counted(size) if size else 'no broker yet; start it with `up`'}")


def _living(folder: Path, record: Record) -> dict[int, int]:
    """The pids of the nodes whose processes live, by number."""
    numbered = zip(record.places(folder), record.pids)
    return {place.number: pid for place, pid in numbered if server.alive(pid, place.settings)}


def _nodes(folder: Path, record: Record) -> tuple[Node, ...]:
    living = _living(folder, record)
    return tuple(Node(place.number, place.address, living[place.number]) for place in record.places(folder) if place.number in living)


def _start(folder: Path, record: Record, numbers: set[int], bar: Progress, timeout: float) -> Record:
    """Start those of these nodes that do not run, and wait for all of them."""
    living = _living(folder, record)
    if not living:
        record = replace(record, controllers=ports((), len(record.ports), record.ports))
    places = [place for place in record.places(folder) if place.number in numbers]
    missing = [place for place in places if place.number not in living]
    begin: dict[int, int] = {}  # where their part of the log begins
    try:
        if missing:
            for place in missing:
                free_port(place.port)
                free_port(record.controllers[place.number - 1])
                place.folder.mkdir(exist_ok=True)
            java = jars.java(jars.jars(bar))
            bar.add_task(f"starting Kafka {KAFKA_VERSION} on {', '.join(place.address for place in missing)}", total=None)
            _format(java, [place for place in missing if not place.data.exists()], record.places(folder))
        for place in missing:
            begin[place.number] = place.log.stat().st_size if place.log.exists() else 0
            living[place.number] = server.launch(java, place)
            record = replace(record, pids=tuple(living.get(number, pid) for number, pid in enumerate(record.pids, 1)))
            record.write(folder)
        server.wait([(place, living[place.number], begin.get(place.number, 0)) for place in places], timeout)
    except BaseException as error:
        # Nobody would know of them, and they would keep the ports.
        server.end([(place, living[place.number]) for place in missing if place.number in living], signal.SIGKILL, 0)
        if isinstance(error, OSError):
            raise BrokerError(f"cannot start a broker in {folder}: {error}; check the folder's permissions and free space") from error
        raise
    return record


def _format(java: list[str], new: list[Place], all_: list[Place]) -> None:
    """Format the data folders of new nodes: all of a new cluster, or one whose data somebody deleted."""
    known = [place.data / "meta.properties" for place in all_ if place.data.exists()]
    if known:
        lines = known[0].read_text().splitlines()
        cluster = next(line.partition("=")[2] for line in lines if line.startswith("cluster.id="))
    else:
        # A cluster id is 16 bytes in URL-safe base64 and must not start with a dash.
        cluster = base64.urlsafe_b64encode(b"crossrep" + os.urandom(8)).decode().rstrip("=")
    # Formatted beside and renamed, so that an interrupted format never passes for a formatted folder.
    with ThreadPoolExecutor(3) as pool:
        formatted = list(pool.map(lambda place: server.formatted(java, place, cluster), new))
    for place, fresh in zip(new, formatted):
        fresh.rename(place.data)


def _stop(folder: Path, number: int | None, kill: bool) -> bool:
    folder = folder.expanduser().resolve()
    if number is not None:
        _check_number(folder, number)
    elif not (folder / "broker.json").exists():
        return False
    with _locked(folder):
        record = Record.of(folder)
        living = _living(folder, record)
        nodes = [
            (place, living[place.number]) for place in record.places(folder) if place.number in living and number in (None, place.number)
        ]
        others = len(living) - len(nodes)
        server.end(nodes, signal.SIGKILL if kill else signal.SIGTERM, _majority(len(record.ports)) - others)
        return bool(nodes)


def _folder(folder: Path) -> Path:
    folder = folder.expanduser().resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BrokerError(f"cannot use {folder} for a broker: {error}; name a folder that can be written") from error
    return folder


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with jars.locked(folder / ".lock"):
        yield


def _bar(show: bool) -> Progress:
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not (show and console.is_terminal))
