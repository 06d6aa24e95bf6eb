"""Retiring a space: its topics, groups, record and disks are deleted, once nobody works for it or reads it.

The record on the control topic is marked first, so that nobody begins anew with a space of which half is gone, and deleted last, so that
what was interrupted can be repeated.
"""

from __future__ import annotations

import fcntl
import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from crossrep import kafka
from crossrep.control import readers, spaces, workers
from crossrep.errors import CrossrepError, SpaceError
from streams import topics

NOT_THERE = ("UNKNOWN_TOPIC_OR_PART", "GROUP_ID_NOT_FOUND")


@dataclass
class Retired:
    """What is gone, and what could not be deleted."""

    topics: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)
    left: list[str] = field(default_factory=list)  # each a line for people


def folders(name: str) -> list[Path]:
    """Where this machine's workers and replicas keep a space, unless they were told another place."""
    return [kafka.home() / "fold" / name, kafka.home() / "serve" / name]


def refuse_used(name: str, bootstrap: str, watch: float = readers.WATCH) -> None:
    """Raise SpaceError if an alias stands for it, a worker is a member of one of its groups, or a reader commits within `watch` seconds.

    Seen are readers that say so (`crossrep.control.readers`): views and replicas of this version that may commit.
    """
    _refuse_promoted(name, spaces.read_all(bootstrap), bootstrap)
    admin = kafka.admin(bootstrap)
    working = [f"{member} ({group})" for group in _groups(admin, name) for member in workers.members(admin, group)]
    if working:
        raise SpaceError(f"space {name!r} has workers: {', '.join(working)}. Stop them, or say --force")
    reading = readers.present(bootstrap, name, watch)
    if reading:
        who = ", ".join(f"{reader.kind} of {reader.entity} ({reader.group})" for reader in reading)
        raise SpaceError(f"space {name!r} has readers: {who}. Let them go over to another space, or stop them, or say --force")


def retire(name: str, bootstrap: str, disks: Iterable[Path]) -> Retired:
    """Delete everything of a space. Repeating it finishes what was interrupted.

    Raises:
        SpaceError: there is no such space, or an alias stands for it.
        CrossrepError: the cluster does not answer, or refuses.
    """

    def mark(published: dict[str, bytes]) -> dict[str, bytes | None]:
        _refuse_promoted(name, published, bootstrap)
        return {name: spaces.encode(replace(spaces.decode(name, published[name]), retiring=True))}

    spaces.change(bootstrap, mark)
    space, admin, done = spaces.find(name, bootstrap).space, kafka.admin(bootstrap), Retired()
    try:
        done.topics = _delete_topics(admin, [topic.name for topic in topics.plan(space) if not topic.shared])
        for group in _groups(admin, name):
            try:
                admin.delete_consumer_groups([group])[group].result()
                done.groups.append(group)
            except KafkaException as error:
                if error.args[0].name() not in NOT_THERE:
                    done.left.append(f"group {group}: {error.args[0].str()}. It goes by itself once its members are stopped")
    except KafkaException as error:
        raise CrossrepError(f"retiring {name!r} stopped half way: {error.args[0].str()}. Repeat the command") from None
    for folder in disks:
        if folder.is_dir() and _in_use(folder):
            done.left.append(f"folder {folder}: a process uses it. Stop that, and delete it")
        elif folder.is_dir():
            shutil.rmtree(folder)
            done.folders.append(folder)
    _forget_model(name, bootstrap)
    spaces.change(bootstrap, lambda published: {name: None})
    return done


def _forget_model(name: str, bootstrap: str) -> None:
    """Which one wrote to it (crossrep/control/binding.py)."""
    if name not in spaces.read_all(bootstrap, spaces.MODELS_TOPIC):
        return
    producer = kafka.producer(bootstrap, acks="all")
    producer.produce(spaces.MODELS_TOPIC, None, name)
    if producer.flush(kafka.REQUEST_TIMEOUT):
        raise CrossrepError(f"retiring {name!r} stopped half way: topic {spaces.MODELS_TOPIC} was not written. Repeat the command")


def _refuse_promoted(name: str, published: dict[str, bytes], bootstrap: str) -> None:
    """Even by force: readers that follow would be left with nothing to go over to."""
    if name not in published:
        raise SpaceError(f"no space {name!r} at {bootstrap}: see crossrep space list")
    for alias in spaces.aliases(published).values():
        if alias.space == name:
            raise SpaceError(
                f"{alias.name} stands for space {name!r}. Promote another first: crossrep space promote NAME --as {alias.name}"
            )


def _groups(admin: AdminClient, name: str) -> list[str]:
    """Of workers (fold.NAME, infer.NAME, import.NAME, ...) and readers."""
    listed = admin.list_consumer_groups(request_timeout=kafka.REQUEST_TIMEOUT).result()
    for error in listed.errors:  # those that one broker knows of would be missing
        raise error
    groups = [group.group_id.split(".") for group in listed.valid]
    return sorted(".".join(parts) for parts in groups if parts[1:] == [name] or (parts[0] == "reader" and parts[1:2] == [name]))


def _delete_topics(admin: AdminClient, names: list[str]) -> list[str]:
    """Those that were there, gone from every broker's mind."""
    deleted = []
    for name, asked in admin.delete_topics(names, operation_timeout=kafka.REQUEST_TIMEOUT).items():
        try:
            asked.result()
            deleted.append(name)
        except KafkaException as error:
            if error.args[0].name() not in NOT_THERE:
                raise
    deadline = time.monotonic() + kafka.REQUEST_TIMEOUT
    while set(names) & set(admin.list_topics(timeout=kafka.REQUEST_TIMEOUT).topics):
        if time.monotonic() > deadline:
            raise CrossrepError("the topics were deleted, but the brokers still show them. Repeat the command")
        time.sleep(0.1)
    return deleted


def _in_use(folder: Path) -> bool:
    """Does a process hold a lock in it?"""
    for path in folder.rglob("*"):
        if path.name.lower() == "lock" and path.is_file():
            with suppress(PermissionError), path.open("r+b") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a worker's
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # RocksDB's
                except OSError:
                    return True
    return False
