"""Quix Streams, in a virtual environment of its own: it wants an older confluent-kafka and pydantic than we do."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.common import console
from crossrep import kafka
from crossrep.errors import CrossrepError

PACKAGES = ("quixstreams==3.28.0", "numpy==2.4.6")
GUARANTEES = {"quix": "at-least-once", "quix-once": "exactly-once"}


def command(name: str, bootstrap: str, topic: str, application: str, rows: int, folder: Path) -> list[str]:
    """The command line of one run, whose state lies in `folder`. At its defaults: a commit every 5 s."""
    where = [bootstrap, topic, application, str(rows), str(folder / "state")]
    return [str(prepare()), "-m", "benchmarks.peers.quix_program", *where, GUARANTEES[name]]


def prepare() -> Path:
    """The environment's Python; the first time it is installed."""
    folder = (kafka.home() / "peers" / PACKAGES[0]).resolve()
    python = folder / "bin" / "python"
    if (folder / "installed").exists():
        return python
    shutil.rmtree(folder, ignore_errors=True)  # interrupted
    with console.status(f"installing {PACKAGES[0]}"):
        for step in (
            [sys.executable, "-m", "venv", str(folder)],
            [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PACKAGES],
        ):
            done = subprocess.run(step, capture_output=True, text=True, check=False)
            if done.returncode:
                raise CrossrepError(f"cannot install {PACKAGES[0]}:\n{done.stdout}{done.stderr}")
    (folder / "installed").touch()
    return python
