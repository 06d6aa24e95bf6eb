"""A system of its own in a folder: Kafka, workers, a supervisor that restarts them as systemd or Kubernetes would, load and readers."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from crossrep import LocalView
from streams import broker
from streams.demo import publish
from tests import cluster
from tests.chaos.load import Load
from tests.chaos.observer import Observer
from tests.streams import small_model

log = logging.getLogger("chaos")

SESSION = 3.0  # seconds, of every worker
RESTART_AFTER = 0.5  # seconds from a worker's end to its next start
PATIENCE = 180.0  # seconds within which everything must work again
ENDS = (0, 1, -signal.SIGKILL, -signal.SIGTERM)  # exit codes behind which a restart goes on; 3 is "refused"

# So that a worker that is stuck can be asked where.
_TELLS_ITS_STACKS = "import faulthandler, signal; faulthandler.register(signal.SIGUSR1, all_threads=True)"
# `time.time` as on a machine whose clock is wrong; monotonic clocks are not touched.
_SHIFTED = "import time; _now = time.time; time.time = lambda: _now() + {seconds}"


class Stuck(Exception):
    """The system did not come back by itself."""


@dataclass
class Worker:
    """One worker by name, over all its processes."""

    name: str
    process: subprocess.Popen[bytes]
    port: int
    log: Path
    kept: bool  # whether the supervisor starts it again when it ends
    ended: float | None = None  # time.monotonic() when the supervisor first saw it ended


class World:
    """Everything one run owns. A context manager that leaves no process behind."""

    def __init__(
        self,
        folder: Path,
        *,
        brokers: int = 1,
        rate: float = 1000.0,
        seed: int = 1,
        folds: int = 2,
        infers: int = 2,
        clocks: Mapping[str, float] | None = None,
    ):
        """`clocks`: names of workers whose clocks are at first so many seconds ahead."""
        self.folder, self.brokers = folder, brokers
        self.folds = [f"f{i}" for i in range(folds)]  # the workers that run between faults
        self.infers = [f"i{i}" for i in range(infers)]
        self.is_open = False  # whether all was ever well
        self.restarts = 0  # by the supervisor
        self.problems: list[str] = []  # each is a difference
        self._rate, self._seed, self._clocks = rate, seed, clocks or {}
        self._workers: dict[str, Worker] = {}
        self._lock = threading.RLock()  # of workers' starts and ends
        self._closed = threading.Event()
        self._processes = cluster.Workers(folder)

    # --- life ---

    def __enter__(self) -> World:
        try:
            self._open()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _open(self) -> None:
        self.bootstrap = self.start_broker().bootstrap
        self.space, self._spec = cluster.new_space(self.bootstrap, self.folder, small_model.SPEC, replication=self.brokers)
        dataset = small_model.small_dataset()
        publish.publish_features(dataset, self.space.inputs, self.bootstrap)
        self.load = Load(self.space, dataset, self.bootstrap, self._rate, self._seed)
        self.observer = Observer(self.space, self.bootstrap)
        self.views = {entity: self.view(entity) for entity in self.space.entities}  # kept open through everything
        self.observer.start()
        for name in [*self.folds, *self.infers]:
            self.start(name, clock=self._clocks.get(name, 0.0))
        threading.Thread(target=self._supervise, name="supervisor", daemon=True).start()
        self.load.start()
        self.load.resume()
        self.wait_until_well()
        self.is_open = True

    def close(self) -> None:
        """End every thread and process."""
        self._closed.set()
        with self._lock:  # nothing is started from here on
            self._processes.kill_all()
        for part in ("load", "observer"):
            if hasattr(self, part):
                getattr(self, part).stop()
        for view in getattr(self, "views", {}).values():
            view.close()
        broker.down(self.folder / "kafka", kill=True)

    def start_broker(self) -> broker.Broker:
        """Start the cluster, or what is down of it, on its old ports."""
        return broker.up(self.folder / "kafka", brokers=self.brokers, progress=False, timeout=120)

    def view(self, entity: str) -> LocalView:
        return LocalView(entity, self.space.name, self.bootstrap)

    # --- workers ---

    def start(self, name: str, *, fault: str | None = None, clock: float = 0.0, kept: bool = True) -> None:
        """Start a worker.

        Args:
            fault: the fault point at which it is to be killed.
            clock: seconds its clock is ahead.
            kept: whether the supervisor starts it again when it ends.
        """
        port = cluster.free_port()
        options = ["--name", name, "--port", str(port), "--session-timeout", str(SESSION), "--bootstrap", self.bootstrap]
        if name.startswith("f"):
            command = ["fold", str(self._spec)]
        else:
            command = ["infer", str(self._spec), "--model", str(small_model.small_model())]
            if not self.is_open:
                command += ["--start", "earliest"]  # the other team's frames may be there first; a new group is then asked where to begin
        with self._lock:
            if self._closed.is_set():
                return
            if name in self._workers:
                self._note_end(self._workers[name])
            before = "\n".join([_TELLS_ITS_STACKS, *([_SHIFTED.format(seconds=clock)] if clock else [])])
            path = self.folder / f"{len(self._processes.running)}-{command[0]}.log"
            process = self._processes.start(*command, *options, fault=fault, before=before)
            self._workers[name] = Worker(name, process, port, path, kept)
        log.info("start %s: pid %d, %s%s", name, process.pid, path.name, f", {fault}" if fault else "")

    def kill(self, name: str) -> None:
        """SIGKILL; a kept worker comes back by itself."""
        process = self._workers[name].process
        log.info("SIGKILL %s", name)
        process.kill()
        process.wait()

    def release(self, name: str) -> None:
        """The supervisor forgets this worker: when it ends, it stays away."""
        with self._lock:
            self._workers[name].kept = False

    def stop(self, *names: str) -> float:
        """SIGTERM and wait. Seconds until the last one had ended; they stay away."""
        started = time.monotonic()
        for name in names:
            self.release(name)
            log.info("SIGTERM %s", name)
            self._workers[name].process.terminate()
        for name in names:
            self._ends(name, 60)
        return time.monotonic() - started

    def signal(self, name: str, number: signal.Signals) -> None:
        log.info("%s %s", number.name, name)
        self._workers[name].process.send_signal(number)

    def await_fault(self, name: str, fault: str) -> None:
        """Wait until a worker that was started with a fault has been killed by it."""
        code = self._ends(name, PATIENCE)
        if code != -signal.SIGKILL:
            self.problems.append(f"{name} was to die at {fault}, but ended with {code}: {self._workers[name].log}")

    def _ends(self, name: str, timeout: float) -> int:
        process = self._workers[name].process
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.problems.append(f"{name} did not end within {timeout:.0f} s: {self._workers[name].log}")
            process.kill()
            return process.wait()

    def stores(self, name: str) -> Path:
        """The folder of a fold worker's RocksDBs."""
        return self.folder / "home" / "fold" / self.space.name / name

    def _supervise(self) -> None:
        while not self._closed.wait(0.1):
            with self._lock:
                for worker in list(self._workers.values()):
                    self._note_end(worker)
                    if worker.kept and worker.ended and time.monotonic() > worker.ended + RESTART_AFTER:
                        self.restarts += 1
                        self.start(worker.name)

    def _note_end(self, worker: Worker) -> None:
        code = worker.process.poll()
        if code is None or worker.ended is not None:
            return
        worker.ended = time.monotonic()
        log.info("%s ended with %d", worker.name, code)
        if code not in ENDS:
            worker.kept = False
            self.problems.append(f"{worker.name} ended with {code}, which asks for a person: {worker.log}")

    # --- is all well? ---

    def owners(self) -> dict[int, tuple[str, int]]:
        """Who folds each partition number: the worker's name and its process id."""
        found = {}
        for name, worker in list(self._workers.items()):
            if name.startswith("f") and worker.process.poll() is None:
                found.update(dict.fromkeys(_about(worker.port)[1].get("flowing", ()), (name, worker.process.pid)))
        return found

    def is_flowing(self) -> bool:
        """Does each partition flow at exactly one worker?"""
        flowing = [number for name in self._alive("f") for number in _about(self._workers[name].port)[1].get("flowing", ())]
        return sorted(flowing) == list(range(self.space.partitions))

    def is_well(self) -> bool:
        """Are all workers there and ready, and does each partition flow at exactly one?"""
        if any(worker.kept and worker.process.poll() is not None for worker in self._workers.values()):
            return False
        return all(_about(self._workers[name].port)[0] for name in self._alive()) and self.is_flowing()

    def _alive(self, kind: str = "") -> list[str]:
        return [name for name, worker in list(self._workers.items()) if name.startswith(kind) and worker.process.poll() is None]

    def wait_until_well(self) -> None:
        """Raises Stuck."""
        well_since: float | None = None
        deadline = time.monotonic() + PATIENCE
        while well_since is None or self.observer.went_on_since(well_since) != set(range(self.space.partitions)):
            if not self.is_well():
                well_since = None
            elif well_since is None:
                well_since = time.monotonic()
            if (problems := self.all_problems()) or time.monotonic() > deadline:
                raise Stuck("; ".join(problems) or f"not all was well within {PATIENCE:.0f} s: {self.state()}")
            time.sleep(0.2)

    def tell_stacks(self) -> None:
        """Have every worker write the stacks of its threads into its log."""
        for name in self._alive():
            self.signal(name, signal.SIGUSR1)
        time.sleep(1)

    def all_problems(self) -> list[str]:
        return self.problems + self.load.problems + self.observer.problems

    def state(self) -> str:
        """One line on every worker and partition."""
        said = []
        for name, worker in sorted(self._workers.items()):
            code = worker.process.poll()
            said.append(f"{name}: {_about(worker.port) if code is None else f'ended with {code}'} ({worker.log.name})")
        return f"{'; '.join(said)}; partitions of the representations that went on in the last 5 s: {self._went_on()}"

    def _went_on(self) -> list[int]:
        return sorted(self.observer.went_on_since(time.monotonic() - 5))


def _about(port: int) -> tuple[bool, dict[str, list[int]]]:
    """What a worker says at /ready; (False, {}) if it says nothing."""
    with contextlib.suppress(OSError, ValueError, http.client.HTTPException):  # it may be killed while it answers
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=2) as response:
                return True, json.load(response)
        except urllib.error.HTTPError as error:
            return False, json.load(error)
    return False, {}


def until(condition: Callable[[], bool], what: str, timeout: float = PATIENCE) -> None:
    """Wait for something. Raises Stuck."""
    try:
        cluster.wait_for(condition, what, timeout)
    except AssertionError as error:
        raise Stuck(str(error)) from None
