"""Readers that were away for longer than their topic keeps deletions: they end, and what they kept on disk is not gone on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from confluent_kafka.admin import AclBinding, AclOperation, AclPermissionType, ResourcePatternType, ResourceType

from crossrep import CrossrepError, LocalView, kafka
from crossrep.spec import Space
from crossrep.views.moments import NEVER, Moment
from serve.replica import Place, Replica
from state.store import Memory, Room
from streams import broker
from streams.broker import server
from tests.cluster import ROOT, alter, new_space, wait_for
from tests.crossrep.snapshot_world import Changelog

IDS = [f"k{i}" for i in range(100)]
GAP = 4.0  # seconds that the readers below may be away
CLEANED_SOON = {"delete.retention.ms": "1000", "segment.ms": "100", "min.cleanable.dirty.ratio": "0.01"}

READERS = """
import json, sys
from pathlib import Path
from crossrep import CrossrepError, LocalView
from crossrep.control import spaces
from crossrep.views import disk, follow
from serve.replica import Place, Replica
from state.store import Memory, Room

name, bootstrap, folder, gap = sys.argv[1:]
follow.SHORTEST_GAP, disk.NOTE_EVERY = float(gap), 0.05
place = Place(Path(folder), Memory.of(16 << 20), Room(Path(folder), 1 << 20))
readers = {
    "view": LocalView("user", name, bootstrap),
    "view on disk": LocalView("user", name, bootstrap, path=Path(folder) / "view"),
    "replica": Replica(spaces.find(name, bootstrap).space, "user", bootstrap, place, 1024),
    "view of items": LocalView("item", name, bootstrap),
}
for reader in readers.values():
    reader.wait(60)

def answer(reader):
    try:
        return [bool(reader.get(["gone"]).found[0]), reader.staleness]
    except CrossrepError as error:
        return str(error)

print("ready", flush=True)
for _ in sys.stdin:
    print(json.dumps({what: answer(reader) for what, reader in readers.items()}), flush=True)
"""


def test_who_slept_through_deletions_ends(bootstrap: str, space: Space, tmp_path: Path) -> None:
    log, topic = Changelog(space, bootstrap), space.representations_topic("user")
    for entity in space.entities:
        for setting, value in CLEANED_SOON.items():
            alter(bootstrap, space.representations_topic(entity), setting, value)
        log.put(entity, ["gone", *IDS])
    command = [sys.executable, "-c", READERS, space.name, bootstrap, str(tmp_path), str(GAP)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as readers:
        try:
            stdin, stdout = readers.stdin, readers.stdout
            assert stdin is not None and stdout is not None and stdout.readline() == "ready\n"

            def answers() -> dict[str, list[float] | str]:
                stdin.write("?\n")
                stdin.flush()
                return dict(json.loads(stdout.readline()))

            wait_for(lambda: all(found and age < 3 for found, age in answers().values()), "they follow", 20)
            os.kill(readers.pid, signal.SIGSTOP)
            stopped = time.monotonic()
            log.delete("user", ["gone"])

            def cleaned() -> bool:
                log.put("user", IDS)  # the newest segment is never cleaned
                messages = kafka.messages(bootstrap, topic, kafka.bounds(bootstrap, topic))
                return all(message.key() != b"gone" for message in messages)

            wait_for(cleaned, "record and tombstone are gone", every=0.3)
            time.sleep(max(0.0, stopped + GAP + 1 - time.monotonic()))
            os.kill(readers.pid, signal.SIGCONT)

            def ended() -> bool:
                said = answers()
                idle = said.pop("view of items")
                for what, answer in said.items():
                    assert isinstance(answer, str) or answer[1] > GAP, (what, answer)
                assert not isinstance(idle, str), idle  # nothing came while it slept
                return idle[1] < GAP and all(isinstance(answer, str) and "keeps deletions for" in answer for answer in said.values())

            wait_for(ended, "they end", 20)
        finally:
            readers.kill()

    with LocalView("user", space.name, bootstrap, path=tmp_path / "view") as view:
        view.wait(60)
        assert view.get(IDS).found.all() and not view.get(["gone"]).found[0]
    place = Place(tmp_path, Memory.of(16 << 20), Room(tmp_path, 1 << 20))
    with closing(Replica(space, "user", bootstrap, place, 1024)) as replica:
        replica.wait(60)
        assert replica.get(IDS).found.all() and not replica.get(["gone"]).found[0]


def test_age_counts_sleep_and_no_clock_that_is_set_back() -> None:
    assert NEVER.age == float("inf")
    assert 0 <= Moment.now().age < 5
    asleep = Moment(time.time() - 100, time.monotonic() - 1)  # the machine slept for 99 s
    set_back = Moment(time.time() + 3600, time.monotonic() - 100)
    assert 100 <= asleep.age < 105 and 100 <= set_back.age < 105


def test_where_settings_may_not_be_asked_a_day_is_assumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(server.SETTINGS, "authorizer.class.name", "org.apache.kafka.metadata.authorizer.StandardAuthorizer")
    monkeypatch.setitem(server.SETTINGS, "allow.everyone.if.no.acl.found", "true")
    monkeypatch.setitem(server.SETTINGS, "super.users", "User:nobody")
    bootstrap = broker.up(tmp_path / "kafka", progress=False).bootstrap
    try:
        space, _ = new_space(bootstrap, tmp_path)
        topic, admin = space.representations_topic("user"), kafka.admin(bootstrap)
        Changelog(space, bootstrap).put("user", IDS)
        assert kafka.tombstones_kept(bootstrap, topic) == 2 * 86_400
        user = (topic, ResourcePatternType.LITERAL, "User:*", "*")
        rights = [  # and no DESCRIBE_CONFIGS
            AclBinding(ResourceType.TOPIC, *user, right, AclPermissionType.ALLOW) for right in (AclOperation.READ, AclOperation.DESCRIBE)
        ]
        for future in admin.create_acls(rights).values():
            future.result(30)

        def refused() -> bool:
            try:
                kafka.settings(bootstrap, topic)
            except CrossrepError as error:
                return "uthorization" in str(error)
            return False

        wait_for(refused, "it is refused")
        assert kafka.tombstones_kept(bootstrap, topic) == 86_400
        with LocalView("user", space.name, bootstrap) as view:
            view.wait(60)
            assert view.get(IDS).found.all()
    finally:
        broker.down(tmp_path / "kafka", kill=True)
