"""The slab: one entity's hot keys of one partition, in columns, over a store that holds them all.

The store follows some flushes behind the changelog: a hot key changes with every flush, and while the slab holds a key, nobody asks the
store for it. A slot may be evicted only when the store holds its record. Per slot:

    dirty     folded since its last copy was taken for a flush
    flushing  copied, but not yet in the changelog
    behind    in the changelog, as it was when last flushed, but not in the store
    none      the store holds the same record

A frame is folded whole or not at all: a flush in the middle of one would commit rows whose frame is not yet passed.

A slot that counts no event is a deleted key: its record is a tombstone. Expired and forgotten keys are such slots, so what returns to them
begins anew, whatever the store still says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crossrep.columnar.aggregates import Aggregates
from crossrep.columnar.algebra import NEVER
from crossrep.columnar.records import RecordLayout
from crossrep.columnar.rows import Rows
from crossrep.kernels import jit
from crossrep.keys import MISSING, KeyIndex, Keys
from state.writes import Writes

Read = Callable[[list[bytes]], list[bytes | None]]  # keys -> records, None where the store has none


@dataclass(frozen=True)
class Copy:
    """Slots and their records as they were at one moment."""

    slots: NDArray[np.int32]
    writes: Writes
    first: NDArray[np.bool_]  # not written since the rewind point: what the store holds of it must go to the history
    new: NDArray[np.bool_]  # never written: the store holds nothing of it

    def keys(self, which: NDArray[np.bool_]) -> list[bytes]:
        return self.writes.keys.take(np.flatnonzero(which)).tolist()


class Slab:
    """Folds rows into memory, reading what it lacks from the store.

    Args:
        read: looks records up in the store, many at once.
        capacity: most keys held. It grows up to there from a small start, and beyond only where one frame has more keys than that.
    """

    def __init__(self, layout: RecordLayout, read: Read, capacity: int):
        self._read = read
        self._limit = capacity
        start = min(capacity, 1024)
        self._index = KeyIndex(start)
        self._state = Aggregates(layout, self._index.capacity)
        self._dirty = np.zeros(self._index.capacity, np.bool_)
        self._flushing = np.zeros(self._index.capacity, np.bool_)
        self._behind = np.zeros(self._index.capacity, np.bool_)
        self._used = np.zeros(self._index.capacity, np.int64)  # the frame that last touched the slot
        self._written = np.full(self._index.capacity, -1, np.int64)  # the source offset of the slot's last record; -1: it has none
        self._frame = 0
        self.dirty_rows = 0  # rows folded since the last copy: an upper bound of the dirty slots
        self.misses = 0

    def __len__(self) -> int:
        return self._index.size

    @property
    def capacity(self) -> int:
        return self._index.capacity

    def has_room(self, rows: Rows) -> bool:
        """Can these rows be folded now, or must a flush come first?"""
        room = self._limit - self._index.size
        if len(rows) <= room:
            return True
        _, missing = self._index.look_up(rows.keys)
        evictable = self._evictable()
        pinned = len(rows) - missing
        return missing <= room + max(evictable - pinned, 0) or evictable == self._index.size

    def _evictable(self) -> int:
        return self._index.size - int(np.count_nonzero(self._kept()))

    def _kept(self) -> NDArray[np.bool_]:
        """The slots whose record the store does not hold."""
        return self._dirty | self._flushing | self._behind

    @property
    def crowded(self) -> bool:
        """Is there soon no room, unless the store catches up?"""
        return self._limit - self._index.size + self._evictable() < self._limit // 4

    def fold(self, rows: Rows, expired_before: float = NEVER) -> None:
        """Fold all rows of one frame. The caller has asked `has_room`.

        Args:
            expired_before: keys whose newest event is older (seconds since 1970) begin anew.
        """
        self._frame += 1
        slots, missing = self._index.look_up(rows.keys)
        if missing:
            self._load_missing(rows.keys, slots, missing)
        if expired_before > NEVER:
            self._state.clear(slots[self._state.event_time[slots] < expired_before])
        self._state.fold(slots, rows)
        self._touch(slots)

    def forget(self, key: bytes, offset: int) -> None:
        """Delete a key, whether it is in memory or only in the store. The history does not learn what it was.

        Args:
            offset: of the order. Nothing before it is worth recording: on the way back to any rewind point, it will be met again.
        """
        self._frame += 1
        keys = Keys.of([key])
        slots = self._index.find(keys)
        if slots[0] == MISSING:
            self._make_room(1, pinned=slots[:0])
            self._index.insert(keys, slots)
        self._state.clear(slots)
        self._written[slots] = offset
        self._touch(slots)

    def expire(self, before: float) -> int:
        """Delete the keys in memory whose newest event is older than `before`. Returns how many."""
        held = self._index.slots()
        times = self._state.event_time[held]
        old = held[(times < before) & (times > NEVER)]
        self._state.clear(old)
        self._dirty[old] = True
        self.dirty_rows += len(old)
        return len(old)

    def lacks(self, keys: list[bytes]) -> list[bytes]:
        """Those of the keys that only the store may hold."""
        missing = self._index.find(Keys.of(keys)) == MISSING
        return [key for key, out in zip(keys, missing.tolist()) if out]

    def copy_dirty(self, source_offset: int, point: int = 0) -> Copy:
        """Take what a flush writes; the slots count as flushing until `flushed` is told.

        Args:
            source_offset: of the last frame folded: the records are true up to it.
            point: offset of the newest rewind point.
        """
        assert not self._flushing.any(), "one flush at a time"
        slots = np.flatnonzero(self._dirty).astype(np.int32)
        self._dirty[slots], self._flushing[slots] = False, True
        self.dirty_rows = 0
        written = self._written[slots]
        self._written[slots] = source_offset
        return self._copy(slots, written < point, written < 0)

    def copy_behind(self, most: int) -> tuple[Copy, bool]:
        """Up to `most` clean slots that the store lacks, and whether these are all such slots. `stored` takes note that it has them."""
        slots = np.flatnonzero(self._behind & ~(self._dirty | self._flushing)).astype(np.int32)
        some = slots[:most]
        neither = np.zeros(len(some), np.bool_)
        return self._copy(some, neither, neither), len(some) == len(slots)

    def _copy(self, slots: NDArray[np.int32], first: NDArray[np.bool_], new: NDArray[np.bool_]) -> Copy:
        records = self._state.records(slots, self._written[slots])
        return Copy(slots, Writes(self._index.keys(slots), records, self._state.count[slots] == 0), first, new)

    def _touch(self, slots: NDArray[np.int32]) -> None:
        _mark(self._dirty, self._used, slots, self._frame)
        self.dirty_rows += len(slots)

    def flushed(self, copy: Copy) -> None:
        """The changelog now holds this copy of dirty slots."""
        self._flushing[copy.slots] = False
        self._behind[copy.slots] = True

    def stored(self, copy: Copy) -> None:
        """The store now holds this copy."""
        self._behind[copy.slots] = False

    @property
    def unflushed(self) -> bool:
        """Does memory hold anything that the changelog does not?"""
        return bool(self._dirty.any() or self._flushing.any())

    @property
    def behind(self) -> bool:
        """Does the changelog hold anything that the store does not?"""
        return bool(self._behind.any())

    def _load_missing(self, keys: Keys, slots: NDArray[np.int32], wanted: int) -> None:
        if wanted > self.capacity - self._index.size:  # count keys, not rows, before anything is evicted for them
            wanted = len(set(keys.take(np.flatnonzero(slots == MISSING)).tolist()))
            self._make_room(wanted, pinned=slots[slots != MISSING])
        new = self._index.insert(keys, slots)
        fresh = slots[new]
        self._state.clear(fresh)
        self._written[fresh] = -1
        stored = self._read(keys.take(new).tolist())
        known = [i for i, value in enumerate(stored) if value is not None]
        if known:
            records = self._state.layout.decode([value for value in stored if value is not None], "stored record")
            self._state.load(fresh[known], records)
            self._written[fresh[known]] = records["source_offset"].astype(np.int64)
        self.misses += len(new)

    def _make_room(self, wanted: int, pinned: NDArray[np.int32]) -> None:
        """Grow up to the limit, then evict the least recently used, then grow beyond: one frame is never split."""
        lacking = wanted - (self.capacity - self._index.size)
        if lacking > 0 and self.capacity < self._limit:
            self._grow(min(max(2 * self.capacity, self.capacity + lacking), self._limit))
            lacking = wanted - (self.capacity - self._index.size)
        if lacking > 0:
            self._evict(lacking, pinned)
            lacking = wanted - (self.capacity - self._index.size)
        if lacking > 0:
            self._grow(self.capacity + lacking)

    def _evict(self, wanted: int, pinned: NDArray[np.int32]) -> None:
        held = self._index.slots()
        self._used[pinned] = self._frame
        victims = held[~self._kept()[held] & (self._used[held] < self._frame)]
        count = min(len(victims), max(wanted, self.capacity // 16))  # some more than wanted, so that eviction is rare
        if count < len(victims):
            victims = victims[np.argpartition(self._used[victims], count)[:count]]
        self._index.remove(victims)

    def _grow(self, capacity: int) -> None:
        self._index.grow(capacity)
        self._state.grow(capacity)
        more = capacity - len(self._dirty)
        self._dirty = np.append(self._dirty, np.zeros(more, np.bool_))
        self._flushing = np.append(self._flushing, np.zeros(more, np.bool_))
        self._behind = np.append(self._behind, np.zeros(more, np.bool_))
        self._used = np.append(self._used, np.zeros(more, np.int64))
        self._written = np.append(self._written, np.full(more, -1, np.int64))


@jit
def _mark(dirty, used, slots, frame):  # type: ignore[no-untyped-def]
    """Take note that the frame of this number has touched these slots."""
    for i in range(len(slots)):
        dirty[slots[i]] = True
        used[slots[i]] = frame
