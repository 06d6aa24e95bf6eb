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
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from crossrep import kafka
from crossrep.columnar import forget, frames
from crossrep.columnar.algebra import NEVER
from crossrep.columnar.forget import Forget, is_order
from crossrep.columnar.records import RecordLayout
from crossrep.columnar.rows import Rows
from crossrep.errors import BadFrame
from crossrep.spec import Space
from state import dead_letters, faults, history, progress
from state.changelog import Changelog, Flush
from state.expiry import Sweep
from state.history import Undo
from state.progress import Progress
from state.slab import Copy, Slab
from state.store import Memory, Meta, Room, Store, open_store
from state.writes import Writes

log = logging.getLogger(__name__)

BEHIND_FOR = 5.0  # seconds that the store may be behind the changelog
BEHIND = 200_000  # records of an entity that a flush copies for the store alone; fewer, and a large slab never catches up at full load
COMPLAIN = 10.0  # seconds between log lines about bad frames: each lies in the dead letters anyway


@dataclass(frozen=True)
class Settings:
    """What all partitions of a worker share."""

    space: Space
    bootstrap: str
    folder: Path  # of this worker's stores
    topic_ids: dict[str, str]
    memory: Memory
    room: Room
    tombstones_kept: float  # seconds; the least delete.retention.ms of the changelogs
    slots: int = 65_536  # most keys in memory per entity and partition


@dataclass
class Stats:
    """Counters since the process started, for metrics."""

    rows: int = 0
    frames: int = 0
    dead_letters: int = 0
    records: int = 0
    deleted: int = 0  # tombstones among the records: expired or forgotten keys
    flushes: int = 0
    flush_seconds: float = 0.0
    restored: int = 0  # of the last takeover
    restore_total: int = 0
    restore_seconds: float = 0.0

    @property
    def restore_left(self) -> float:
        """Seconds that the restore under way will still take, at its rate so far."""
        return self.restore_seconds * (self.restore_total - self.restored) / self.restored if self.restored else float("inf")


@dataclass(frozen=True)
class Pending:
    """A flush between `copy` and `done`."""

    copies: dict[str, Copy]
    behind: dict[str, Copy]  # for the store alone: the changelog has it
    catch_up: bool  # with this flush, the store holds all that the changelog does
    expired: dict[str, list[bytes]]  # keys that only the store knows
    forgotten: list[Forget]
    progress: Progress
    dead_letters: list[bytes]


