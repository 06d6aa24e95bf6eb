"""The changelog of one partition number: its transactions, and how it is read back.

One producer per partition, whose transactional id is the partition's: who opens it last fences all others, also one that wakes up later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from confluent_kafka import Producer, TopicPartition

from crossrep import kafka
from crossrep.spec import Space, fold_group
from state import faults, progress
from state.progress import Progress
from state.writes import Writes, produce

QUEUED = 500_000  # records handed to the producer at a time; only a rewind has more
TRANSACTION_TIMEOUT = 10.0  # seconds; a flush takes milliseconds, a dead worker's transaction stalls readers until then


@dataclass(frozen=True)
class Flush:
    """What one transaction writes."""

    records: dict[str, list[Writes]]  # by entity; no list and no item is empty
    progress: Progress
    history: list[bytes] = field(default_factory=list)
    dead_letters: list[bytes] = field(default_factory=list)


class Changelog:
    """Writes and reads partition `number` of all of a space's representation topics."""

    def __init__(self, space: Space, number: int, bootstrap: str, timeout: float = TRANSACTION_TIMEOUT):
        self._space = space
        self._group = fold_group(space)
        self._bootstrap = bootstrap
        self._timeout = timeout
        self.number = number
        self._producer: Producer | None = None
        self._group_metadata: Any = None

    def fence(self) -> None:
        """Become the only writer. Aborts what the former owner left open; its next commit fails."""
        self._producer = kafka.transactional_producer(self._bootstrap, f"{self._group}-{self.number}", self._timeout)
        kafka.retried(lambda: self._producer.init_transactions(kafka.REQUEST_TIMEOUT))  # type: ignore[union-attr]
        # Not the metadata of Faust's member: the transactional id, not the group's generation, is what fences here.
        outsider = kafka.consumer(self._bootstrap, self._group)
        self._group_metadata = outsider.consumer_group_metadata()
        outsider.close()

    def commit(self, flush: Flush) -> dict[str, int]:
        """Write records and progress in one transaction. Returns, per entity written, the offset behind its last record.

        Raises:
            KafkaException: fenced, or the cluster was away for too long; the caller must end the process.
        """
        return kafka.within(self._timeout + 5, lambda: self._commit(flush))

    def _commit(self, flush: Flush) -> dict[str, int]:
        producer = self._producer
        assert producer is not None, "fence first"
        ends: dict[str, int] = {}
        producer.begin_transaction()
        faults.point("commit.begun")
        for entity, found in flush.records.items():
            topic = self._space.representations_topic(entity)

            def delivered(error: Any, message: Any, entity: str = entity) -> None:
                if error is None:
                    ends[entity] = message.offset() + 1

            for writes in found:
                rows = len(writes) - (writes is found[-1])  # the last one of all goes by itself, since its offset is wanted
                for first in range(0, rows, QUEUED):
                    if first:
                        producer.flush(kafka.RETRY_FOR)
                    produce(producer, topic, self.number, writes, first, min(first + QUEUED, rows))
            key, value = found[-1].last()
            producer.produce(topic, value, key, partition=self.number, on_delivery=delivered)
        for undo in flush.history:
            producer.produce(self._space.history_topic, undo, partition=self.number)
        for letter in flush.dead_letters:
            producer.produce(self._space.dead_letters_topic, letter)
        producer.flush(kafka.RETRY_FOR)
        faults.point("commit.produced")
        frames = TopicPartition(self._space.frames_topic, self.number, flush.progress.offset, progress.encode(flush.progress))
        kafka.retried(lambda: producer.send_offsets_to_transaction([frames], self._group_metadata))
        faults.point("commit.offsets")
        kafka.retried(producer.commit_transaction)
        faults.point("commit.committed")
        return ends

    def tail(self, start: dict[str, int], progressed: Callable[[int, int], None]) -> Iterator[tuple[str, list[bytes], list[bytes], int]]:
        """Committed records from `start` (entity -> offset) to the end, in large runs: entity, keys, values, next offset.

        Args:
            progressed: told how many records were read and how many offsets there are in all.

        Raises:
            CrossrepError: the cluster does not answer for a minute, or refuses.
        """
        topics = {entity: self._space.representations_topic(entity) for entity in start}
        client = kafka.consumer(self._bootstrap)
        try:
            ends = {entity: kafka.watermarks(client, topic, self.number)[1] for entity, topic in topics.items()}
        finally:
            client.close()
        total, done = sum(max(ends[entity] - start[entity], 0) for entity in start), 0
        for entity, topic in topics.items():
            for run in kafka.runs(self._bootstrap, topic, {self.number: (start[entity], ends[entity])}):
                yield entity, [message.key() for message in run], [message.value() or b"" for message in run], run[-1].offset() + 1
                done += len(run)
                progressed(done, total)
