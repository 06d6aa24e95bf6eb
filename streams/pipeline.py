"""Consume, turn into rows, write frames: exactly once, one Kafka transaction a batch. `infer` and `frame` differ only in their transform.

    consume a batch → transform (main thread) → begin, produce frames and dead letters, send offsets, commit (committer thread)

The main thread computes the next batch while the last one commits. What keeps it exact:

- A transaction is begun only when all outputs are ready: an open one stalls every read_committed reader of its partitions.
- Group metadata is taken with the batch, right after it was consumed: a worker that lost its partitions meanwhile cannot commit them.
- Batches commit in the order they were consumed. Before partitions go, the batch under way is finished; after a failed commit everything
  not committed is dropped and read again.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from confluent_kafka import Consumer, KafkaException, Message, Producer, TopicPartition
from numpy.typing import NDArray

from crossrep import frames, kafka
from crossrep.aggregates import combine
from crossrep.errors import BadFrame, BadRecord, CrossrepError, StateError
from crossrep.rows import Rows
from crossrep.spec import Space
from state import dead_letters, faults
from streams import lineage
from streams.silence import Silence

log = logging.getLogger(__name__)

# Seconds. A dead worker's open transaction stalls readers until then; one that ends before the cluster has replaced a lost broker (9 s by
# Kafka's defaults) costs the worker a restart.
TRANSACTION_TIMEOUT = 10.0


@dataclass(frozen=True)
class Options:
    """What an operator chooses."""

    name: str  # stable name of this worker: transactional id and group membership
    port: int  # of /ready and /metrics
    max_batch: int = 4096  # messages
    max_delay: float = 0.02  # seconds the first message of a batch may wait for others
    combine: bool = True  # merge rows of one key inside a batch
    session_timeout: float = 10.0
    start: str | None = None  # earliest or latest: where to begin if the group has no offsets although the space has frames


@dataclass
class Stats:
    """Counters since the process started, for metrics."""

    messages: int = 0
    batches: int = 0
    rows: int = 0
    frames: int = 0
    dead_letters: int = 0
    retried_batches: int = 0
    transform_seconds: float = 0.0
    commit_seconds: float = 0.0


@dataclass
class Output:
    """What a transform makes of a batch."""

    rows: list[Rows] = field(default_factory=list)
    refused: list[tuple[Message, BadRecord]] = field(default_factory=list)


Transform = Callable[[Sequence[Message]], Output]


@dataclass(frozen=True)
class _Batch:
    frames: list[tuple[int, bytes]]
    headers: list[tuple[str, bytes]]  # of every frame: the batch's source
    dead_letters: list[bytes]
    offsets: list[TopicPartition]  # next offset per partition
    group: Any  # the group's metadata as it was when the batch was consumed


class Pipeline:
    """One worker process: a member of `group` reading `inputs`, writing the frames of `space`."""

    def __init__(self, space: Space, bootstrap: str, group: str, inputs: list[str], transform: Transform, options: Options):
        self.space, self.options, self.stats = space, options, Stats()
        self.assigned: list[TopicPartition] | None = None  # None until the first assignment
        self._inputs, self._group, self._bootstrap = inputs, group, bootstrap
        self._silence = Silence(bootstrap)
        self._transform = transform
        self._stop = threading.Event()
        self._commits = ThreadPoolExecutor(1, "commit")
        self._under_way: Future[None] | None = None
        self._producer: Producer = kafka.transactional_producer(bootstrap, f"{group}.{options.name}", TRANSACTION_TIMEOUT)
        self._consumer: Consumer = kafka.consumer(
            bootstrap,
            group,
            {
                **kafka.ENDS,
                "group.instance.id": options.name,
                "session.timeout.ms": int(options.session_timeout * 1000),
                "heartbeat.interval.ms": int(options.session_timeout * 200),
                "queued.min.messages": max(10_000, 2 * options.max_batch),
            },
        )

    @property
    def ready(self) -> bool:
        return self.assigned is not None

    def stop(self, *_: Any) -> None:
        """Finish the batch under way and return from `run`. Also a signal handler."""
        self._stop.set()

    def run(self) -> None:
        """Work until stopped.

        Raises:
            CrossrepError: another worker of this name took over, or the cluster was away for too long. Nothing is lost: start again.
        """
        try:
            self._work()
        except KafkaException as error:
            raise CrossrepError(
                f"worker {self.options.name!r} cannot go on: {error.args[0].str()}. Nothing is lost; if another worker runs under this "
                "name, give one of them another --name, then start this one again"
            ) from error

    def _work(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.stop)
        kafka.retried(lambda: self._producer.init_transactions(kafka.REQUEST_TIMEOUT))
        self._consumer.subscribe(self._inputs, on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_revoke)
        while not self._stop.is_set():
            messages = self._consume()
            if messages:
                # Taken now, not later: should the group go on without us, this batch must not be committed with the new generation.
                group = self._consumer.consumer_group_metadata()
                faults.point("infer.consumed")
                batch = self._compute(messages, group)
                faults.point("infer.computed")
                if self._finish():  # else this batch was consumed behind one that must come first, and is read again with it
                    self._under_way = self._commits.submit(kafka.within, TRANSACTION_TIMEOUT + 5, partial(self._commit, batch))
            elif self._under_way is not None and self._under_way.done():
                self._finish()
            else:
                self._silence.check()
        self._finish()
        self._consumer.close()
        log.info("stopped: everything consumed is committed")

    def _consume(self) -> list[Message]:
        messages = []
        events = self._consumer.consume(self.options.max_batch, self.options.max_delay)
        self._silence.heard(events)
        for event in events:
            if event.error() is None:
                messages.append(event)
            elif kafka.is_end(event):
                continue
            elif event.error().fatal() or event.error().name() in ("_FATAL", "_AUTO_OFFSET_RESET", "UNKNOWN_TOPIC_OR_PART"):
                raise CrossrepError(f"reading {event.topic()}[{event.partition()}]: {event.error().str()}")
            elif not event.error().retriable():
                log.warning("reading %s: %s", event.topic(), event.error().str())
        return messages

    def _compute(self, messages: list[Message], group: Any) -> _Batch:
        started = time.monotonic()
        output = self._transform(messages)
        encoded: list[tuple[int, bytes]] = []
        for rows in output.rows:
            encoded += frames.encode(self.space, combine(self.space, rows) if self.options.combine else rows)
        letters = [dead_letters.encode(m.topic(), m.partition(), m.offset(), m.key(), m.value(), error) for m, error in output.refused]
        for message, error in output.refused[:3]:
            log.warning("%s[%d]@%d is a dead letter: %s", message.topic(), message.partition(), message.offset(), error)
        source = lineage.of(self._group, messages)
        self.stats.messages += len(messages)
        self.stats.batches += 1
        self.stats.rows += sum(map(len, output.rows))
        self.stats.frames += len(encoded)
        self.stats.dead_letters += len(letters)
        self.stats.transform_seconds += time.monotonic() - started
        offsets = [TopicPartition(topic, number, end) for (topic, number), (_, end) in source.spans.items()]
        return _Batch(encoded, lineage.encode(source), letters, offsets, group)

    # --- committing, in the committer's thread ---

    def _commit(self, batch: _Batch) -> None:
        started = time.monotonic()
        producer = self._producer
        producer.begin_transaction()
        faults.point("infer.begun")
        for partition, frame in batch.frames:
            producer.produce(self.space.frames_topic, frame, partition=partition, headers=batch.headers)
        for letter in batch.dead_letters:
            producer.produce(self.space.dead_letters_topic, letter)
        faults.point("infer.produced")
        kafka.retried(lambda: producer.send_offsets_to_transaction(batch.offsets, batch.group))
        faults.point("infer.offsets")
        kafka.retried(producer.commit_transaction)
        faults.point("infer.committed")
        self.stats.commit_seconds += time.monotonic() - started

    def _finish(self) -> bool:
        """Wait for the commit under way. If it failed, go back to what is committed and return False."""
        under_way, self._under_way = self._under_way, None
        if under_way is None:
            return True
        try:
            under_way.result()
            return True
        except KafkaException as error:
            problem = error.args[0]
            if problem.fatal() or not problem.txn_requires_abort():
                raise
            log.warning("a batch is dropped and read again: %s", problem.str())
            kafka.within(TRANSACTION_TIMEOUT, lambda: kafka.retried(self._producer.abort_transaction))
            self.stats.retried_batches += 1
            if self.assigned is not None:
                self._on_assign(self._consumer, self.assigned)
            return False

    # --- membership, in the main thread, inside consume() ---

    def _on_assign(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        positions = self._positions(consumer, partitions)
        self.assigned = positions
        consumer.assign(positions)
        self._silence.unassigned()
        self._silence.assigned({(part.topic, part.partition): part.offset for part in positions})
        log.info("assigned %s", ", ".join(f"{p.topic}[{p.partition}]" for p in partitions) or "nothing")

    def _on_revoke(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self.assigned = None
        self._finish()

    def _positions(self, consumer: Consumer, partitions: list[TopicPartition]) -> list[TopicPartition]:
        """The committed offsets; where nothing was ever committed, the beginning.

        Raises:
            StateError: retention deleted messages before they were consumed, or the group has lost its offsets. Never a silent jump.
        """
        found = kafka.committed(consumer, partitions)
        if any(part.offset < 0 for part in found) and self.options.start is None and self._offsets_are_lost(consumer):
            raise StateError(
                f"group {self._group!r} has no offsets, but {self.space.frames_topic} holds frames already. If the offsets expired, "
                "beginning again would count twice: --start latest. If this kind of worker is new to the space: --start earliest"
            )
        positions = []
        for part in found:
            first, end = kafka.watermarks(consumer, part.topic, part.partition)
            if 0 <= part.offset < first:
                raise StateError(
                    f"{part.topic}[{part.partition}] begins at {first}, but the next to consume is {part.offset}: messages were deleted "
                    f"before they were consumed. To accept the gap: kafka-consumer-groups.sh --group {self._group} --topic "
                    f"{part.topic}:{part.partition} --reset-offsets --to-earliest --execute"
                )
            beginning = end if self.options.start == "latest" else first
            positions.append(TopicPartition(part.topic, part.partition, part.offset if part.offset >= 0 else beginning))
        return positions

    def _offsets_are_lost(self, consumer: Consumer) -> bool:
        """Has the group no offset at all, although frames exist? Offsets and frames are committed together, so a new group has neither."""
        topics = [consumer.list_topics(name, timeout=kafka.REQUEST_TIMEOUT).topics[name] for name in self._inputs]
        everywhere = [TopicPartition(topic.topic, number) for topic in topics for number in topic.partitions]
        if any(part.offset >= 0 for part in kafka.committed(consumer, everywhere)):
            return False
        return any(kafka.watermarks(consumer, self.space.frames_topic, n)[1] > 0 for n in range(self.space.partitions))


def split_finite(
    space: Space, messages: Sequence[Message], sources: dict[str, NDArray[np.float32]]
) -> tuple[NDArray[np.bool_], list[tuple[Message, BadRecord]]]:
    """Which rows of a batch can be written (bool [n]), and a refusal for each that cannot: not finite in the space's vector type."""
    limit = np.finfo(space.vectors).max
    good = np.ones(len(messages), np.bool_)
    refused: list[tuple[Message, BadRecord]] = []
    for name, array in sources.items():
        for row in np.flatnonzero(good & ~(np.abs(array) <= limit).all(axis=1)).tolist():
            good[row] = False
            refused.append((messages[row], BadFrame("vector", f"{name} is not finite in {space.vectors}")))
    return good, refused
