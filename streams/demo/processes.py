"""The demo's workers: started as processes, asked over HTTP, stopped in order."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from crossrep import kafka
from crossrep.errors import CrossrepError
from streams import broker

ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def workers(spec: Path, model: Path, console: Console) -> Iterator[dict[str, int]]:
    """Two fold workers and one inference worker, as processes; SIGTERMed and awaited at the end. Gives each one's port."""
    ports = {name: broker.free_port() for name in ("fold-0", "fold-1", "infer-0")}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    logs = kafka.home() / "demo" / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    processes: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, port in ports.items():
            kind = name.split("-")[0]
            command = [sys.executable, "-m", "crossrep", kind, str(spec), "--name", name, "--port", str(port)]
            with (logs / f"{name}.log").open("wb") as log:
                # A session of its own: Ctrl-C reaches the demo alone, which then stops the workers in order.
                processes[name] = subprocess.Popen(
                    [*command, *(["--model", str(model)] if kind == "infer" else [])],
                    stdout=log,
                    stderr=log,
                    env=environment,
                    start_new_session=True,
                )
        with console.status("workers are starting"):
            for name, port in ports.items():
                until(lambda name=name, port=port: _alive(processes[name], logs / f"{name}.log") and _ready(port), f"{name} is ready", 90)
        yield ports
    finally:
        for process in processes.values():
            process.send_signal(signal.SIGTERM)
        for process in processes.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def _ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=2) as response:
            return bool(json.load(response)["ready"])
    except (OSError, http.client.HTTPException):  # URLError is an OSError; a killed worker may end within its answer
        return False


def metric(port: int, name: str) -> float:
    """The sum of a metric over its labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{")[0].split(" ")[0] == name)


def _alive(process: subprocess.Popen[bytes], log: Path) -> bool:
    if process.poll() is not None:
        raise CrossrepError(f"{log.stem} has ended: {log.read_text(errors='replace')[-1500:]}")
    return True


def until(condition: Any, what: str, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise CrossrepError(f"not within {timeout:.0f} s: {what}; the workers' logs are in {kafka.home() / 'demo' / 'logs'}")
        time.sleep(0.1)
