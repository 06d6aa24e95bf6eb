"""Connections to Kafka: where it is, and the client settings everything here shares."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Container, Iterator, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from typing import Any, TypeVar

from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, ConfigResource, ResourceType

from crossrep.errors import CrossrepError

Answer = TypeVar("Answer")
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
    """An idempotent producer.

    One request at a time: with several in flight, librdkafka writes some messages twice when a partition's leader changes
    (confluentinc/librdkafka#4953). A transaction is aborted in that case, so transactional producers need not care.
    """
    idempotent = {"enable.idempotence": True, "max.in.flight.requests.per.connection": 1}
    return Producer(_quiet({"bootstrap.servers": bootstrap, **idempotent, **_PRODUCER, **config}))


_PRODUCER = {
    "linger.ms": 5,
    "request.timeout.ms": 10_000,  # a broker that hangs is asked again, or left, after that, not after the default 30 s
    "socket.timeout.ms": 10_000,
    "message.max.bytes": 8 << 20,
    "batch.size": 1 << 20,
    "queue.buffering.max.messages": 2_000_000,
    "queue.buffering.max.kbytes": 1 << 20,
}


def consumer(bootstrap: str, group: str = "crossrep", config: Mapping[str, Any] | None = None) -> Consumer:
    """A read_committed consumer that never commits by itself and never jumps when its position is gone.

    librdkafka's defaults drain several times slower: it fetches again only when its queue is nearly empty, and looks once a second.
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
                "check.crcs": True,
                "queued.min.messages": 1_000_000,
                "queued.max.messages.kbytes": 128 << 10,
                "fetch.queue.backoff.ms": 5,
                "fetch.wait.max.ms": 100,
                "fetch.message.max.bytes": 8 << 20,
                **(config or {}),
            }
        )
    )


# What says only that the cluster, or a part of it, is away for now. librdkafka calls none of these retriable outside of transactions.
TRANSIENT = {
    KafkaError._TIMED_OUT,
    KafkaError._TRANSPORT,
    KafkaError._ALL_BROKERS_DOWN,
    KafkaError._WAIT_COORD,
    KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
    KafkaError.COORDINATOR_NOT_AVAILABLE,
    KafkaError.NOT_COORDINATOR,
    KafkaError.LEADER_NOT_AVAILABLE,
    KafkaError.NOT_LEADER_FOR_PARTITION,
    KafkaError.UNSTABLE_OFFSET_COMMIT,
}


def retried(call: Callable[[], Answer], transient: Container[int] = ()) -> Answer:
    """Repeat a call while librdkafka says that repeating is right, or the error's code is among `transient`, for a minute at most.

    Raises:
        KafkaException: repeating is not right, or the minute has passed.
    """
    deadline = time.monotonic() + RETRY_FOR
    while True:
        try:
            return call()
        except KafkaException as error:
            problem = error.args[0]
            if not (problem.retriable() or problem.code() in transient) or time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def within(limit: float, call: Callable[[], Answer]) -> Answer:
    """A call to librdkafka, given up after `limit` seconds: its own timeouts are not kept when a coordinator or all brokers are lost to it
    (confluentinc/librdkafka#5456, #5511, #5301). The call then hangs on in a thread of its own; its client is of no use any more.

    Raises:
        KafkaException: it took too long; and whatever the call raises.
    """
    outcome: Future[Answer] = Future()

    def work() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=work, name="within", daemon=True).start()
    try:
        return outcome.result(limit)
    except FutureTimeout:
        if outcome.done():  # the call's own
            raise
        raise KafkaException(KafkaError(KafkaError._TIMED_OUT, f"Kafka has not answered within {limit:.0f} s")) from None


def committed(client: Consumer, parts: list[TopicPartition]) -> list[TopicPartition]:
    """The group's stable offsets of these partitions; negative where there is none.

    Raises:
        KafkaException: the cluster does not answer for a minute, or refuses.
    """

    def ask() -> list[TopicPartition]:
        found: list[TopicPartition] = client.committed(parts, timeout=REQUEST_TIMEOUT)
        for part in found:
            if part.error is not None:
                raise KafkaException(part.error)
        return found

    return retried(ask, TRANSIENT) if parts else []


