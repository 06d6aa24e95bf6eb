"""A view whose table is in files: it goes on where it was, is right after kill -9, and is emptied when it cannot be trusted."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from confluent_kafka.admin import NewTopic

from crossrep import CrossrepError, LocalView, kafka
from crossrep.spec import Space
from crossrep.views.disk import Note
from tests.cluster import ROOT, wait_for
from tests.crossrep.snapshot_world import Changelog, Rows, seen

IDS = [f"k{i}" for i in range(300)]


def held(view: LocalView) -> Rows:
    slots = view._live.table.index.slots()
    return dict(zip(view._live.table.index.keys(slots).tolist(), (record.tobytes() for record in view._live.table.records[slots])))


def opened(bootstrap: str, space: Space, path: Path, **options: Any) -> LocalView:
    view = LocalView("user", space.name, bootstrap, path=path, **options)
    view.wait(60)
    return view


def test_a_restart_goes_on_where_it_was(bootstrap: str, space: Space, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log, path = Changelog(space, bootstrap), tmp_path / "cache"
    log.put("user", IDS, 1)
    with opened(bootstrap, space, path, missing="mean") as view:
        assert view._live.follower.records == 300 and held(view) == seen(bootstrap, space, "user")
        mean, moment = view.get(["nobody"])["cr"].vectors, view.stream_time
        sizes = {file.name: file.stat().st_size for file in (path / f"{space.name}.user").iterdir()}
        assert sizes["records"] == 337 * view.record_bytes and sizes["keys"] == 1024 * 64  # an eighth in reserve
    with opened(bootstrap, space, path, missing="mean") as view:
        assert view._live.follower.records == 0 and view.stream_time == moment and held(view) == seen(bootstrap, space, "user")
        np.testing.assert_allclose(view.get(["nobody"])["cr"].vectors, mean, rtol=1e-6)
        view.get(["k1"])["cr"].vectors[:] = 7  # an answer is the caller's own
        told = []
        view.subscribe(told.append)
        assert sorted(told[0].updated) == sorted(IDS)
        log.delete("user", IDS[:200])
        log.put("user", [f"many{i}" for i in range(5000)], 2)  # index and records grow, and slots are used again
        wait_for(lambda: len(view) == 5100, "all are there")
    log.put("user", IDS[:50], 3)  # while it is away
    log.delete("user", IDS[200:250])
    with opened(bootstrap, space, path) as view:
        assert view._live.follower.records == 100 and len(view) == 5100 and held(view) == seen(bootstrap, space, "user")
        assert not view.get(IDS[50:250]).found.any() and view.get([*IDS[:50], *IDS[250:]]).found.all()
    assert not caplog.records
    with opened(bootstrap, space, path, partitions=[0]) as view:
        assert held(view) and "filled for other partitions or ids" in caplog.text
    with opened(bootstrap, space, path, ids=["k1"]) as view:
        assert list(held(view)) == [b"k1"]


def test_deleted_keys_leave_the_files(bootstrap: str, space: Space, tmp_path: Path) -> None:
    log = Changelog(space, bootstrap)
    log.put("user", ["secret-id", "other-id"], 1)

    def in_files(what: bytes) -> bool:
        return any(what in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())

    with opened(bootstrap, space, tmp_path) as view:
        secret, other = held(view)[b"secret-id"], held(view)[b"other-id"]
        assert in_files(secret) and in_files(b"secret-id")
        log.delete("user", ["secret-id"])
        wait_for(lambda: len(view) == 1, "it is deleted")
        assert not in_files(secret) and not in_files(b"secret-id") and in_files(other) and in_files(b"other-id")
    keys = next(tmp_path.rglob("keys"))
    at = keys.read_bytes().index(b"other-id")
    with keys.open("r+b") as file:  # a process that was killed within a removal leaves a name without a length
        file.seek((at // 64 + 1) * 64)
        file.write(b"left-over")
    with opened(bootstrap, space, tmp_path) as view:
        assert not in_files(b"left-over") and list(held(view)) == [b"other-id"]


def test_a_folder_has_one_view_at_a_time(bootstrap: str, space: Space, tmp_path: Path) -> None:
    Changelog(space, bootstrap).put("user", IDS, 1)
    with opened(bootstrap, space, tmp_path) as view:
        with pytest.raises(CrossrepError, match="open in another view"):
            LocalView("user", space.name, bootstrap, path=tmp_path)
        with LocalView("item", space.name, bootstrap, path=tmp_path) as items:  # has a folder of its own
            items.wait(60)
        assert view.get(IDS).found.all()
    with pytest.raises(CrossrepError, match="was closed"):
        view.get(IDS)
    view.close()
    opened(bootstrap, space, tmp_path).close()


READER = """
import sys, crossrep.views.disk
crossrep.views.disk.NOTE_EVERY = 0.05
view = crossrep.LocalView("user", sys.argv[1], sys.argv[2], path=sys.argv[3])
print("open", flush=True)
view.wait(60)
print("caught up", flush=True)
sys.stdin.read()
"""


def test_after_kill_9_it_is_right(bootstrap: str, space: Space, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """While keys come, change, go and come back without end; killed as it starts, and as it follows."""
    log, stop = Changelog(space, bootstrap), threading.Event()
    log.put("user", [f"still{i}" for i in range(10_000)], 0)

    def change() -> None:
        random, turn = np.random.default_rng(0), 0
        while not stop.wait(0.02):
            turn += 1
            log.put("user", [f"k{i}" for i in random.integers(0, 200 * turn, 300)], turn)  # ever more of them
            log.delete("user", [f"k{i}" for i in np.unique(random.integers(0, 200 * turn, 200))])

    writer = threading.Thread(target=change)
    writer.start()
    try:
        for word in ("open", "caught up", "caught up"):
            command = [sys.executable, "-c", READER, space.name, bootstrap, str(tmp_path)]
            with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as reader:
                assert reader.stdout is not None
                while reader.stdout.readline().strip() != word:
                    assert reader.poll() is None
                time.sleep(0.3)
                reader.kill()
    finally:
        stop.set()
        writer.join()
    with opened(bootstrap, space, tmp_path) as view:
        assert held(view) == seen(bootstrap, space, "user")
        assert len(view) == len(set(view.ids())) and not caplog.records
        with LocalView("user", space.name, bootstrap) as whole:
            whole.wait(60)
            assert view._live.follower.records < whole._live.follower.records - 10_000  # it went on, and did not begin anew


def edit(folder: Path, change: Callable[[Note], Note]) -> None:
    note = Note(**json.loads((folder / "note.json").read_text()))
    (folder / "note.json").write_text(json.dumps(vars(change(note))))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "garbage": (lambda folder: (folder / "note.json").write_text('{"space_hash": "'), "its note cannot be read"),
    "another shape": (lambda folder: (folder / "note.json").write_text("[1]"), "its note cannot be read"),
    "no note": (lambda folder: (folder / "note.json").unlink(), "it has no note"),
    "torn records": (lambda folder: cut(folder / "records"), "its file records is not whole"),
    "no keys": (lambda folder: (folder / "keys").unlink(), "its file keys is not whole"),
    "another format": (lambda folder: edit(folder, lambda note: replace(note, format=0)), "it has format 0"),
    "another spec": (lambda folder: edit(folder, lambda note: replace(note, space_hash="00")), "another spec"),
    "another topic": (lambda folder: edit(folder, lambda note: replace(note, topic_id="x")), "deleted and created anew"),
    "ahead": (
        lambda folder: edit(folder, lambda note: replace(note, positions=dict.fromkeys(note.positions, 10**6))),
        "up to offset 1000000",
    ),
    "partitions": (lambda folder: edit(folder, lambda note: replace(note, positions={"0": 1})), "it knows partitions 0, not 0, 1, 2, 3"),
    "old": (lambda folder: edit(folder, lambda note: replace(note, current=note.current - 100_000)), "28 h old, .* deletions for 48 h"),
    "crash": (lambda folder: edit(folder, lambda note: replace(note, closed=False, boot="before")), "the machine went down"),
}


def test_what_cannot_be_trusted_is_emptied_and_says_why(
    bootstrap: str, space: Space, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log, folder = Changelog(space, bootstrap), tmp_path / f"{space.name}.user"
    log.put("user", IDS, 1)
    opened(bootstrap, space, tmp_path).close()
    for turn, (name, (damage, reason)) in enumerate(DAMAGES.items()):
        log.delete("user", [IDS[turn]])
        damage(folder)
        caplog.clear()
        with opened(bootstrap, space, tmp_path) as view:
            assert len(caplog.records) == 1 and caplog.records[0].levelno == logging.WARNING, name
            assert re.search(reason, caplog.text), (name, caplog.text)
            assert held(view).keys() == {id.encode() for id in IDS[turn + 1 :]}, name
            assert view._live.follower.records > len(view), name
    caplog.clear()
    edit(folder, lambda note: replace(note, boot="before"))  # but closed
    edit(folder, lambda note: replace(note, current=note.current - 100_000))  # but nothing is to be read
    with opened(bootstrap, space, tmp_path) as view:
        assert view._live.follower.records == 0 and len(view) == 288 and not caplog.records
    topic, admin = space.representations_topic("user"), kafka.admin(bootstrap)
    admin.delete_topics([topic])[topic].result(30)
    wait_for(lambda: topic not in admin.list_topics(timeout=30).topics, "it is gone")
    anew = NewTopic(topic, space.partitions, config={"cleanup.policy": "compact"})
    wait_for(lambda: admin.create_topics([anew])[topic].exception(30) is None, "it is there again")
    with opened(bootstrap, space, tmp_path) as view:
        assert len(view) == 0
        assert "deleted and created anew" in caplog.text


def test_a_disk_without_room_ends_the_view_and_says_so(bootstrap: str, space: Space, tmp_path: Path) -> None:
    """Files may not be larger than 100,000 bytes: what a full disk is to a file that must grow."""
    log = Changelog(space, bootstrap)
    log.put("user", IDS, 1)
    code = f"""
import resource, time, crossrep
view = crossrep.LocalView("user", {space.name!r}, {bootstrap!r}, path={str(tmp_path)!r})
view.wait(60)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
print(len(view), flush=True)
try:
    while True:
        view.get(["k1"])
        time.sleep(0.01)
except crossrep.CrossrepError as error:
    print(error)
"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as reader:
        try:
            assert reader.stdout is not None and reader.stdout.readline() == "300\n"
            log.put("user", [f"more{i}" for i in range(2000)], 2)
            said = reader.communicate(timeout=30)[0]
        finally:
            reader.kill()
    assert re.search(r"no room on the disk: .* needs [\d,]+ bytes", said), said
    with opened(bootstrap, space, tmp_path) as view:  # with room again
        assert held(view) == seen(bootstrap, space, "user") and len(view) == 2300
