"""One partition number's life: fence, restore, fold, flush, close. docs/guarantees.md walks through its failures.

    fence()           become the only writer
    open()            RocksDB and the changelog's tail → progress
    fold(message)     validate whole, then into the slab
    copy() commit() done()   a flush in three steps, so that folding goes on while the second one waits for Kafka
    reopen()          after a rebalance that gave the partition back: keep what is still true
    close()

Any exception from these ends the process: memory may be ahead of the log, and only a restart makes them agree again.
`fence`, `open`, `reopen` and `commit` block and belong in a thread; the others belong to the thread that folds.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path

from confluent_kafka import TopicPartition

from crossrep import frames, kafka
from crossrep.errors import BadFrame, StateError
from crossrep.records import RecordLayout
from crossrep.rows import Rows
from crossrep.spec import Space
from state import dead_letters, faults
from state.changelog import Changelog, Flush
from state.slab import Copy, Slab
from state.store import Memory, Meta, Store, open_store

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What all partitions of a worker share."""

    space: Space
    group: str  # the consumer group whose committed offset is the progress
    bootstrap: str
    folder: Path  # of this worker's stores
    topic_ids: dict[str, str]
    memory: Memory
    slots: int = 65_536  # most keys in memory per entity and partition
    tombstones_kept: float = 86_400.0  # seconds; the changelogs' delete.retention.ms


@dataclass
class Stats:
    """Counters since the process started, for metrics."""

    rows: int = 0
    frames: int = 0
    dead_letters: int = 0
    records: int = 0
    flushes: int = 0
    flush_seconds: float = 0.0
    restored: int = 0
    restore_total: int = 0
    restore_seconds: float = 0.0


@dataclass(frozen=True)
class Pending:
    """A flush between `copy` and `done`."""

    copies: dict[str, Copy]
    progress: int
    dead_letters: list[bytes]


