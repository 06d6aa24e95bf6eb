"""Seeding a space with a snapshot: bit by bit where vectors are float32, once however often it is killed, and only where it fits."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from crossrep import CrossrepError, FrameWriter, SpaceError, kafka
from crossrep.cli import cli
from crossrep.columnar.records import RecordLayout
from crossrep.control import binding, spaces
from crossrep.control.binding import Model
from crossrep.errors import DataError
from crossrep.files import parquet
from crossrep.rollout.seeding import import_group, marker, seed
from crossrep.snapshots.store import Manifest, Store
from crossrep.spec import Space
from tests.cluster import ROOT, SPEC, Workers, free_port, new_space, prove, settled, wait_for
from tests.crossrep.snapshot_world import Changelog, Rows, rows, seen, snapshot

ENTITIES = ("user", "item")
MODEL = Model("m@1", "1" * 64)
EXACT = SPEC.replace('flush = "50ms"', 'flush = "50ms"\nvectors = "float32"')
IDS: list[Any] = [*(f"u{i}" for i in range(900)), "ü", b"\xff", "o'hara"]


@pytest.fixture(scope="module")
def world(bootstrap: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Manifest]:
    """A snapshot of 1,203 rows in twelve row groups or more."""
    folder = tmp_path_factory.mktemp("seeding")
    space, _ = new_space(bootstrap, folder, partitions=2)
    binding.bind(spaces.find(space.name, bootstrap), MODEL, bootstrap)
    log = Changelog(space, bootstrap)
    log.put("user", IDS, 1)
    log.put("item", list(range(300)), 2)
    store = Store(str(folder / "snapshots"), space.name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet, "ROWS", 100)
        return store, snapshot(space, bootstrap, store)


def without_offsets(space: Space, entity: str, found: Rows) -> Rows:
    """Records but for what belongs to a space: the header, and the offsets of its frames."""
    layout, records = RecordLayout(space, entity), {}
    for key, value in found.items():
        record = np.frombuffer(value, layout.dtype).copy()
        record["header"], record["source_offset"] = b"", 0
        records[key] = record.tobytes()
    return records


def refuse_differences(store: Store, manifest: Manifest, space: Space, bootstrap: str) -> None:
    for entity in ENTITIES:
        expected = without_offsets(manifest.declared(), entity, rows(store, manifest, entity))
        assert without_offsets(space, entity, seen(bootstrap, space, entity)) == expected


def test_bit_by_bit_into_other_partitions_however_often_it_is_killed(
    world: tuple[Store, Manifest], bootstrap: str, workers: Workers, tmp_path: Path
) -> None:
    store, manifest = world
    space, path = new_space(bootstrap, tmp_path, EXACT, partitions=3)
    # Killed with frames of the n-th transaction sent, or right behind its commit.
    # The first transaction of all binds the space, the second commits the marker alone; each run goes on where the one before was.
    bound: list[Model | None] = []
    for moment, nth in (("before", 1), ("before", 2), ("before", 3), ("after", 3)):
        code = f"""
import os, signal
from crossrep import kafka
from crossrep.control import spaces
from crossrep.rollout import seeding
from crossrep.snapshots.store import Store
committed, retried = 0, kafka.retried
def counted(call, *more):
    global committed
    commits = getattr(call, "__name__", "") == "commit_transaction"
    committed += commits
    if commits and committed == {nth}:
        call.__self__.flush(30)
        if {moment == "after"}:
            retried(call, *more)
        os.kill(os.getpid(), signal.SIGKILL)
    return retried(call, *more)