def watermarks(client: Consumer, topic: str, partition: int) -> tuple[int, int]:
    """First and next offset of a partition, asked of the broker.

    Raises:
        CrossrepError: the cluster does not answer.
    """
    try:
        place = TopicPartition(topic, partition)
        first, end = retried(lambda: client.get_watermark_offsets(place, timeout=REQUEST_TIMEOUT), TRANSIENT)
        return first, end
    except KafkaException as error:
        raise CrossrepError(f"cannot ask for the offsets of {topic}[{partition}]: {error.args[0].str()}") from None


ENDS = {"enable.partition.eof": True}  # consumer setting: tell when a partition's end is reached (`is_end`)


def is_end(message: Any) -> bool:
    """Is this consumer event the end of a partition (`enable.partition.eof`)?"""
    return message.error() is not None and message.error().code() == KafkaError._PARTITION_EOF


def runs(bootstrap: str, topic: str, bounds: Mapping[int, tuple[int, int]]) -> Iterator[list[Any]]:
    """Everything committed within `bounds` (partition -> first and next offset), per partition in order, in runs of up to 10,000.

    Raises:
        CrossrepError: the cluster does not answer for a minute, or refuses.
    """
    client = consumer(bootstrap, config={**ENDS, "fetch.wait.max.ms": 10})  # that long the broker keeps quiet about an end
    try:
        left = {number for number, (first, end) in bounds.items() if end > first}
        client.assign([TopicPartition(topic, number, bounds[number][0]) for number in left])
        heard = time.monotonic()
        while left:
            batch = client.consume(10_000, 0.02)
            if batch:
                heard = time.monotonic()
            elif time.monotonic() - heard > RETRY_FOR:
                raise CrossrepError(f"reading {topic}: the cluster has not answered for {RETRY_FOR:.0f} s")
            run = []
            for message in batch:
                number, error = message.partition(), message.error()
                if error is None:
                    if number in left:
                        if message.offset() < bounds[number][1]:
                            run.append(message)
                        else:
                            left.discard(number)
                elif is_end(message):
                    if message.offset() >= bounds[number][1]:  # a new leader may show an earlier end for a moment
                        left.discard(number)
                elif error.code() not in TRANSIENT and not error.retriable():
                    raise CrossrepError(f"reading {topic}[{number}]: {error.str()}")
            if run:
                yield run
                heard = time.monotonic()  # whoever took it may have taken long
    finally:
        client.close()


def messages(bootstrap: str, topic: str, bounds: Mapping[int, tuple[int, int]]) -> Iterator[Any]:
    """The messages of `runs`, one by one."""
    for run in runs(bootstrap, topic, bounds):
        yield from run


def tombstones_kept(bootstrap: str, topic: str) -> float:
    """For how many seconds a topic keeps deletions at least; Kafka's default, a day, where it may not be asked (DESCRIBE_CONFIGS).

    Raises CrossrepError: the cluster does not say.
    """
    try:
        return float(settings(bootstrap, topic)["delete.retention.ms"]) / 1000
    except CrossrepError as error:
        cause = error.__cause__
        if isinstance(cause, KafkaException) and cause.args[0].code() == KafkaError.TOPIC_AUTHORIZATION_FAILED:
            return 86_400.0
        raise


def settings(bootstrap: str, topic: str) -> dict[str, str]:
    """A topic's settings, its own and the brokers' defaults.

    Raises:
        CrossrepError: the cluster does not say.
    """
    client = admin(bootstrap)  # held: else its futures never end

    def ask() -> dict[str, str]:
        (asked,) = client.describe_configs([ConfigResource(ResourceType.TOPIC, topic)], request_timeout=REQUEST_TIMEOUT).values()
        return {name: entry.value for name, entry in asked.result().items()}

    try:
        return retried(ask, TRANSIENT)
    except KafkaException as error:
        raise CrossrepError(f"cannot ask for the settings of {topic}: {error.args[0].str()}") from error


def bounds(bootstrap: str, topic: str) -> dict[int, tuple[int, int]]:
    """First and next offset of every partition of a topic.

    Raises:
        CrossrepError: the topic does not exist, or the cluster does not answer.
    """
    client = consumer(bootstrap)
    try:
        found = retried(lambda: client.list_topics(topic, timeout=REQUEST_TIMEOUT), TRANSIENT).topics[topic]
        if found.error is not None:
            raise CrossrepError(f"topic {topic}: {found.error.str()}")
        return {number: watermarks(client, topic, number) for number in found.partitions}
    except KafkaException as error:
        raise CrossrepError(f"cannot ask for the offsets of {topic}: {error.args[0].str()}") from None
    finally:
        client.close()
