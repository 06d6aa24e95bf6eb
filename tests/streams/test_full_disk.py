"""A full disk: the worker says so, is not ready, loses nothing, and goes on by itself when there is space again."""

from __future__ import annotations

import json
import os
import shutil
import time
import urllib.error
import urllib.request
from pathlib import Path

from tests import cluster
from tests.cluster import Load, Workers, new_space, prove, ready, settled, wait_for

MB = 1 << 20


def said(port: int) -> dict[str, object]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=2) as response:
            return dict(json.load(response))
    except urllib.error.HTTPError as error:
        return dict(json.load(error))
    except OSError:
        return {}


def fill(file: Path, size: int) -> None:
    with file.open("wb") as out:
        os.posix_fallocate(out.fileno(), 0, size)


def test_it_waits_for_space_and_goes_on(bootstrap: str, workers: Workers, tmp_path: Path) -> None:
    space, path = new_space(bootstrap, tmp_path, partitions=2)
    load, port = Load(space, bootstrap), cluster.free_port()
    ballast, room = tmp_path / "ballast", 300 * MB
    least = str((shutil.disk_usage(tmp_path).free - room) // MB)
    worker = workers.fold(path, "w0", "--min-free-mb", least, port=port)
    wait_for(lambda: ready(port), "ready")
    load.send(500)
    wait_for(lambda: settled(space, bootstrap), "folded")
    fill(ballast, 2 * room)
    load.send(500)
    wait_for(lambda: said(port).get("disk_full") is True, "it says that the disk is full, and is not ready")
    assert not ready(port)
    assert "is full" in workers.logs()
    time.sleep(4)  # longer than its session: it must stay a member
    assert not settled(space, bootstrap)
    assert worker.poll() is None, "it waits"
    ballast.unlink()
    wait_for(lambda: ready(port) and settled(space, bootstrap), "it goes on by itself")
    fill(ballast, 2 * room)
    load.send(500)
    wait_for(lambda: said(port).get("disk_full") is True, "full again")
    started = time.monotonic()
    worker.terminate()
    assert worker.wait(10) == 0, workers.logs()
    assert time.monotonic() - started < 3, "SIGTERM is quick also then"
    port = cluster.free_port()
    workers.fold(path, "w0", "--min-free-mb", least, port=port)
    wait_for(lambda: said(port).get("disk_full") is True, "it starts, and waits")
    ballast.unlink()
    wait_for(lambda: ready(port) and settled(space, bootstrap), "and goes on")
    prove(space, bootstrap, load.counts)
