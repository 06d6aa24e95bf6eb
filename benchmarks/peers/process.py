"""A peer's process: started, watched, stopped."""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.common import Process
from crossrep.errors import CrossrepError

STOP_SECONDS = 60.0
_INTERRUPTED = {0, 128 + signal.SIGTERM, -signal.SIGTERM}  # what a program may end with that was told to


class Peer(Process):
    """A peer's program: it prints `first <time>` when it has its first row, and lives until its stdin ends."""

    def first(self) -> float | None:
        """When (seconds since 1970) it had its first row; None if it has not."""
        # Faust's control codes for the terminal may precede it on its line.
        found = re.search(r"first (\d+\.\d+)$", self.log.read_text(errors="replace"), re.MULTILINE)
        return float(found[1]) if found else None

    def stop(self) -> None:
        """End its stdin, and wait for it.

        Raises:
            CrossrepError: it failed.
        """
        assert self._process.stdin is not None
        self._process.stdin.close()
        if (code := self._process.wait(STOP_SECONDS)) not in _INTERRUPTED:
            raise CrossrepError(f"the program ended with {code}:\n{self.log.read_text(errors='replace')[-3000:]}")


@contextmanager
def process(command: list[str], folder: Path) -> Iterator[Peer]:
    """Run a program; whatever is left of it in the end is killed."""
    running = Peer(command, folder / "log", folder, subprocess.PIPE)
    try:
        yield running
    finally:
        running.kill()
