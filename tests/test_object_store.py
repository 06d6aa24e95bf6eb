"""Snapshots, archives and the registry over the API of S3: written, killed, listed, read and removed. The server is moto's."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import s3fs
from click.testing import CliRunner
from moto.server import ThreadedMotoServer

from crossrep import kafka
from crossrep.archive.store import Archive
from crossrep.cli import cli
from crossrep.columnar import frames
from crossrep.snapshots.store import Store
from crossrep.spec import Space
from models import upstream
from models.registry import Registry, resolve
from tests.cluster import ROOT, Load, new_space
from tests.crossrep.snapshot_world import Changelog
from tests.streams.small_model import small_model


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """An URL; what finds its server is in the environment, as it is for users."""
    server = ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3fs.S3FileSystem().mkdir("crossrep")
        yield "s3://crossrep"
    server.stop()


def crossrep(*args: str) -> str:
    done = CliRunner().invoke(cli, args, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def killed(imports: str, before: str, call: str) -> None:
    """Run `call` in a process that is killed where `before` puts `die`."""
    code = f"import os, signal\n{imports}\ndef die(*args): os.kill(os.getpid(), signal.SIGKILL)\n{before}\n{call}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


def counts(space: Space, bootstrap: str) -> dict[str, int]:
    """Events of all frames, by entity."""
    found = dict.fromkeys(space.entities, 0)
    for message in kafka.messages(bootstrap, space.frames_topic, kafka.bounds(bootstrap, space.frames_topic)):
        rows = frames.decode(space, message.value(), message.timestamp()[1] / 1000, message.partition())
        found[rows.entity] += int(rows.counts.sum())
    return found


def test_snapshots(bucket: str, bootstrap: str, tmp_path: Path) -> None:
    (space, _), (new, _) = new_space(bootstrap, tmp_path, partitions=2), new_space(bootstrap, tmp_path, partitions=3)
    log, store = Changelog(space, bootstrap), Store(f"{bucket}/snapshots", space.name)
    log.put("user", list(range(300)), 1)
    log.put("item", list(range(40)), 2)
    killed(
        "from crossrep.control import spaces; from crossrep.snapshots import taking; from crossrep.snapshots.store import Store",
        "Store.publish = die",  # with all files there
        f"taking.take(spaces.find({space.name!r}), {bootstrap!r}, Store({store.url!r}, {space.name!r}))",
    )
    assert len(store.ids()) == 1 and store.published() == []
    assert f"none of '{space.name}'" in crossrep("snapshots", space.name, "--from", store.url)
    for _ in range(2):
        crossrep("snapshot", space.name, "--to", store.url, "--keep", "1")
    assert len(store.ids()) == 1, "what was killed, and the older one, are gone"
    assert "300 user, 40 item" in crossrep("snapshots", space.name, "--from", store.url)
    answer = crossrep("sql", "select count(*), sum(count) from user", "--space", space.name, "--from", store.url, "--format", "csv")
    assert answer.splitlines()[1] == "300,900"
    assert "340 rows of snapshot" in crossrep("import", space.name, "--into", new.name, "--from", store.url)
    assert counts(new, bootstrap) == {"user": 900, "item": 120}


def test_archives(bucket: str, bootstrap: str, tmp_path: Path) -> None:
    (space, _), (new, _) = new_space(bootstrap, tmp_path, partitions=2), new_space(bootstrap, tmp_path, partitions=3)
    load, store = Load(space, bootstrap), Archive(f"{bucket}/archive", space.name)
    load.send(300)
    killed(
        "from crossrep.files import places\nfrom crossrep.archive.store import Archive\nfrom crossrep.archive.archiving import archive",
        "put, left = places.put, [4]\n"  # the space's description and two files later
        "def counted(*args):\n    left[0] -= 1\n    (put if left[0] else die)(*args)\nplaces.put = counted",
        f"archive({space.name!r}, {bootstrap!r}, Archive({store.url!r}, {space.name!r}))",
    )
    assert sum(len(store.listed(entity)) for entity in space.entities) == 2 and store.cut() is None
    load.send(200)
    for _ in range(2):
        crossrep("archive", space.name, "--to", store.url, "--keep", "1d", "--erase", "--compact")
    listed = crossrep("archived", space.name, "--from", store.url)
    assert "500" in listed and "complete up to cut" in listed
    for _ in range(2):  # the second time nothing is left to do
        crossrep("replay", space.name, "--into", new.name, "--archive", store.url, "--to", f"{bucket}/replayed")
    assert counts(new, bootstrap) == load.counts


def test_the_registry(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry, folder = Registry(f"{bucket}/models"), small_model()
    killed(
        "from pathlib import Path\nfrom crossrep.files.publication import Folders\nfrom models.registry import Registry",
        "Folders.finish = die",
        f"Registry({registry.url!r}).add(Path({str(folder)!r}), 'small')",
    )
    assert registry.versions("small") == [] and registry.names() == []
    with ThreadPoolExecutor(4) as pool:  # numbers are given by conditional writes
        entries = list(pool.map(lambda _: registry.add(folder, "small"), range(4)))
    assert sorted(entry.reference for entry in entries) == ["small@2", "small@3", "small@4", "small@5"]
    assert [entry.reference for entry in registry.versions("small")] == ["small@2", "small@3", "small@4", "small@5"]
    monkeypatch.setenv("CROSSREP_HOME", str(tmp_path))
    fetched, identity = resolve("small@latest", registry.url)
    model, ours = upstream.load(fetched), upstream.load(folder)
    assert identity.label == "small@5" and model.outputs == ours.outputs
    inputs = [np.zeros((1, len(model.features[kind])), np.int32) for kind in ("user", "item", "event")]
    assert all((model.forward(*inputs)[name] == value).all() for name, value in ours.forward(*inputs).items())
