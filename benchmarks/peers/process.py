"""A peer's process: started, watched, stopped."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from benchmarks.common import ROOT
from crossrep.errors import CrossrepError

STOP_SECONDS = 60.0
_INTERRUPTED = {0, 128 + signal.SIGTERM, -signal.SIGTERM}  # what a program may end with that was told to


class Process:
    """One program, which prints `first <time>` when it has its first row, and lives until its stdin ends."""

    def __init__(self, command: list[str], folder: Path, environment: dict[str, str]):
        self.log = folder / "log"
        self.started = time.time()
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, cwd=folder, env={**environment, "PYTHONPATH": str(ROOT)}
            )
        self._watched = psutil.Process(self._process.pid)

    def wait(self, done: Callable[[], bool], what: str, timeout: float = 600.0) -> None:
        """Wait until `done`.

        Raises:
            CrossrepError: the program ended, or it took too long.
        """
        deadline = time.monotonic() + timeout
        while not done():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise CrossrepError(f"{what}: the program ended or took over {timeout:.0f} s:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.02)

    def first(self) -> float | None:
        """When (seconds since 1970) it had its first row; None if it has not."""
        # Faust's control codes for the terminal may precede it on its line.
        found = re.search(r"first (\d+\.\d+)$", self.log.read_text(errors="replace"), re.MULTILINE)
        return float(found[1]) if found else None

    def cpu(self) -> float:
        """CPU seconds used so far, all threads."""
        times = self._watched.cpu_times()
        return float(times.user + times.system)

    def peak_rss(self) -> int:
        """Bytes, the most it ever had; where Linux does not tell, what it has now."""
        with suppress(OSError):
            peak = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{self._watched.pid}/status").read_text())
            if peak:
                return int(peak[1]) * 1024
        return int(self._watched.memory_info().rss)

    def stop(self) -> None:
        """End its stdin, and wait for it.

        Raises:
            CrossrepError: it failed.
        """
        assert self._process.stdin is not None
        self._process.stdin.close()
        if (code := self._process.wait(STOP_SECONDS)) not in _INTERRUPTED:
            raise CrossrepError(f"the program ended with {code}:\n{self.log.read_text(errors='replace')[-3000:]}")

    def kill(self) -> None:
        """End it at once, if it lives."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


@contextmanager
def process(command: list[str], folder: Path, environment: dict[str, str] | None = None) -> Iterator[Process]:
    """Run a program; whatever is left of it in the end is killed."""
    running = Process(command, folder, dict(os.environ) if environment is None else environment)
    try:
        yield running
    finally:
        running.kill()
