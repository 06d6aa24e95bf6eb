"""Ids in columns: many keys as one buffer, their partitions, and an index from key to slot."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossrep import kernels
from crossrep.spec import MAX_KEY_BYTES

Id = str | bytes | int
MISSING = -1

Place = Callable[[str, tuple[int, ...]], NDArray[np.uint8]]


@dataclass(frozen=True)
class Keys:
    """n keys end to end: key i is `data[offsets[i]:offsets[i + 1]]`, UTF-8, 1 to 64 bytes."""

    data: NDArray[np.uint8]  # [total bytes]
    offsets: NDArray[np.int32]  # [n + 1], starts at 0

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @classmethod
    def of(cls, ids: Sequence[Id] | NDArray[Any]) -> Keys:
        """Keys of strings, bytes or integers (written in decimal); arrays and tensors of one dimension do too.

        Raises:
            ValueError: an id is empty or longer than 64 bytes; names it.
        """
        if hasattr(ids, "tolist"):  # a tensor's elements would write themselves as "tensor(17)"
            ids = ids.tolist()
        encoded: Any = ids
        try:
            data = "".join(encoded).encode("ascii")  # what is mostly asked for: a third of the time
        except (TypeError, UnicodeEncodeError):
            encoded = [i if isinstance(i, bytes) else str(i).encode() for i in ids]
            data = b"".join(encoded)
        offsets = np.zeros(len(encoded) + 1, np.int32)
        lengths = np.fromiter(map(len, encoded), np.int32, len(encoded))
        if len(lengths) and (lengths.min() < 1 or lengths.max() > MAX_KEY_BYTES):
            wrong = int(np.flatnonzero((lengths < 1) | (lengths > MAX_KEY_BYTES))[0])
            raise ValueError(f"id {ids[wrong]!r} at {wrong} has {lengths[wrong]} bytes; 1 to {MAX_KEY_BYTES} are allowed")
        np.cumsum(lengths, out=offsets[1:])
        return cls(np.frombuffer(data, np.uint8), offsets)

    @classmethod
    def cut(cls, data: NDArray[np.uint8], starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> Keys:
        """Keys out of a larger buffer, 1 to 64 bytes each: key i is `data[starts[i]:starts[i] + lengths[i]]`."""
        offsets = np.zeros(len(starts) + 1, np.int32)
        np.cumsum(lengths, out=offsets[1:])
        return cls(kernels.gather(data, starts, offsets), offsets)

    @classmethod
    def concatenate(cls, parts: Sequence[Keys]) -> Keys:
        """All keys of all parts, in their order."""
        lengths = [np.diff(part.offsets) for part in parts]
        offsets = np.zeros(sum(map(len, lengths)) + 1, np.int32)
        np.cumsum(np.concatenate([np.zeros(0, np.int32), *lengths]), out=offsets[1:])
        return cls(np.concatenate([np.zeros(0, np.uint8), *(part.data for part in parts)]), offsets)

    def tolist(self) -> list[bytes]:
        data, ends = self.data.tobytes(), self.offsets.tolist()
        return [data[a:b] for a, b in itertools.pairwise(ends)]

    def take(self, rows: NDArray[np.int64]) -> Keys:
        """The keys at `rows`, in that order."""
        offsets = np.zeros(len(rows) + 1, np.int32)
        np.cumsum(np.diff(self.offsets)[rows], out=offsets[1:])
        return Keys(kernels.gather(self.data, self.offsets[rows], offsets), offsets)

    def well_formed(self) -> bool:
        """Do the offsets rise from 0 to the end of the data, by 1 to 64 bytes a key?"""
        return bool(kernels.well_formed(self.data, self.offsets))

    def partitions(self, count: int) -> NDArray[np.int32]:
        """The partition of each key: murmur2, as Kafka's own default partitioner computes it."""
        partitions: NDArray[np.int32] = kernels.murmur2_partitions(self.data, self.offsets, count)
        return partitions


