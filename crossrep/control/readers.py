"""Who reads a space. Every reader commits, now and then, how far it has read, to a consumer group of its own:

    reader.<space>.<entity>.<host>-<process>-<n>

Nobody is a member of these groups and no reader goes by them: they are there for people, for any tool that shows lag, and for
`crossrep space retire`. A reader that closes deletes its group; what a killed one leaves, the brokers forget after a week.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import socket
import time
from collections.abc import Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from confluent_kafka import ConsumerGroupTopicPartitions, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient

from crossrep import kafka
from crossrep.control.workers import latest
from crossrep.errors import CrossrepError

log = logging.getLogger(__name__)

EVERY = 10.0  # seconds between commits
FIRST = 1.0  # seconds after which a reader says that it is there: short-lived ones never do
WATCH = 2.5 * EVERY  # seconds in which a reader that is there has committed
RECENT = 60.0  # seconds
CLOSING = 0.5  # seconds that a closing reader waits for the cluster

PREFIX = "reader."
_numbers = itertools.count()


class Presence:
    """Says that a reader is there, by way of the follower's own connection. What goes wrong with that is logged once, and does no harm.

    Args:
        kind: of reader, for people.
    """

    def __init__(self, space: str, entity: str, kind: str):
        self._host = socket.gethostname()
        self.group = f"{PREFIX}{space}.{entity}.{self._host}-{os.getpid()}-{next(_numbers)}"
        self._kind = kind
        self._due = time.monotonic() + FIRST
        self._told: Future[Any] | None = None  # on its way, or the last one
        self._refused = False

    def tell(self, admin: AdminClient, topic: str, positions: Mapping[int, int]) -> None:
        """Commit, if it is time to; does not wait."""
        if time.monotonic() < self._due:
            return
        self._due = time.monotonic() + EVERY
        self._look()
        about = json.dumps({"kind": self._kind, "host": self._host, "at": time.time()})
        places = [TopicPartition(topic, number, offset) for number, offset in sorted(positions.items())]
        places[0] = TopicPartition(topic, places[0].partition, places[0].offset, about)
        (self._told,) = admin.alter_consumer_group_offsets(
            [ConsumerGroupTopicPartitions(self.group, places)], request_timeout=EVERY / 2
        ).values()

    def end(self, admin: AdminClient) -> None:
        """Delete the group, if the cluster answers at once."""
        if self._told is None:
            return
        with suppress(KafkaException, FutureTimeout):
            self._told.result(CLOSING / 2)
            (asked,) = admin.delete_consumer_groups([self.group], request_timeout=CLOSING).values()
            asked.result(CLOSING)

    def _look(self) -> None:
        error = self._told.exception() if self._told is not None and self._told.done() else None
        if isinstance(error, KafkaException) and error.args[0].code() not in kafka.TRANSIENT and not self._refused:
            self._refused = True
            log.warning(
                "group %s cannot be committed to: %s. Nobody sees that this reader is there; it goes on", self.group, error.args[0].str()
            )


@dataclass(frozen=True)
class Reader:
    """One view or replica of one entity, as it said last."""

    group: str
    space: str
    entity: str
    kind: str
    host: str
    at: float  # seconds since 1970, by the reader's own clock
    lag: int  # offsets behind its topic's end, markers of transactions among them

    @property
    def recent(self) -> bool:
        """Was it there a moment ago, if its clock and ours agree?"""
        return abs(time.time() - self.at) < RECENT


def readers(bootstrap: str, space: str | None = None) -> list[Reader]:
    """Of one space, or of all; the dead of the last week among them.

    Raises:
        CrossrepError: the cluster does not answer, or not completely.
    """
    admin = kafka.admin(bootstrap)
    prefix = PREFIX if space is None else f"{PREFIX}{space}."
    try:
        listed = admin.list_consumer_groups(request_timeout=kafka.REQUEST_TIMEOUT).result()
        for error in listed.errors:  # readers that one broker knows of would be missing
            raise error
        groups = [found.group_id for found in listed.valid if found.group_id.startswith(prefix) and found.group_id.count(".") >= 3]
        asked = [admin.list_consumer_group_offsets([ConsumerGroupTopicPartitions(group)]) for group in groups]
        committed = {group: next(iter(answer.values())).result().topic_partitions for group, answer in zip(groups, asked)}
        ends = latest(admin, {(part.topic, part.partition) for parts in committed.values() for part in parts})
    except KafkaException as error:
        raise CrossrepError(f"the cluster at {bootstrap} does not say who reads: {error.args[0].str()}") from None
    found = []
    for group, parts in sorted(committed.items()):
        _, name, entity, _ = group.split(".", 3)
        lag = sum(max(0, ends.get((part.topic, part.partition), 0) - part.offset) for part in parts)
        with suppress(StopIteration, ValueError, KeyError, TypeError):  # it closes this moment, or somebody else commits there
            about = json.loads(next(part.metadata for part in parts if part.metadata))
            found.append(Reader(group, name, entity, about["kind"], about["host"], float(about["at"]), lag))
    return found


def present(bootstrap: str, space: str, watch: float = WATCH) -> list[Reader]:
    """The readers of a space that commit while this watches: no clock need agree with another.

    Takes `watch` seconds at most: less if there is none, or all that there might be have been seen.

    Raises:
        CrossrepError: the cluster does not answer.
    """
    before = {reader.group: reader.at for reader in readers(bootstrap, space)}
    seen: dict[str, Reader] = {}
    pending, deadline = set(before), time.monotonic() + watch
    while pending and time.monotonic() < deadline:
        time.sleep(0.5)
        now = {reader.group: reader for reader in readers(bootstrap, space)}
        seen |= {group: reader for group, reader in now.items() if reader.at != before.get(group)}
        pending = before.keys() & now.keys() - seen.keys()
    return list(seen.values())
