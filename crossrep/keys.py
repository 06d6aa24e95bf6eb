"""Ids in columns: many keys as one buffer, their partitions, and an index from key to slot. Pure numpy and numba."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

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
        encoded = [i if isinstance(i, bytes) else str(i).encode() for i in ids]
        offsets = np.zeros(len(encoded) + 1, np.int32)
        lengths = np.fromiter(map(len, encoded), np.int32, len(encoded))
        if len(lengths) and (lengths.min() < 1 or lengths.max() > MAX_KEY_BYTES):
            wrong = int(np.flatnonzero((lengths < 1) | (lengths > MAX_KEY_BYTES))[0])
            raise ValueError(f"id {ids[wrong]!r} at {wrong} has {lengths[wrong]} bytes; 1 to {MAX_KEY_BYTES} are allowed")
        np.cumsum(lengths, out=offsets[1:])
        return cls(np.frombuffer(b"".join(encoded), np.uint8), offsets)

    @classmethod
    def cut(cls, data: NDArray[np.uint8], starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> Keys:
        """Keys out of a larger buffer, 1 to 64 bytes each: key i is `data[starts[i]:starts[i] + lengths[i]]`."""
        offsets = np.zeros(len(starts) + 1, np.int32)
        np.cumsum(lengths, out=offsets[1:])
        return cls(_gather(data, starts, offsets), offsets)

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
        return Keys(_gather(self.data, self.offsets[rows], offsets), offsets)

    def well_formed(self) -> bool:
        """Do the offsets rise from 0 to the end of the data, by 1 to 64 bytes a key?"""
        return bool(_well_formed(self.data, self.offsets))

    def partitions(self, count: int) -> NDArray[np.int32]:
        """The partition of each key: murmur2, as Kafka's own default partitioner computes it."""
        partitions: NDArray[np.int32] = _murmur2_partitions(self.data, self.offsets, count)
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
            _hash_slots(self._hashes, self._lengths, self._bytes, used)
            _rehash(self._table, self._hashes, used)
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
        missing = _find(self._table, self._hashes, self._lengths, self._bytes, keys.data, keys.offsets, slots)
        return slots, missing

    def insert(self, keys: Keys, slots: NDArray[np.int32]) -> NDArray[np.int64]:
        """Give every key that is MISSING in `slots` a slot, in place; a key that occurs twice gets one slot.

        Returns the rows whose keys are new. The caller makes room first.

        Raises:
            IndexError: more new keys than free slots.
        """
        new = np.empty(int(np.count_nonzero(slots == MISSING)), np.int64)
        table = (self._table, self._hashes, self._lengths, self._bytes)
        count, full = _insert(*table, self._free, self.size, keys.data, keys.offsets, slots, new)
        self.size += count
        if full:
            raise IndexError(f"{self.capacity} slots are full")
        return new[:count]

    def remove(self, slots: NDArray[np.int32]) -> None:
        """Forget the keys in these slots."""
        _remove(self._table, self._hashes, self._free, self.capacity - self.size, slots)
        if self._place is not None:
            self._lengths[slots] = 0  # whoever opens it next sees no key there
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
        _rehash(self._table, self._hashes, np.flatnonzero(used))

    def keys(self, slots: NDArray[np.int32]) -> Keys:
        """The keys held in these slots."""
        offsets = np.zeros(len(slots) + 1, np.int32)
        np.cumsum(self._lengths[slots], out=offsets[1:], dtype=np.int32)
        return Keys(_gather_slots(self._bytes, self._lengths, slots, offsets), offsets)

    def slots(self) -> NDArray[np.int32]:
        """All slots in use, ascending."""
        used = np.ones(self.capacity, np.bool_)
        used[self._free[: self.capacity - self.size]] = False
        return np.flatnonzero(used).astype(np.int32)


def _jit(function):  # type: ignore[no-untyped-def]
    return numba.njit(cache=True, nogil=True)(function)


@_jit
def _gather(data, starts, out_offsets):  # type: ignore[no-untyped-def]
    out = np.empty(out_offsets[-1], np.uint8)
    for i in range(len(starts)):
        for j in range(out_offsets[i + 1] - out_offsets[i]):
            out[out_offsets[i] + j] = data[starts[i] + j]
    return out


@_jit
def _gather_slots(key_bytes, lengths, slots, out_offsets):  # type: ignore[no-untyped-def]
    out = np.empty(out_offsets[-1], np.uint8)
    for i in range(len(slots)):
        for j in range(lengths[slots[i]]):
            out[out_offsets[i] + j] = key_bytes[slots[i], j]
    return out


@_jit
def _well_formed(data, offsets):  # type: ignore[no-untyped-def]
    if offsets[0] != 0 or offsets[-1] != len(data):
        return False
    for row in range(len(offsets) - 1):
        length = offsets[row + 1] - offsets[row]
        if length < 1 or length > MAX_KEY_BYTES:
            return False
    return True