class Partition:
    """State of partition `number` of every entity of a space."""

    def __init__(self, settings: Settings, number: int):
        self._settings = settings
        self._space = settings.space
        self.number = number
        self.stats = Stats()
        self._layouts = {entity: RecordLayout(settings.space, entity) for entity in settings.space.entities}
        self._changelog = Changelog(settings.space, number, settings.bootstrap)
        self._store: Store | None = None
        self._committed = Meta("", {})  # what is true of the store as soon as nothing is behind
        self._caught_up = 0.0  # when that was last so
        self._must_catch_up = False
        self._complained = -COMPLAIN
        self._begin(Progress(-1))

    def _begin(self, at: Progress) -> None:
        """Nothing is in memory, and `at` is committed."""
        self.progress = self._flushed = at
        self._slabs: dict[str, Slab] = {}
        self._sweeps: dict[str, Sweep] = {}
        self._forgotten: list[Forget] = []
        self._dead_letters: list[bytes] = []
        self.dead_letter_bytes = 0  # of those that wait for the next flush

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
        self.close()
        self._store = store = self._open_store()
        self._restore(store)
        faults.point("open.restored")
        at, complete = progress.at_takeover(self._space, self._settings.bootstrap, self.number, store.meta.progress)
        if not complete and any(spec.expire_after for spec in self._space.entities.values()):
            at = replace(at, stream_time=store.newest_event())
        self._begin(at)
        for entity, spec in self._space.entities.items():
            self._slabs[entity] = Slab(self._layouts[entity], partial(store.get, entity), self._settings.slots)
            if spec.expire_after:
                self._sweeps[entity] = Sweep(entity, spec.expire_after)
        return at.offset

    def reopen(self) -> int:
        """Take over again after a rebalance. What is in memory is kept if nobody else has moved the progress since our last flush."""
        if self._store is None:
            return self.open()
        if self.progress == self._flushed:
            at, _ = progress.at_takeover(self._space, self._settings.bootstrap, self.number, -1)
            if at == self._flushed:  # all of it: a rewind may have left frames out and ended at the same offset
                return at.offset
        log.warning("partition %d was folded elsewhere meanwhile; restoring", self.number)
        return self.open()

    def _open_store(self) -> Store:
        self._settings.room.wait()
        expected = Meta(self._space.hash.hex(), self._settings.topic_ids)
        folder = self._settings.folder / f"partition-{self.number}"
        client = kafka.consumer(self._settings.bootstrap)
        try:
            bounds = {e: kafka.watermarks(client, self._space.representations_topic(e), self.number) for e in self._layouts}
        finally:
            client.close()
        return open_store(folder, expected, bounds, self._settings.memory, self._settings.tombstones_kept)

    def _restore(self, store: Store) -> None:
        """Read the changelog's tail into the store."""
        began, told = time.time(), time.monotonic()
        self.stats.restored = self.stats.restore_total = 0

        def progressed(done: int, total: int) -> None:
            nonlocal told
            self.stats.restored, self.stats.restore_total, self.stats.restore_seconds = done, total, time.time() - began
            if time.monotonic() - told > 5:
                told = time.monotonic()
                log.info(
                    "partition %d: restored %s of %s offsets, %s/s, %.0f s left",
                    *(self.number, f"{done:,}", f"{total:,}", f"{done / self.stats.restore_seconds:,.0f}", self.stats.restore_left),
                )

        for entity, keys, values, end in self._changelog.tail(dict(store.meta.changelog), progressed):
            records = self._layouts[entity].decode([value for value in values if value], f"changelog record of {entity}")
            folded = {entity: int(records["source_offset"][-1]) + 1} if len(records) else {}
            store.write({entity: (keys, values)}, store.meta.advanced({entity: end}, folded, store.meta.current))
            faults.point("open.restoring")
        self._committed = replace(store.meta, current=began)
        store.write({}, self._committed)
        self._caught_up, self._must_catch_up = time.monotonic(), False
        self.stats.restore_seconds = time.time() - began

    # --- folding ---

    def has_room(self, work: Rows | Forget) -> bool:
        """If not, a flush makes room, or the one after it."""
        if isinstance(work, Forget) or self._slabs[work.entity].has_room(work):
            return True
        self._must_catch_up = True
        return False

    def decode(self, offset: int, key: bytes | None, value: bytes | None, append_time: float) -> Rows | Forget | None:
        """The rows of a frame, or an order. None if it is bad (it then waits for the next flush as a dead letter), was folded before, or
        lies where a rewind has left frames out.
        """
        if offset < self.progress.offset:
            return None
        try:
            if is_order(value):
                assert value is not None
                return forget.decode(self._space, value, self.number)
            if self.progress.skips(offset):
                self._pass(offset, append_time)
                return None
            return frames.decode(self._space, value, append_time, self.number)
        except BadFrame as error:
            letter = dead_letters.encode(self._space.frames_topic, self.number, offset, key, value, error)
            self._dead_letters.append(letter)
            self.dead_letter_bytes += len(letter)
            self.stats.dead_letters += 1
            if time.monotonic() - self._complained > COMPLAIN:
                self._complained = time.monotonic()
                place = f"{self._space.frames_topic}[{self.number}]@{offset}"
                log.warning("%s is a dead letter (%d so far): %s", place, self.stats.dead_letters, error)
            self._pass(offset, append_time)
            return None

    def fold(self, offset: int, work: Rows | Forget, append_time: float) -> None:
        """Fold what `decode` gave. The caller has asked `has_room`, and flushed if there was none."""
        stream_time = self.progress.stream_time
        slab = self._slabs[work.entity]
        if isinstance(work, Forget):
            slab.forget(work.key, offset)
            self._forgotten.append(work)
            log.info("forgot a key of %s by order %s[%d]@%d", work.entity, self._space.frames_topic, self.number, offset)
        else:
            expire_after = self._space.entities[work.entity].expire_after
            slab.fold(work, stream_time - expire_after if expire_after else NEVER)
            stream_time = max(stream_time, float(work.times.max()))
            self.stats.rows += len(work)
        self._pass(offset, append_time, stream_time)
        self.stats.frames += 1
        faults.point("fold.folded")

    def _pass(self, offset: int, append_time: float, stream_time: float = NEVER) -> None:
        self.progress = replace(
            self.progress, offset=offset + 1, append_time=append_time, stream_time=max(self.progress.stream_time, stream_time)
        )

    @property
    def positions(self) -> tuple[int]:
        """The next frame to fold."""
        return (self.progress.offset,)

    @property
    def restored(self) -> str:
        """What the last takeover took."""
        return f"{self.stats.restored} records restored in {self.stats.restore_seconds:.2f} s"

    @property
    def dirty_rows(self) -> int:
        return sum(slab.dirty_rows for slab in self._slabs.values())

    @property
    def unflushed(self) -> bool:
        """Is there anything for a flush to do?"""
        if self.progress != self._flushed or self._must_catch_up or any(sweep.under_way for sweep in self._sweeps.values()):
            return True
        return self._late and self._behind

    @property
    def _behind(self) -> bool:
        """Does the store lack anything that is committed?"""
        return any(slab.behind for slab in self._slabs.values())

    @property
    def _late(self) -> bool:
        return time.monotonic() - self._caught_up > BEHIND_FOR

    @property
    def keys_in_memory(self) -> int:
        return sum(len(slab) for slab in self._slabs.values())

    # --- flushing ---

    def copy(self) -> Pending:
        """What is dirty now. Folding may go on as soon as this returns."""
        if self.progress.append_time - self.progress.point.append_time >= self._space.history / history.POINTS:
            if self._behind:
                self._must_catch_up = True  # and the next flush makes the point
            else:
                # What is dirty changed since the last flush, and the store holds what it was then: that is where the point must be.
                self.progress = replace(self.progress, point=self._flushed.as_point())
        expired = {}
        for entity, sweep in self._sweeps.items():
            self._slabs[entity].expire(self.progress.stream_time - sweep.expire_after)
            expired[entity], sweep.found = self._slabs[entity].lacks(sweep.found), []
        last, point = self.progress.offset - 1, self.progress.point.offset
        behind, catch_up = {}, self._late or self._must_catch_up or any(slab.crowded for slab in self._slabs.values())
        if catch_up:
            for entity, slab in self._slabs.items():
                behind[entity], is_all = slab.copy_behind(BEHIND)
                catch_up &= is_all
        copies = {entity: slab.copy_dirty(last, point) for entity, slab in self._slabs.items() if slab.dirty_rows}
        letters, self._dead_letters, self.dead_letter_bytes = self._dead_letters, [], 0
        orders, self._forgotten = self._forgotten, []
        faults.point("flush.copied")
        return Pending(copies, behind, catch_up, expired, orders, self.progress, letters)

    def commit(self, pending: Pending) -> None:
        """Kafka first, in one transaction, then RocksDB. Waits while the disk is full."""
        assert self._store is not None
        self._settings.room.wait()
        started = time.monotonic()
        records: dict[str, list[Writes]] = {}
        undo: list[bytes] = []
        for entity, layout in self._layouts.items():
            copy, expired = pending.copies.get(entity), pending.expired.get(entity, [])
            records[entity] = [copy.writes] if copy else []
            if expired:
                records[entity].append(Writes.of(expired, [b""] * len(expired), layout.size))
            known = [*(copy.keys(copy.first & ~copy.new) if copy else []), *expired]
            new = copy.keys(copy.first & copy.new) if copy else []
            if known or new:
                former = [*self._store.get(entity, known), *[None] * len(new)]
                undo += history.encode(Undo(entity, pending.progress.point, [*known, *new], former))
        records = {entity: writes for entity, writes in records.items() if writes}
        ends = self._changelog.commit(Flush(records, pending.progress, undo, pending.dead_letters))
        self._committed = self._committed.advanced(ends, dict.fromkeys(records, pending.progress.offset), time.time())
        self._write(self._store, pending)
        faults.point("store.written")
        for entity in {order.entity for order in pending.forgotten}:
            self._store.shred(entity, [order.key for order in pending.forgotten if order.entity == entity])
        for entity, sweep in self._sweeps.items():
            if entity in pending.copies:
                writes = pending.copies[entity].writes
                sweep.wrote(writes.records["event_time"][~writes.deleted])
            sweep.look(self._store, pending.progress.stream_time)
        self.stats.flushes += 1
        self.stats.records += sum(len(writes) for found in records.values() for writes in found)
        self.stats.deleted += sum(int(writes.deleted.sum()) for found in records.values() for writes in found)
        self.stats.flush_seconds += time.monotonic() - started

    def _write(self, store: Store, pending: Pending) -> None:
        """Deleted keys leave the store at once: of expired ones no slot knows, and forgotten ones are shredded next. The rest may wait."""
        rows: dict[str, tuple[list[bytes], list[bytes]]] = {}
        for entity in self._layouts:
            keys = pending.expired.get(entity, []) + [order.key for order in pending.forgotten if order.entity == entity]
            values = [b""] * len(keys)
            for copy in (pending.behind.get(entity), pending.copies.get(entity) if pending.catch_up else None):
                if copy is not None:
                    keys += copy.writes.keys.tolist()
                    values += copy.writes.values()
            if keys:
                rows[entity] = keys, values
        if pending.catch_up:
            store.write(rows, self._committed)
        elif rows:
            store.write(rows)

    def done(self, pending: Pending) -> None:
        for entity, copy in pending.behind.items():
            self._slabs[entity].stored(copy)
        for entity, copy in pending.copies.items():
            self._slabs[entity].flushed(copy)
            if pending.catch_up:
                self._slabs[entity].stored(copy)
        if pending.catch_up:
            self._caught_up, self._must_catch_up = time.monotonic(), False
        self._flushed = pending.progress

    def close(self) -> None:
        """Give up memory and the store. What was not flushed is folded again by the next owner."""
        store, self._store = self._store, None
        if store is not None:
            try:
                self._catch_up(store)
            except Exception as error:  # the disk is full or damaged: the changelog's tail has it
                log.warning("store of partition %d is closed without its last records: %s", self.number, error)
            store.close()
        self._begin(Progress(-1))

    def _catch_up(self, store: Store) -> None:
        """Bring the store to where the changelog is, unless something in memory is newer than both, or it is not yet restored."""
        if not self._slabs or any(slab.unflushed for slab in self._slabs.values()) or store.meta == self._committed:
            return
        copies = {entity: slab.copy_behind(len(slab))[0].writes for entity, slab in self._slabs.items()}
        store.write({entity: (writes.keys.tolist(), writes.values()) for entity, writes in copies.items()}, self._committed)
