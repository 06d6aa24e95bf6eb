"""Snapshots on a real broker: exact at their offsets, published whole or not at all, kept as told."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from crossrep import CrossrepError, SpaceError, TopicError, kafka
from crossrep.cli import cli
from crossrep.columnar.records import RecordLayout
from crossrep.control import spaces
from crossrep.errors import BadRecord, DataError
from crossrep.files import parquet
from crossrep.files.dated import new_id
from crossrep.files.publication import ABANDONED_AFTER, MANIFEST
from crossrep.keys import Keys
from crossrep.snapshots.store import Manifest, Store
from crossrep.spec import Space
from crossrep.views.table import RecordTable
from streams import topics
from streams.proof import readout
from tests.cluster import ROOT, SPEC, Load, Workers, free_port, new_space, ready, settled, wait_for
from tests.crossrep.snapshot_world import Changelog, replayed, rows, seen, snapshot, some_rows

ENTITIES = ("user", "item")


@pytest.fixture
def space(bootstrap: str, tmp_path: Path) -> Space:
    return new_space(bootstrap, tmp_path, partitions=2)[0]


@pytest.fixture
def store(space: Space, tmp_path: Path) -> Store:
    return Store(str(tmp_path / "snapshots"), space.name)


# --- Columns ---


def test_records_go_to_parquet_and_back_bit_by_bit(tmp_path: Path) -> None:
    space = Space.parse(SPEC.format(name="a", partitions=1))
    layout, table = RecordLayout(space, "user"), RecordTable(space, "user")
    names: list[bytes | str] = [f"k{i}" for i in range(5000)]
    names += ["ünï", b"\xff\xfe", b"\\xff", b"a\x00b", "7", "07", "x" * 64]
    keys, records = some_rows(space, "user", names, 1)
    records["event_time"][:3] = [0.1, 1.7e9 + 1e-7, 12345.678901234]
    table.apply(keys.tolist(), [record.tobytes() for record in records])
    file = io.BytesIO()
    parquet.write(file, layout, table.runs(parquet.ROWS))
    found = {key: record.tobytes() for keys, records in parquet.read(file, layout) for key, record in zip(keys.tolist(), records)}
    assert found == dict(zip(keys.tolist(), (record.tobytes() for record in records)))

    shown = pq.read_table(file)  # as somebody sees it who knows nothing of crossrep
    assert shown.column_names[:8] == ["id", "count", "event_time", "cr", "cr_weight", "cr_time", "ur", "ur_time"]
    assert str(shown.schema.field("cr").type) == "fixed_size_list<element: float>[8]" and str(shown.schema.field("ur_time").type) == (
        "timestamp[us, tz=UTC]"
    )
    at = {id: i for i, id in enumerate(shown["id"].to_pylist())}
    i = at["ünï"]
    (record,) = records[[keys.tolist().index("ünï".encode())]]
    assert shown["count"][i].as_py() == 3 and shown["cr"][i].as_py() == record["cr"].tolist()
    assert shown["cr_time"][i].value == round(record["cr_time"] * 1e6) and shown["_cr_time"][i].as_py() == record["cr_time"]
    never = np.isneginf(shown["_clicks_time"].to_numpy())  # most keys have no click
    assert 1000 < never.sum() < 5000 and (np.array(shown["clicks_time"].is_null()) == never).all()
    assert (shown["clicks_weight"].to_numpy()[never] == 0).all()
    assert shown["_key"][at["\\xff\\xfe"]].as_py() == b"\xff\xfe" and shown["_key"].null_count == len(names) - 1


def test_a_column_of_the_spec_may_be_called_id() -> None:
    space = Space.parse(SPEC.format(name="a", partitions=1).replace("columns.ur]", "columns.id]"))
    table = RecordTable(space, "user")
    keys, records = some_rows(space, "user", ["a"], 1)
    table.apply(keys.tolist(), [record.tobytes() for record in records])
    file = io.BytesIO()
    parquet.write(file, table.layout, table.runs(parquet.ROWS))
    ((found, again),) = parquet.read(file, RecordLayout(space, "user"))
    assert found.tolist() == [b"a"] and again.tobytes() == records.tobytes()
    assert pq.read_table(file)["id_"].to_pylist() == ["a"]
    with pytest.raises(DataError, match="columns"):
        list(parquet.read(file, RecordLayout(space, "item")))
    with pytest.raises(DataError, match="not a Parquet file"):
        list(parquet.read(io.BytesIO(b"garbage"), RecordLayout(space, "item")))


# --- Exact at its offsets ---


def test_it_is_what_a_view_holds_without_what_was_aborted_or_deleted(bootstrap: str, space: Space, store: Store) -> None:
    empty = snapshot(space, bootstrap, store)
    assert empty.rows == 0 and empty.stream_times == {"user": None, "item": None} and store.find() == empty
    assert [part.source_offset for part in empty.parts["user"]] == [-1, -1] and rows(store, empty, "user") == {}
    log = Changelog(space, bootstrap)
    log.put("user", [f"u{i}" for i in range(3000)], 1)
    log.put("user", [f"u{i}" for i in range(1000)], 2)
    log.put("user", ["never", "u1"], 3, abort=True)
    log.delete("user", [*(f"u{i}" for i in range(500)), "never there"])
    log.put("user", ["u3"], 4)
    log.put("item", ["ünï", b"\xff", 17], 5)
    taken = snapshot(space, bootstrap, store)
    for entity in ENTITIES:
        assert rows(store, taken, entity) == seen(bootstrap, space, entity)
    assert taken.rows == 2501 + 3 and b"never" not in rows(store, taken, "user")
    assert {part.partition: part.end_offset for part in taken.parts["user"]} == {
        number: end for number, (_, end) in kafka.bounds(bootstrap, space.representations_topic("user")).items()
    }
    partition = int(Keys.of(["u3"]).partitions(2)[0])
    assert taken.parts["user"][partition].source_offset == 4 and taken.stream_times["user"] > 1.6e9
    assert taken.declared() == space and store.find() == taken
    # An open transaction is behind the snapshot's end, whatever becomes of it.
    log.producer.begin_transaction()
    keys, records = some_rows(space, "user", ["u3", "later"], 9)
    log.produce("user", [(key, record.tobytes()) for key, record in zip(keys.tolist(), records)])
    log.producer.flush(30)
    again = snapshot(space, bootstrap, store)
    log.producer.commit_transaction(30)
    assert rows(store, again, "user") == rows(store, taken, "user")
    last = snapshot(space, bootstrap, store)
    assert rows(store, last, "user") == seen(bootstrap, space, "user") and b"later" in rows(store, last, "user")


def test_while_frames_flow_and_a_worker_is_killed(bootstrap: str, workers: Workers, tmp_path: Path) -> None:
    space, path = new_space(bootstrap, tmp_path, partitions=2)
    store, load, port = Store(str(tmp_path / "s"), space.name), Load(space, bootstrap), free_port()
    worker = workers.fold(path, port=port)
    wait_for(lambda: ready(port), "the worker is ready")
    stop = threading.Event()

    def flow() -> None:
        while not stop.is_set():
            load.send(300)
            time.sleep(0.02)

    flowing = threading.Thread(target=flow)
    flowing.start()
    try:
        taken = [snapshot(space, bootstrap, store)]
        while not taken[0].rows:
            taken = [snapshot(space, bootstrap, store)]
        worker.send_signal(signal.SIGKILL)
        taken.append(snapshot(space, bootstrap, store))  # a transaction may be open
        workers.fold(path)
        wait_for(
            lambda: taken.append(snapshot(space, bootstrap, store)) or ends(taken[-1]) > ends(taken[1]), "the next one writes", 40, 0.5
        )
    finally:
        stop.set()
        flowing.join()
    assert taken[0].rows and taken[-1].rows
    for manifest in (taken[0], taken[1], taken[-1]):
        for entity in ENTITIES:
            for part in manifest.parts[entity]:
                assert rows(store, manifest, entity, part.partition) == replayed(bootstrap, space, entity, part.partition, part.end_offset)
    wait_for(lambda: settled(space, bootstrap), "all frames are folded")
    readout.settled(
        bootstrap, [space.representations_topic(entity) for entity in ENTITIES]
    )  # and what was committed with the last of them is visible
    last = snapshot(space, bootstrap, store)
    layouts = {entity: RecordLayout(space, entity) for entity in ENTITIES}
    counted = {e: int(layouts[e].decode(list(rows(store, last, e).values()))["count"].sum()) for e in ENTITIES}
    assert counted == load.counts


def ends(manifest: Manifest) -> int:
    return sum(part.end_offset for part in manifest.parts["user"])


# --- Published whole or not at all ---


def killed(space: Space, bootstrap: str, store: Store, before: str) -> str:
    """Take a snapshot in a process that is killed where `before` says; returns what it left: an id."""
    known = set(store.ids())
    code = f"""