@_jit
def _murmur2_partitions(data, offsets, count):  # type: ignore[no-untyped-def]
    """org.apache.kafka.common.utils.Utils.murmur2, then toPositive and modulo, as in Kafka's default partitioner."""
    m = np.uint32(0x5BD1E995)
    out = np.empty(len(offsets) - 1, np.int32)
    for row in range(len(out)):
        start, length = offsets[row], offsets[row + 1] - offsets[row]
        h = np.uint32(np.uint32(0x9747B28C) ^ np.uint32(length))
        words = length // 4
        for w in range(words):
            i = start + 4 * w
            k = np.uint32(data[i]) | np.uint32(data[i + 1]) << 8 | np.uint32(data[i + 2]) << 16 | np.uint32(data[i + 3]) << 24
            k = np.uint32(np.uint32(k) * m)
            k = np.uint32(k ^ (k >> np.uint32(24)))
            k = np.uint32(k * m)
            h = np.uint32(np.uint32(h * m) ^ k)
        tail = start + 4 * words
        left = length & 3
        if left >= 3:
            h = np.uint32(h ^ (np.uint32(data[tail + 2]) << 16))
        if left >= 2:
            h = np.uint32(h ^ (np.uint32(data[tail + 1]) << 8))
        if left >= 1:
            h = np.uint32(np.uint32(h ^ np.uint32(data[tail])) * m)
        h = np.uint32(h ^ (h >> np.uint32(13)))
        h = np.uint32(h * m)
        h = np.uint32(h ^ (h >> np.uint32(15)))
        out[row] = (h & np.uint32(0x7FFFFFFF)) % count
    return out


@_jit
def _hash(data, start, length):  # type: ignore[no-untyped-def]
    """FNV-1a over the bytes, then a finishing mix, so that the table's low bits are good."""
    h = np.uint64(0xCBF29CE484222325)
    for i in range(start, start + length):
        h = (h ^ np.uint64(data[i])) * np.uint64(0x100000001B3)
    h ^= h >> np.uint64(32)
    h *= np.uint64(0xD6E8FEB86659FD93)
    h ^= h >> np.uint64(32)
    return h


@_jit
def _probe(table, hashes, lengths, key_bytes, data, start, length, h):  # type: ignore[no-untyped-def]
    """The table position that holds this key, or the empty one where it belongs."""
    mask = np.uint64(len(table) - 1)
    position = h & mask
    while True:
        slot = table[position]
        if slot < 0:
            return position
        if hashes[slot] == h and _same(lengths, key_bytes, slot, data, start, length):
            return position
        position = (position + np.uint64(1)) & mask


@_jit
def _find(table, hashes, lengths, key_bytes, data, offsets, slots):  # type: ignore[no-untyped-def]
    # In passes, so that the memory of many keys is asked for at once.
    mask = np.uint64(len(table) - 1)
    wanted = np.empty(len(slots), np.uint64)
    for row in range(len(slots)):
        wanted[row] = _hash(data, offsets[row], offsets[row + 1] - offsets[row])
    for row in range(len(slots)):
        slots[row] = table[wanted[row] & mask]
    missing = 0
    for row in range(len(slots)):
        start, length, slot, h = offsets[row], offsets[row + 1] - offsets[row], slots[row], wanted[row]
        if slot >= 0 and not (hashes[slot] == h and _same(lengths, key_bytes, slot, data, start, length)):
            slot = table[_probe(table, hashes, lengths, key_bytes, data, start, length, h)]
            slots[row] = slot
        missing += slot < 0
    return missing


@_jit
def _same(lengths, key_bytes, slot, data, start, length):  # type: ignore[no-untyped-def]
    if lengths[slot] != length:
        return False
    for j in range(length):  # noqa: SIM110  numba knows no all()
        if key_bytes[slot, j] != data[start + j]:
            return False
    return True


@_jit
def _insert(table, hashes, lengths, key_bytes, free, size, data, offsets, slots, new):  # type: ignore[no-untyped-def]
    count = 0
    for row in range(len(slots)):
        if slots[row] >= 0:
            continue
        start, length = offsets[row], offsets[row + 1] - offsets[row]
        h = _hash(data, start, length)
        position = _probe(table, hashes, lengths, key_bytes, data, start, length, h)
        slot = table[position]
        if slot < 0:
            if size + count == len(free):
                return count, True
            slot = free[len(free) - size - count - 1]
            table[position] = slot
            hashes[slot] = h
            for j in range(length):
                key_bytes[slot, j] = data[start + j]
            lengths[slot] = length  # last: a length in a file says that the key is there, even if the process is killed right now
            new[count] = row
            count += 1
        slots[row] = slot
    return count, False


@_jit
def _remove(table, hashes, free, free_count, slots):  # type: ignore[no-untyped-def]
    mask = np.uint64(len(table) - 1)
    one = np.uint64(1)
    for i in range(len(slots)):
        hole = hashes[slots[i]] & mask
        while table[hole] != slots[i]:
            hole = (hole + one) & mask
        # Backward-shift deletion: pull up every later entry of the run that may sit in the hole, so no tombstones pile up.
        position = hole
        while True:
            position = (position + one) & mask
            slot = table[position]
            if slot < 0:
                break
            home = hashes[slot] & mask
            if ((position - home) & mask) >= ((position - hole) & mask):
                table[hole] = slot
                hole = position
        table[hole] = MISSING
        free[free_count + i] = slots[i]


@_jit
def _hash_slots(hashes, lengths, key_bytes, used):  # type: ignore[no-untyped-def]
    for i in range(len(used)):
        hashes[used[i]] = _hash(key_bytes[used[i]], 0, lengths[used[i]])


@_jit
def _rehash(table, hashes, used):  # type: ignore[no-untyped-def]
    mask = np.uint64(len(table) - 1)
    for i in range(len(used)):
        position = hashes[used[i]] & mask
        while table[position] >= 0:
            position = (position + np.uint64(1)) & mask
        table[position] = used[i]