class KeyIndex:
    """An open-addressing hash index from key to slot; slots are handed out densely and reused after `remove`.

    Not thread-safe. Memory: 78 bytes a slot beside the table of 8 bytes a slot.

    Args:
        place: where the keys lie, 65 of those bytes, if not in memory: gives the uint8 array of a name and shape, with what it held when it
            was smaller, or in an earlier process, and zeros behind. The index begins with the keys that are there.
    """

    def __init__(self, capacity: int, place: Place | None = None):
        self.size = 0
        self._place = place
        self._allocate(max(capacity, 8))
        if place is not None:
            used = np.flatnonzero(self._lengths)
            self._bytes[(self._lengths == 0) & (self._bytes[:, 0] != 0)] = 0  # removed as the process was killed
            kernels.hash_slots(self._hashes, self._lengths, self._bytes, used)
            kernels.rehash(self._table, self._hashes, used)
            self.size = len(used)
            self._free[: self.capacity - self.size] = np.flatnonzero(self._lengths == 0)[::-1]

    def _allocate(self, capacity: int) -> None:
        self.capacity = capacity
        self._table = np.full(1 << int(np.ceil(np.log2(capacity * 2))), MISSING, np.int32)
        self._hashes = np.zeros(capacity, np.uint64)
        place = self._place or (lambda _, shape: np.zeros(shape, np.uint8))
        self._lengths, self._bytes = place("lengths", (capacity,)), place("keys", (capacity, MAX_KEY_BYTES))
        self._free = np.arange(capacity - 1, -1, -1, dtype=np.int32)  # a stack; its first (capacity - size) entries are free

    def find(self, keys: Keys) -> NDArray[np.int32]:
        """Slot of each key, or MISSING. Shape [n]."""
        return self.look_up(keys)[0]

    def look_up(self, keys: Keys) -> tuple[NDArray[np.int32], int]:
        """Slot of each key, or MISSING, and how many are missing."""
        slots = np.empty(len(keys), np.int32)
        missing = kernels.find(self._table, self._hashes, self._lengths, self._bytes, keys.data, keys.offsets, slots)
        return slots, missing

    def insert(self, keys: Keys, slots: NDArray[np.int32]) -> NDArray[np.int64]:
        """Give every key that is MISSING in `slots` a slot, in place; a key that occurs twice gets one slot.

        Returns the rows whose keys are new. The caller makes room first.

        Raises:
            IndexError: more new keys than free slots.
        """
        new = np.empty(int(np.count_nonzero(slots == MISSING)), np.int64)
        table = (self._table, self._hashes, self._lengths, self._bytes)
        count, full = kernels.insert(*table, self._free, self.size, keys.data, keys.offsets, slots, new)
        self.size += count
        if full:
            raise IndexError(f"{self.capacity} slots are full")
        return new[:count]

    def remove(self, slots: NDArray[np.int32]) -> None:
        """Forget the keys in these slots."""
        kernels.remove(self._table, self._hashes, self._free, self.capacity - self.size, slots)
        if self._place is not None:
            self._lengths[slots] = 0  # whoever opens it next sees no key there
            self._bytes[slots] = 0  # the name of a key may be what is to be forgotten
        self.size -= len(slots)

    def grow(self, capacity: int) -> None:
        """Enlarge, keeping every slot number."""
        old_bytes, old_hashes, old_lengths, old_free, old = self._bytes, self._hashes, self._lengths, self._free, self.capacity
        self._allocate(capacity)
        self._hashes[:old] = old_hashes
        if self._place is None:
            self._bytes[:old], self._lengths[:old] = old_bytes, old_lengths
        fresh = capacity - old
        self._free[:fresh] = np.arange(capacity - 1, old - 1, -1)
        self._free[fresh : fresh + old - self.size] = old_free[: old - self.size]
        used = np.ones(capacity, np.bool_)
        used[self._free[: capacity - self.size]] = False
        kernels.rehash(self._table, self._hashes, np.flatnonzero(used))

    def keys(self, slots: NDArray[np.int32]) -> Keys:
        """The keys held in these slots."""
        offsets = np.zeros(len(slots) + 1, np.int32)
        np.cumsum(self._lengths[slots], out=offsets[1:], dtype=np.int32)
        return Keys(kernels.gather_slots(self._bytes, self._lengths, slots, offsets), offsets)

    def slots(self) -> NDArray[np.int32]:
        """All slots in use, ascending."""
        used = np.ones(self.capacity, np.bool_)
        used[self._free[: self.capacity - self.size]] = False
        return np.flatnonzero(used).astype(np.int32)
