"""The work of all peers: the rows of `benchmarks.fold`, one Kafka record per sample or as frames, and the check that each counted once."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np
from confluent_kafka import KafkaException
from confluent_kafka.admin import NewTopic

from benchmarks import fold
from benchmarks.common import space_of
from benchmarks.peers.average import SAMPLE
from crossrep import kafka
from crossrep.errors import CrossrepError
from crossrep.keys import Keys

PARTITIONS = 4
_numbers = itertools.count()


@dataclass(frozen=True)
class Load:
    """What is drawn: the same rows as records and as frames."""

    rows: int
    users: int = 100_000
    zipf: float = 1.2
    seed: int = 0
    rows_per_frame: int = 1024


@contextmanager
def records_topic(bootstrap: str, load: Load) -> Iterator[str]:
    """A topic with one record per sample; deleted again."""
    topic, admin = unique("records"), kafka.admin(bootstrap)
    admin.create_topics([NewTopic(topic, PARTITIONS)])[topic].result(kafka.REQUEST_TIMEOUT)
    try:
        preload_records(topic, bootstrap, load)
        yield topic
    finally:
        delete(bootstrap, [topic])


@contextmanager
def frames_topic(bootstrap: str, load: Load) -> Iterator[str]:
    """A topic with frames of float16, as our own fold reads them, written by `benchmarks.fold`; deleted again."""
    with space_of(fold.declared(PARTITIONS, "200ms"), bootstrap) as space:
        fold.preload(space, bootstrap, load.rows, load.users, load.zipf, load.rows_per_frame, load.seed)
        yield space.frames_topic


def preload_records(topic: str, bootstrap: str, load: Load) -> None:
    """Write each row as a record: key = the user's id in decimal, value = `average.SAMPLE`, 272 bytes.

    The rows are those of `fold.preload` of the same seed: one pool of vectors, then users batch by batch.
    """
    random = np.random.default_rng(load.seed)
    pool = np.zeros(fold.BATCH, SAMPLE)
    pool["vector"], pool["weight"] = random.normal(size=(fold.BATCH, fold.DIM)), 1.0
    producer = kafka.producer(bootstrap)
    for first in range(0, load.rows, fold.BATCH):
        n = min(fold.BATCH, load.rows - first)
        keys = Keys.of(fold.draw_users(random, n, load.users, load.zipf))
        pool["time"][:n] = 1.6e9 + np.arange(first, first + n) / 1000
        data, size = pool.tobytes(), SAMPLE.itemsize
        messages = [
            {"key": key, "value": data[size * row : size * (row + 1)], "partition": partition}
            for row, (key, partition) in enumerate(zip(keys.tolist(), keys.partitions(PARTITIONS).tolist()))
        ]
        if producer.produce_batch(topic, messages) != n:
            raise CrossrepError("the producer's queue is full")
        producer.flush(60)
    if producer.flush(60):
        raise CrossrepError("not all records were acknowledged")


def counted(bootstrap: str, changelogs: list[str]) -> tuple[int, int]:
    """The sum of the counts of all keys, which the newest record of each begins with; and how many records there are."""
    newest: dict[tuple[int, bytes], bytes] = {}
    records = 0
    for changelog in changelogs:
        for message in kafka.messages(bootstrap, changelog, kafka.bounds(bootstrap, changelog)):
            newest[message.partition(), message.key()] = message.value()[:8]
            records += 1
    return int(np.frombuffer(b"".join(newest.values()), "<i8").sum()), records


def changelogs(bootstrap: str, application: str) -> list[str]:
    """The changelog topics that an engine made for itself: all three name them so."""
    return [topic for topic in _topics(bootstrap) if application in topic and "changelog" in topic]


def forget(bootstrap: str, application: str) -> None:
    """Delete every topic an engine made for itself, and its group."""
    delete(bootstrap, [topic for topic in _topics(bootstrap) if application in topic])
    admin = kafka.admin(bootstrap)
    with suppress(KafkaException):  # a static member is still in it
        admin.delete_consumer_groups([application])[application].result(kafka.REQUEST_TIMEOUT)


def delete(bootstrap: str, topics: list[str]) -> None:
    """Delete topics, and wait for it."""
    admin = kafka.admin(bootstrap)
    for future in admin.delete_topics(topics).values() if topics else ():
        future.result(kafka.REQUEST_TIMEOUT)


def unique(what: str) -> str:
    """A name nobody else uses."""
    return f"peer-{what}-{os.getpid()}-{next(_numbers)}"


def _topics(bootstrap: str) -> list[str]:
    return list(kafka.admin(bootstrap).list_topics(timeout=kafka.REQUEST_TIMEOUT).topics)