kafka.retried = counted
store = Store({store.url!r}, {store.space!r})
seeding.seed(store, store.find(), spaces.find({space.name!r}, {bootstrap!r}).space, {bootstrap!r})
"""
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, capture_output=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
        bound.append(binding.model_of(spaces.find(space.name, bootstrap), bootstrap))
    assert bound == [None, MODEL, MODEL, MODEL]
    client = kafka.consumer(bootstrap, import_group(space))
    half = marker(client, space)
    assert half is not None and (half.snapshot, half.done, half.finished) == (manifest.id, 1 + 3, False)
    told: list[int] = []
    written = seed(store, manifest, space, bootstrap, progressed=told.append)
    assert sum(told) == manifest.rows and 0 < written < manifest.rows
    assert seed(store, manifest, space, bootstrap) == 0
    client.close()
    workers.fold(path, port=free_port())
    wait_for(lambda: settled(space, bootstrap), "all frames are folded")
    counts = {e: int(RecordLayout(manifest.declared(), e).decode(list(rows(store, manifest, e).values()))["count"].sum()) for e in ENTITIES}
    prove(space, bootstrap, counts)
    refuse_differences(store, manifest, space, bootstrap)


def test_what_does_not_fit_is_refused(world: tuple[Store, Manifest], bootstrap: str, tmp_path: Path) -> None:
    store, manifest = world
    other = (
        SPEC.replace('half_life = "1h"', 'half_life = "2h"').replace("columns.ur", "columns.vector").replace("entities.item", "entities.ad")
    )
    space, _ = new_space(bootstrap, tmp_path, other, partitions=1)
    with pytest.raises(SpaceError) as unlike:
        seed(store, manifest, space, bootstrap)
    for reason in (
        "user.cr.half_life is 7200.0, in the snapshot 3600.0",
        "user.ur is only in one",
        "user.vector is only",
        "no entity 'item'",
    ):
        assert reason in str(unlike.value)


def test_a_space_in_use_is_refused_unless_told(world: tuple[Store, Manifest], bootstrap: str, tmp_path: Path) -> None:
    store, manifest = world
    space, _ = new_space(bootstrap, tmp_path, partitions=2)
    sources = {"cr": np.ones((1, 8)), "ur": np.ones((1, 4))}
    with FrameWriter(space.name, "w", bootstrap) as writer:
        writer.write("user", ["u1"], "click", [1.6e9], sources)
        writer.commit()
    with pytest.raises(SpaceError, match=r"holds frames already.*say --add"):
        seed(store, manifest, space, bootstrap)
    command = ["import", store.space, "--into", space.name, "--from", store.url, "--bootstrap", bootstrap]
    done = CliRunner().invoke(cli, [*command, "--add"], catch_exceptions=False)
    assert done.exit_code == 0 and f"{manifest.rows:,} rows of snapshot {manifest.id} written" in done.output
    assert f"{manifest.rows:,} were there already" in CliRunner().invoke(cli, command, catch_exceptions=False).output


def test_damage_is_found_before_anything_of_the_file_is_written(world: tuple[Store, Manifest], bootstrap: str, tmp_path: Path) -> None:
    store, manifest = world
    space, _ = new_space(bootstrap, tmp_path, partitions=2)
    path = Path(store.path(manifest.id, manifest.parts["item"][0].path))
    whole = path.read_bytes()
    path.write_bytes(whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:])
    try:
        with pytest.raises(DataError, match=r"part-00000.parquet is damaged: its SHA-256"):
            seed(store, manifest, space, bootstrap)
    finally:
        path.write_bytes(whole)
    another = manifest.model_copy(update={"id": "20200101T000000.000000Z"})
    with pytest.raises(SpaceError, match=rf"the import of snapshot {manifest.id} .* is half done. Finish it first"):
        seed(store, another, space, bootstrap)
    assert seed(store, manifest, space, bootstrap) == 300  # the users had been written before the damage was met


def test_a_vector_beyond_float16(bootstrap: str, tmp_path: Path) -> None:
    space, _ = new_space(bootstrap, tmp_path, EXACT, partitions=1)
    target, _ = new_space(bootstrap, tmp_path, partitions=1)
    layout = RecordLayout(space, "user")
    record = layout.empty(1)
    record["count"], record["event_time"], record["cr_time"], record["cr_weight"], record["cr"] = 1, 1e9, 1e9, 1, 1e6
    record["ur_time"] = record["clicks_time"] = -np.inf
    Changelog(space, bootstrap).send("user", [(b"a", record.tobytes())])
    store = Store(str(tmp_path / "s"), space.name)
    with pytest.raises(DataError, match=r'cr of row 0 is not finite in float16. Declare vectors = "float32"'):
        seed(store, snapshot(space, bootstrap, store), target, bootstrap)
    assert issubclass(DataError, CrossrepError)