import os, signal
from crossrep.control import spaces
from crossrep.files import parquet
from crossrep.snapshots import taking
from crossrep.snapshots.store import Store
def die(*_): os.kill(os.getpid(), signal.SIGKILL)
{before}
taking.take(spaces.find({space.name!r}, {bootstrap!r}), {bootstrap!r}, Store({store.url!r}, {space.name!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60)
    assert done.returncode == -signal.SIGKILL
    (left,) = set(store.ids()) - known
    return left


def test_a_kill_leaves_the_former_newest_and_the_next_run_tidies_up(bootstrap: str, space: Space, store: Store) -> None:
    Changelog(space, bootstrap).put("user", list(range(100)), 1)
    first = snapshot(space, bootstrap, store)
    moments = [
        "parquet.write = die",  # with one file begun
        "write = parquet.write; parquet.write = lambda *args: (write(*args), args[0].flush(), die())",
        "Store.publish = die",  # all files are there
        "os.replace = die",  # the manifest is written, under another name
    ]
    left = [killed(space, bootstrap, store, moment) for moment in moments]
    assert store.find() == first and store.published() == [first] and len(set(left)) == 4
    foreign = new_id()  # a writer on another machine, that is perhaps still writing
    store.begin(foreign)
    Path(store.path(foreign, "unfinished.json")).write_text('{"host": "elsewhere", "pid": 1}')
    old = (datetime.now(UTC) - 2 * ABANDONED_AFTER).strftime("%Y%m%dT%H%M%S.%fZ")
    store.begin(old)
    own = new_id()  # a writer of this machine that lives
    store.begin(own)
    second = snapshot(space, bootstrap, store)
    assert sorted(store.retain(None)) == sorted([*left, old])
    assert store.ids() == sorted([first.id, foreign, own, second.id]) and store.find() == second


def test_a_failure_leaves_nothing(bootstrap: str, space: Space, store: Store) -> None:
    log = Changelog(space, bootstrap)
    log.put("user", ["a"], 1)
    first = snapshot(space, bootstrap, store)
    log.send("item", [(b"b", b"garbage")])
    with pytest.raises(BadRecord, match=space.representations_topic("item")):
        snapshot(space, bootstrap, store)
    assert store.ids() == [first.id] and store.find() == first


def test_retention_keeps_the_newest_and_touches_nothing_else(bootstrap: str, space: Space, store: Store) -> None:
    taken = [snapshot(space, bootstrap, store) for _ in range(4)]
    root = Path(store.root)
    (root / "README.txt").write_text("mine")
    (root / "backup").mkdir()
    (root / "20261301T000000.000000Z").mkdir()  # no such month
    damaged = root / new_id()
    damaged.mkdir()
    (damaged / MANIFEST).write_text('{"format": 2}')  # of a crossrep to come
    assert store.find() == taken[-1]  # though something newer lies there that cannot be read
    with pytest.raises(DataError, match="no manifest this crossrep can read"):
        store.find(damaged.name)
    assert store.retain(2) == [taken[0].id, taken[1].id]
    assert store.retain(1) == [taken[2].id] and store.retain(1) == [] and store.retain(None) == []
    assert store.published() == [taken[3]]
    assert {path.name for path in root.iterdir()} == {"README.txt", "backup", "20261301T000000.000000Z", damaged.name, taken[3].id}
    store.remove(taken[0].id)  # another run was faster
    with pytest.raises(DataError, match=f"no snapshot '{taken[0].id}'.*known: {taken[3].id}"):
        store.find(taken[0].id)
    part = root / taken[3].id / taken[3].parts["user"][0].path
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"damaged, or was removed.*bytes, not"):
        store.find()
    part.unlink()
    with pytest.raises(DataError, match=r"part-00000.parquet is gone. Take a new one: crossrep snapshot"):
        store.find()


# --- Where it cannot be ---


def test_errors_name_the_place_and_the_fix(bootstrap: str, space: Space, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=f"{tmp_path}/file/x cannot be written.*your rights"):
        snapshot(space, bootstrap, Store(str(tmp_path / "file" / "x"), space.name))
    with pytest.raises(CrossrepError, match=r"nowhere://x cannot be opened: .*nowhere"):
        Store("nowhere://x", space.name)
    with pytest.raises(
        DataError, match=f"no snapshot of space '{space.name}' in {tmp_path} .known: none yet.. Take one: crossrep snapshot"
    ):
        Store(str(tmp_path), space.name).find()
    published = spaces.find(space.name, bootstrap)
    topics.publish(spaces.Published(space, published.topic_ids, "--ago 3h"), bootstrap)
    with pytest.raises(SpaceError, match=f"is being rewound.*crossrep rewind {space.name} --ago 3h"):
        snapshot(space, bootstrap, Store(str(tmp_path), space.name))
    topics.publish(spaces.Published(space, {**published.topic_ids, space.representations_topic("item"): "other"}), bootstrap)
    with pytest.raises(TopicError, match="deleted and created anew"):
        snapshot(space, bootstrap, Store(str(tmp_path), space.name))


def test_the_commands(bootstrap: str, space: Space, tmp_path: Path) -> None:
    Changelog(space, bootstrap).put("user", list(range(100)), 1)
    environment = {"CROSSREP_SNAPSHOTS": str(tmp_path / "s"), "KAFKA_BOOTSTRAP": bootstrap}

    def run(*command: str) -> str:
        done = CliRunner().invoke(cli, [*command], env=environment, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    assert "none of" in run("snapshots", space.name)
    first = run("snapshot", space.name)
    assert "100 user rows in 2 files" in first and "0 item rows" in first
    second = run("snapshot", space.name, "--keep", "1")
    assert "removed" in second
    listed = run("snapshots", space.name)
    assert listed.count("100 user, 0 item") == 1 and Store(str(tmp_path / "s"), space.name).find().id in listed
    assert CliRunner().invoke(cli, ["snapshot", space.name, "--keep", "0"], env=environment).exit_code == 2

    # Object stores have neither folders nor renames; fsspec's own memory stands for them, so that the whole path runs.
    remote = Store("memory://bucket/snapshots", space.name)
    taken = [snapshot(space, bootstrap, remote) for _ in range(2)]
    assert rows(remote, remote.find(), "user") == seen(bootstrap, space, "user")
    assert remote.retain(1) == [taken[0].id] and remote.ids() == [taken[1].id]


def test_what_is_not_installed_is_named() -> None:
    code = "import sys; sys.modules['fsspec'] = None; sys.argv = ['crossrep', 'snapshots', 'x']; from crossrep.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "pip install 'crossrep[analytics]'" in done.stderr


def test_ids_sort_as_they_were_taken() -> None:
    ids = [new_id() for _ in range(100)]
    assert ids == sorted(ids) and abs(datetime.now(UTC) - datetime.strptime(ids[0], "%Y%m%dT%H%M%S.%fZ").replace(tzinfo=UTC)) < timedelta(1)
