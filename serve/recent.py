"""The records of keys in use, in memory: a fixed number of slots, in front of RocksDB."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crossrep.columnar.records import RecordLayout
from crossrep.keys import MISSING, KeyIndex, Keys

_INDEX_BYTES = 103  # KeyIndex, a slot, with a hash table twice to four times as large; and a bit of our own
_SWEEP = 4096  # slots looked at in one go to find some that nobody asked for


def slots_within(layouts: list[RecordLayout], size: int) -> int:
    """Slots of each entity, so that all of them together take `size` bytes."""
    return max(1024, size // sum(layout.size + _INDEX_BYTES for layout in layouts))


@dataclass(frozen=True)
class Held:
    """What was in memory of n keys."""

    slots: NDArray[np.int32]  # [n]; MISSING: not in memory
    records: NDArray[np.void]  # [n]; where the slot is MISSING it means nothing
    missing: int  # keys not in memory
    whole: bool  # then those do not exist at all
    generation: int  # of the table, when this was read


class Recent:
    """Keys, their newest records, and which of them somebody asked for lately. Memory is touched only as slots are used.

    A key's new record is first in RocksDB and then here (`renew`). What was read from RocksDB meanwhile is not let in (`admit`): it may be
    the former record. Thread-safe.
    """

    def __init__(self, layout: RecordLayout, slots: int):
        self.capacity = slots
        self.whole = True  # every key there is has a slot
        self._lock = threading.Lock()
        self._index = KeyIndex(slots)
        self._records = np.zeros(slots, layout.dtype)
        self._taken = np.zeros(slots, np.bool_)
        self._asked_for = np.zeros(slots, np.bool_)
        self._hand = 0
        self._generation = 0

    def __len__(self) -> int:
        return self._index.size

    def get(self, keys: Keys) -> Held:
        """The records of n keys, as far as they are here."""
        with self._lock:
            slots, missing = self._index.look_up(keys)
            self._asked_for[slots] = True  # MISSING marks the last slot, which does no harm
            # A tenth of the time that indexing with an array takes.
            return Held(slots, self._records.take(slots, mode="clip"), missing, self.whole, self._generation)

    def admit(self, keys: Keys, records: NDArray[np.void], generation: int) -> None:
        """Keep what was read from RocksDB, unless something was renewed since `generation`. Others make room if they must."""
        keep = np.arange(min(len(keys), self.capacity))
        keys, records = keys.take(keep), records[: len(keep)]
        with self._lock:
            if generation == self._generation:
                if self._index.size + len(keys) > self.capacity:
                    self._make_room(len(keys))
                slots = self._index.find(keys)
                self._put(keys, slots, records)
                self._asked_for[slots] = True

    def renew(self, keys: Keys, records: NDArray[np.void], deleted: Keys) -> None:
        """What the topic says, in RocksDB already. New keys find a slot while there is room; later they must be asked for."""
        with self._lock:
            self._generation += 1
            gone = self._index.find(deleted)
            self._remove(np.unique(gone[gone != MISSING]))
            slots, missing = self._index.look_up(keys)
            if self._index.size + missing > self.capacity:
                self.whole = False
                held = np.flatnonzero(slots != MISSING)
                self._records[slots[held]] = records[held]
            else:
                self._put(keys, slots, records)

    def slots(self) -> NDArray[np.int32]:
        """All slots in use, ascending."""
        with self._lock:
            return self._index.slots()

    def column(self, name: str, slots: NDArray[np.int32]) -> tuple[Keys, NDArray[np.float32]]:
        """Keys and vectors in those of the slots that are in use."""
        with self._lock:
            slots = slots[self._taken[slots]]
            return self._index.keys(slots), np.ascontiguousarray(self._records[name][slots])

    def _put(self, keys: Keys, slots: NDArray[np.int32], records: NDArray[np.void]) -> None:
        self._index.insert(keys, slots)
        self._taken[slots] = True
        self._records[slots] = records

    def _remove(self, slots: NDArray[np.int32]) -> None:
        self._index.remove(slots)
        self._taken[slots] = False

    def _make_room(self, wanted: int) -> None:
        """Sweep over the slots, as a clock's hand does, and empty those that nobody asked for since it last came by."""
        self.whole = False
        while self.capacity - self._index.size < wanted:
            block = slice(self._hand, min(self._hand + _SWEEP, self.capacity))
            idle = np.flatnonzero(self._taken[block] & ~self._asked_for[block]) + self._hand
            self._remove(idle.astype(np.int32))
            self._asked_for[block] = False
            self._hand = block.stop % self.capacity