class Partition:
    """State of partition `number` of every entity of a space."""

    def __init__(self, settings: Settings, number: int):
        self._settings = settings
        self._space = settings.space
        self.number = number
        self.stats = Stats()
        self.progress = -1  # next frame offset to fold
        self._flushed = -1  # next frame offset as committed
        self._layouts = {entity: RecordLayout(settings.space, entity) for entity in settings.space.entities}
        self._changelog = Changelog(settings.space, settings.group, number, settings.bootstrap)
        self._slabs: dict[str, Slab] = {}
        self._store: Store | None = None
        self._dead_letters: list[bytes] = []

    # --- taking over ---

    def fence(self) -> None:
        """Become the only writer. Milliseconds, and apart from `open`, so that it never happens late, when another is the owner already."""
        self._changelog.fence()
        faults.point("open.fenced")

    def open(self) -> int:
        """Restore, and return the frame offset to go on from. The caller has fenced.

        Raises:
            StateError: progress and state contradict each other in a way only a person can resolve; says how.
        """
        started = time.monotonic()
        self.close()
        self._store = self._open_store()
        after_records = self._restore(self._store)
        faults.point("open.restored")
        progress = self._progress_at_broker(max(after_records, self._store.meta.progress))
        store = self._store
        self._slabs = {
            entity: Slab(layout, lambda keys, entity=entity: store.get(entity, keys), self._settings.slots)  # type: ignore[misc]
            for entity, layout in self._layouts.items()
        }
        self.progress = self._flushed = progress
        self.stats.restore_seconds = time.monotonic() - started
        return progress

    def reopen(self) -> int:
        """Take over again after a rebalance. What is in memory is kept if nobody else has moved the progress since our last flush."""
        if self._store is None:
            return self.open()
        if self.progress == self._flushed == self._committed():
            self.progress = self._within_log(self.progress)
            return self.progress
        log.warning("partition %d was folded elsewhere meanwhile; restoring", self.number)
        return self.open()

    def _open_store(self) -> Store:
        expected = Meta(self._space.hash.hex(), self._settings.topic_ids)
        folder = self._settings.folder / f"partition-{self.number}"
        client = kafka.consumer(self._settings.bootstrap)
        try:
            bounds = {e: kafka.watermarks(client, self._space.representations_topic(e), self.number) for e in self._layouts}
        finally:
            client.close()
        return open_store(folder, expected, bounds, self._settings.memory, self._settings.tombstones_kept)

    def _restore(self, store: Store) -> int:
        """Read the changelog's tail into the store. Returns one past the greatest source offset seen, or -1."""

        def progressed(done: int, total: int) -> None:
            self.stats.restored, self.stats.restore_total = done, total

        after = -1
        for entity, keys, values, end in self._changelog.tail(dict(store.meta.changelog), progressed):
            records = self._layouts[entity].decode([value for value in values if value], f"changelog record of {entity}")
            if len(records):
                after = max(after, int(records["source_offset"].max()) + 1)
            store.write({entity: (keys, values)}, {entity: end}, max(store.meta.progress, after))
        return after

    def _committed(self) -> int | None:
        """The group's progress as Kafka knows it; None if there is none, yet or any more."""
        client = kafka.consumer(self._settings.bootstrap, self._settings.group)
        try:
            offset: int = kafka.committed(client, [TopicPartition(self._space.frames_topic, self.number)])[0].offset
            return offset if offset >= 0 else None
        finally:
            client.close()

    def _progress_at_broker(self, folded: int) -> int:
        """The offset to go on from: the group's, checked against `folded`, the offset the records prove to be folded up to (-1: none)."""
        place = f"{self._space.frames_topic}[{self.number}]"
        progress = self._committed()
        if progress is None:
            # A group's offsets expire after weeks of silence; the records know better. With neither, this is a new space.
            progress = folded if folded >= 0 else self._log()[0]
        if progress < folded:
            raise StateError(
                f"group {self._settings.group!r} says {place} is folded up to {progress}, but records hold frames up to {folded}: somebody "
                f"moved the group back, and folding again would count twice. To go on: "
                f"kafka-consumer-groups.sh --group {self._settings.group} "
                f"--topic {self._space.frames_topic}:{self.number} --reset-offsets --to-offset {folded} --execute. "
                "To fold again from an earlier point, do it in a new space"
            )
        return self._within_log(progress)

    def _log(self) -> tuple[int, int]:
        """First and next offset of our frames."""
        client = kafka.consumer(self._settings.bootstrap)
        try:
            return kafka.watermarks(client, self._space.frames_topic, self.number)
        finally:
            client.close()

    def _within_log(self, progress: int) -> int:
        """The same offset, or the log's end where only a transaction's marker lay in between and retention has emptied the partition.

        Whoever writes frames does so in transactions, so the last offset of a partition is a marker, which nobody folds.
        """
        place = f"{self._space.frames_topic}[{self.number}]"
        first, end = self._log()
        if first == end and progress == end - 1:
            return end
        if not first <= progress <= end:
            raise StateError(
                f"{place} holds offsets {first} to {end}, but the next to fold is {progress}: frames were deleted before they were "
                "folded, or the topic was created anew. Nothing is skipped silently: create a "
                "new space, or accept the gap: kafka-consumer-groups.sh --group "
                f"{self._settings.group} --topic {self._space.frames_topic}:{self.number} --reset-offsets --to-earliest --execute"
            )
        return progress

    # --- folding ---

    def has_room(self, rows: Rows) -> bool:
        return self._slabs[rows.entity].has_room(rows)

    def decode(self, offset: int, key: bytes | None, value: bytes | None, append_time: float) -> Rows | None:
        """The rows of a frame, or None if it is bad (it then waits for the next flush as a dead letter) or was folded before."""
        if offset < self.progress:
            return None
        try:
            return frames.decode(self._space, value, append_time, self.number)
        except BadFrame as error:
            letter = dead_letters.encode(self._space.frames_topic, self.number, offset, key, value, error)
            log.warning("%s[%d]@%d is a dead letter: %s", self._space.frames_topic, self.number, offset, error)
            self._dead_letters.append(letter)
            self.stats.dead_letters += 1
            self.progress = offset + 1
            return None

    def fold(self, offset: int, rows: Rows) -> None:
        """Fold a decoded frame. The caller has asked `has_room`, and flushed if there was none."""
        self._slabs[rows.entity].fold(rows, offset)
        self.progress = offset + 1
        self.stats.rows += len(rows)
        self.stats.frames += 1
        faults.point("fold.folded")

    @property
    def dirty_rows(self) -> int:
        return sum(slab.dirty_rows for slab in self._slabs.values())

    @property
    def unflushed(self) -> bool:
        return self.progress != self._flushed

    @property
    def keys_in_memory(self) -> int:
        return sum(len(slab) for slab in self._slabs.values())

    # --- flushing ---

    def copy(self) -> Pending:
        """What is dirty now. Folding may go on as soon as this returns."""
        copies = {entity: slab.copy_dirty() for entity, slab in self._slabs.items() if slab.dirty_rows}
        letters, self._dead_letters = self._dead_letters, []
        faults.point("flush.copied")
        return Pending(copies, self.progress, letters)

    def commit(self, pending: Pending) -> None:
        """Kafka first, in one transaction, then RocksDB."""
        assert self._store is not None
        started = time.monotonic()
        records = {entity: (copy.keys, _split(copy)) for entity, copy in pending.copies.items()}
        ends = self._changelog.commit(Flush(records, pending.progress, pending.dead_letters))
        self._store.write(records, ends, pending.progress)
        faults.point("store.written")
        self.stats.flushes += 1
        self.stats.records += sum(len(keys) for keys, _ in records.values())
        self.stats.flush_seconds += time.monotonic() - started

    def done(self, pending: Pending) -> None:
        for entity, copy in pending.copies.items():
            self._slabs[entity].flushed(copy)
        self._flushed = pending.progress

    def close(self) -> None:
        """Give up memory and the store. What was not flushed is folded again by the next owner."""
        self._slabs = {}
        self._dead_letters = []
        self.progress = self._flushed = -1
        if self._store is not None:
            self._store.close()
            self._store = None


def _split(copy: Copy) -> list[bytes]:
    blob, size = copy.records.tobytes(), copy.records.dtype.itemsize
    return [blob[i : i + size] for i in range(0, len(blob), size)]
