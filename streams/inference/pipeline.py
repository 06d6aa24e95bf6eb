"""Consume, turn into rows, write frames: exactly once, one Kafka transaction a batch. `infer` and `frame` differ only in their stages.

    consume a batch → stage → stage … → combine, encode, begin, produce frames and dead letters, send offsets, commit

The first stage runs in the main thread, each other one and the committing in a thread of its own: while one batch commits, the next is in
the model and the third is decoded. What keeps it exact:

- A transaction is begun only when all outputs are ready: an open one stalls every read_committed reader of its partitions.
- Group metadata is taken with the batch, right after it was consumed: a worker that lost its partitions meanwhile cannot commit them.
- Batches commit in the order they were consumed. Before partitions go, the batches under way are finished; after a failed commit everything
  not committed is dropped and read again.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from confluent_kafka import Consumer, KafkaException, Message, Producer, TopicPartition

from crossrep import kafka
from crossrep.columnar import frames
from crossrep.columnar.aggregates import combine
from crossrep.columnar.rows import Rows
from crossrep.control import groups, lineage, spaces
from crossrep.errors import BadRecord, CrossrepError, StateError
from crossrep.spec import Space
from state import dead_letters, faults
from streams.silence import Silence, reached

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
    combine: bool | None = None  # merge rows of one key inside a batch; None: as the space declares
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
    read_seconds: float = 0.0  # the first stage
    transform_seconds: float = 0.0  # the stages behind it
    encode_seconds: float = 0.0
    commit_seconds: float = 0.0


@dataclass
class Output:
    """What the stages make of a batch."""

    rows: list[Rows] = field(default_factory=list)
    refused: list[tuple[Message, BadRecord]] = field(default_factory=list)


# The first one takes a sequence of messages, each other what the one before it gave, and the last one gives the Output.
Stage = Callable[[Any], Any]


@dataclass(frozen=True)
class _Batch:
    source: lineage.Source
    group: Any  # the group's metadata as it was when the batch was consumed
    output: Future[Output]


class _Dropped(CrossrepError):
    """This batch stood behind one whose commit failed."""


class Pipeline:
    """One worker process: a member of `group` reading `inputs`, writing the frames of `space`.

    Args:
        admit: called before the worker takes partitions; what it raises ends the worker.
    """

    def __init__(
        self,
        space: Space,
        bootstrap: str,
        group: str,
        inputs: list[str],
        stages: Sequence[Stage],
        options: Options,
        admit: Callable[[], None] = lambda: None,
    ):
        self._admit = admit
        self.space, self.options, self.stats = space, options, Stats()
        self.assigned: list[TopicPartition] | None = None  # None until the first assignment
        self._inputs, self._group, self._bootstrap = inputs, group, bootstrap
        self._silence = Silence(bootstrap)
        self._rewound = 0  # how often the space was, when the partitions were taken
        self._stop = threading.Event()
        self._read, *self._stages = stages
        self._threads = [ThreadPoolExecutor(1, f"stage-{number}") for number in range(1, len(stages))]
        self._commits = ThreadPoolExecutor(1, "commit")
        self._under_way: deque[Future[None]] = deque()  # in the order they were consumed
        self._broken = False  # a commit failed: nothing behind it may be committed
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
                self._start(messages, group)
                self._settle(len(self._threads) + 1)
            elif self._under_way:
                self._settle(len(self._under_way))
            else:
                self._silence.check()
        self._settle(0)
        self._consumer.close()
        log.info("stopped: everything consumed is committed")

    def _consume(self) -> list[Message]:
        messages = []
        for event in self._consumer.consume(self.options.max_batch, self.options.max_delay):
            error = event.error()
            if error is None:
                messages.append(event)
            elif kafka.is_end(event):
                self._silence.heard(reached([event]))
            elif error.fatal() or error.name() in ("_FATAL", "_AUTO_OFFSET_RESET", "UNKNOWN_TOPIC_OR_PART"):
                raise CrossrepError(f"reading {event.topic()}[{event.partition()}]: {error.str()}")
            elif not error.retriable():
                log.warning("reading %s: %s", event.topic(), error.str())
        return messages

    def _start(self, messages: list[Message], group: Any) -> None:
        """Read a batch and hand it to the threads, each of which takes the batches in turn."""
        started = time.monotonic()
        result: Future[Any] = Future()
        result.set_result(self._read(messages))
        for stage, thread in zip(self._stages, self._threads):
            result = thread.submit(self._transform, stage, result)
        source = lineage.of(self._group, messages, self._rewound)
        self._silence.heard(source.ends)
        self._under_way.append(self._commits.submit(self._commit_in_turn, _Batch(source, group, result)))
        self.stats.messages += len(messages)
        self.stats.batches += 1
        self.stats.read_seconds += time.monotonic() - started

    def _transform(self, stage: Stage, before: Future[Any]) -> Any:
        batch = before.result()
        started = time.monotonic()
        after = stage(batch)
        self.stats.transform_seconds += time.monotonic() - started
        return after

    def _settle(self, most: int) -> None:
        """Wait until `most` batches are under way at most. After a failed commit: go back to what is committed."""
        while self._under_way and (len(self._under_way) > most or self._under_way[0].done()):
            try:
                self._under_way.popleft().result()
            except KafkaException as error:
                self._go_back(error)

    def _go_back(self, error: KafkaException) -> None:
        problem = error.args[0]
        if problem.fatal() or not problem.txn_requires_abort():
            raise error
        log.warning("a batch is dropped and read again: %s", problem.str())
        wait(self._under_way)  # they end as dropped
        self.stats.retried_batches += 1 + len(self._under_way)
        self._under_way.clear()
        kafka.within(TRANSACTION_TIMEOUT, lambda: kafka.retried(self._producer.abort_transaction))
        self._broken = False
        if self.assigned is not None:
            self._on_assign(self._consumer, self.assigned)

    # --- committing, in the committer's thread ---

    def _commit_in_turn(self, batch: _Batch) -> None:
        try:
            output = batch.output.result()
            faults.point("infer.computed")
            if self._broken:
                raise _Dropped("the batch before it was not committed")
            kafka.within(TRANSACTION_TIMEOUT + 5, partial(self._commit, batch, *self._encode(output)))
        except BaseException:
            self._broken = True
            raise

    def _encode(self, output: Output) -> tuple[list[tuple[int, bytes]], list[bytes]]:
        """Frames with their partitions, and dead letters."""
        started = time.monotonic()
        encoded: list[tuple[int, bytes]] = []
        merging = self.space.combine if self.options.combine is None else self.options.combine
        for rows in output.rows:
            encoded += frames.encode(self.space, combine(self.space, rows) if merging else rows)
        letters = [dead_letters.encode(m.topic(), m.partition(), m.offset(), m.key(), m.value(), error) for m, error in output.refused]
        for message, error in output.refused[:3]:
            log.warning("%s[%d]@%d is a dead letter: %s", message.topic(), message.partition(), message.offset(), error)
        self.stats.rows += sum(map(len, output.rows))
        self.stats.frames += len(encoded)
        self.stats.dead_letters += len(letters)
        self.stats.encode_seconds += time.monotonic() - started
        return encoded, letters

    def _commit(self, batch: _Batch, encoded: list[tuple[int, bytes]], letters: list[bytes]) -> None:
        started = time.monotonic()
        producer = self._producer
        headers = lineage.encode(batch.source)
        offsets = [TopicPartition(*place, end) for place, end in batch.source.ends.items()]
        producer.begin_transaction()
        faults.point("infer.begun")
        for partition, frame in encoded:
            producer.produce(self.space.frames_topic, frame, partition=partition, headers=headers)
        for letter in letters:
            producer.produce(self.space.dead_letters_topic, letter)
        faults.point("infer.produced")
        kafka.retried(lambda: producer.send_offsets_to_transaction(offsets, batch.group))
        faults.point("infer.offsets")
        kafka.retried(producer.commit_transaction)
        faults.point("infer.committed")
        self.stats.commit_seconds += time.monotonic() - started

    # --- membership, in the main thread, inside consume() ---

    def _on_assign(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        if partitions:
            self._admit()
        positions = self._positions(consumer, partitions)
        # Asked at each assignment: whoever slept through a rewind joins anew, and must not pass for one of those from before it.
        published = spaces.outlasting(lambda: spaces.find(self.space.name, self._bootstrap))
        spaces.refuse_rewinding(published)
        self._rewound = published.rewound
        self.assigned = positions
        consumer.assign(positions)
        self._silence.unassigned()
        self._silence.assigned({(part.topic, part.partition): part.offset for part in positions})
        log.info("assigned %s", ", ".join(f"{p.topic}[{p.partition}]" for p in partitions) or "nothing")

    def _on_revoke(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self.assigned = None
        self._settle(0)

    def _positions(self, consumer: Consumer, partitions: list[TopicPartition]) -> list[TopicPartition]:
        """The committed offsets; where nothing was ever committed, the beginning.

        Raises:
            StateError: retention deleted messages before they were consumed, or the group has lost its offsets. Never a silent jump.
        """
        found = kafka.committed(consumer, partitions)
        new = any(part.offset < 0 for part in found)
        if new and self.options.start is None and groups.lost(self._bootstrap, self._group, self._inputs, self.space.frames_topic):
            raise StateError(
                f"group {self._group!r} has no offsets, but {self.space.frames_topic} holds frames already. If the offsets expired, "
                "beginning again would count twice: --start latest. If this kind of worker is new to the space: --start earliest"
            )
        positions = []
        for part in found:
            first, end = kafka.watermarks(consumer, part.topic, part.partition)
            if part.offset >= 0 and groups.missed(part.offset, first, end):
                raise StateError(
                    f"{part.topic}[{part.partition}] begins at {first}, but the next to consume is {part.offset}: messages were deleted "
                    f"before they were consumed. To accept the gap: kafka-consumer-groups.sh --group {self._group} --topic "
                    f"{part.topic}:{part.partition} --reset-offsets --to-earliest --execute"
                )
            beginning = end if self.options.start == "latest" else first
            positions.append(TopicPartition(part.topic, part.partition, max(part.offset, first) if part.offset >= 0 else beginning))
        return positions
