"""Connections to Kafka: where it is, and the client settings everything here shares."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from crossrep.errors import CrossrepError

REQUEST_TIMEOUT = 30.0  # seconds to wait for the cluster before giving up
RETRY_FOR = 60.0  # seconds a commit may wait for a cluster that is away


def home() -> Path:
    """Where this machine's own broker, stores and models live: `CROSSREP_HOME`, or `.crossrep` in the current folder."""
    return Path(os.environ.get("CROSSREP_HOME", ".crossrep"))


def bootstrap_servers(given: str | None = None) -> str:
    """The cluster to use: `given`, or KAFKA_BOOTSTRAP, or the broker `crossrep kafka up` started, or localhost:9092."""
    if given or "KAFKA_BOOTSTRAP" in os.environ:
        return given or os.environ["KAFKA_BOOTSTRAP"]
    try:
        return str(json.loads((home() / "kafka" / "broker.json").read_text())["bootstrap"])
    except (OSError, ValueError, KeyError):
        return "localhost:9092"


def _quiet(config: dict[str, Any]) -> dict[str, Any]:
    return {"log_level": 2, **config}  # librdkafka repeats every lost connection on stderr; errors reach us as exceptions


def admin(bootstrap: str) -> AdminClient:
    return AdminClient(_quiet({"bootstrap.servers": bootstrap}))


def transactional_producer(bootstrap: str, transactional_id: str, timeout: float, **config: Any) -> Producer:
    """A producer whose transactions abort after `timeout` seconds; not yet fenced (`init_transactions`)."""
    return Producer(
        _quiet(
            {
                "bootstrap.servers": bootstrap,
                "transactional.id": transactional_id,
                "transaction.timeout.ms": int(timeout * 1000),
                # A transaction right behind another meets a coordinator still writing the last one's markers, for a millisecond or two.
                # With librdkafka's own backoff each such transaction takes 110 ms, with this one 8.
                "retry.backoff.ms": 2,
                **_PRODUCER,
                **config,
            }
        )
    )


def producer(bootstrap: str, **config: Any) -> Producer:
    """An idempotent producer."""
    return Producer(_quiet({"bootstrap.servers": bootstrap, "enable.idempotence": True, **_PRODUCER, **config}))


_PRODUCER = {
    "linger.ms": 5,
    "message.max.bytes": 8 << 20,
    "batch.size": 1 << 20,
    "queue.buffering.max.messages": 2_000_000,
    "queue.buffering.max.kbytes": 1 << 20,
}


def consumer(bootstrap: str, group: str = "crossrep", config: Mapping[str, Any] | None = None) -> Consumer:
    """A read_committed consumer that never commits by itself and never jumps when its position is gone.

    librdkafka's defaults drain seven times slower: it fetches again only when its queue is nearly empty, and looks once a second.
    """
    return Consumer(
        _quiet(
            {
                "bootstrap.servers": bootstrap,
                "group.id": group,
                "isolation.level": "read_committed",
                "enable.auto.commit": False,
                "enable.auto.offset.store": False,
                "auto.offset.reset": "error",
                "queued.min.messages": 1_000_000,
                "queued.max.messages.kbytes": 128 << 10,
                "fetch.queue.backoff.ms": 5,
                "fetch.wait.max.ms": 100,
                "fetch.message.max.bytes": 8 << 20,
                **(config or {}),
            }
        )
    )


def retried(call: Callable[[], Any]) -> None:
    """Repeat a transactional call while librdkafka says that repeating is right: the cluster is away, or busy with the last one.

    Raises:
        KafkaException: repeating is not right, or a minute has passed.
    """
    deadline = time.monotonic() + RETRY_FOR
    while True:
        try:
            call()
            return
        except KafkaException as error:
            if not error.args[0].retriable() or time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def watermarks(client: Consumer, topic: str, partition: int) -> tuple[int, int]:
    """First and next offset of a partition, asked of the broker.

    Raises:
        CrossrepError: the cluster does not answer.
    """
    try:
        return client.get_watermark_offsets(TopicPartition(topic, partition), timeout=REQUEST_TIMEOUT)  # type: ignore[no-any-return]
    except KafkaException as error:
        raise CrossrepError(f"cannot ask for the offsets of {topic}[{partition}]: {error.args[0].str()}") from None


ENDS = {"enable.partition.eof": True}  # consumer setting: tell when a partition's end is reached (`is_end`)


def is_end(message: Any) -> bool:
    """Is this consumer event the end of a partition (`enable.partition.eof`)?"""
    return message.error() is not None and message.error().code() == KafkaError._PARTITION_EOF
