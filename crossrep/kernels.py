"""Compiled loops over keys: their bytes gathered, checked and hashed, and the open-addressed table from key to slot."""

from __future__ import annotations

import numba
import numpy as np

from crossrep.spec import MAX_KEY_BYTES

MISSING = -1


def jit(function):  # type: ignore[no-untyped-def]
    """As all kernels are compiled: once, kept on disk, without Python's lock."""
    return numba.njit(cache=True, nogil=True)(function)


@jit
def gather(data, starts, out_offsets):  # type: ignore[no-untyped-def]
    out = np.empty(out_offsets[-1], np.uint8)
    for i in range(len(starts)):
        for j in range(out_offsets[i + 1] - out_offsets[i]):
            out[out_offsets[i] + j] = data[starts[i] + j]
    return out


@jit
def gather_slots(key_bytes, lengths, slots, out_offsets):  # type: ignore[no-untyped-def]
    out = np.empty(out_offsets[-1], np.uint8)
    for i in range(len(slots)):
        for j in range(lengths[slots[i]]):
            out[out_offsets[i] + j] = key_bytes[slots[i], j]
    return out


@jit
def well_formed(data, offsets):  # type: ignore[no-untyped-def]
    if offsets[0] != 0 or offsets[-1] != len(data):
        return False
    for row in range(len(offsets) - 1):
        length = offsets[row + 1] - offsets[row]
        if length < 1 or length > MAX_KEY_BYTES:
            return False
    return True


@jit
def murmur2_partitions(data, offsets, count):  # type: ignore[no-untyped-def]
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


@jit
def _hash(data, start, length):  # type: ignore[no-untyped-def]
    """FNV-1a over the bytes, then a finishing mix, so that the table's low bits are good."""
    h = np.uint64(0xCBF29CE484222325)
    for i in range(start, start + length):
        h = (h ^ np.uint64(data[i])) * np.uint64(0x100000001B3)
    h ^= h >> np.uint64(32)
    h *= np.uint64(0xD6E8FEB86659FD93)
    h ^= h >> np.uint64(32)
    return h


@jit
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


@jit
def find(table, hashes, lengths, key_bytes, data, offsets, slots):  # type: ignore[no-untyped-def]
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


@jit
def _same(lengths, key_bytes, slot, data, start, length):  # type: ignore[no-untyped-def]
    if lengths[slot] != length:
        return False
    for j in range(length):  # noqa: SIM110  numba knows no all()
        if key_bytes[slot, j] != data[start + j]:
            return False
    return True


@jit
def insert(table, hashes, lengths, key_bytes, free, size, data, offsets, slots, new):  # type: ignore[no-untyped-def]
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


@jit
def remove(table, hashes, free, free_count, slots):  # type: ignore[no-untyped-def]
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


@jit
def hash_slots(hashes, lengths, key_bytes, used):  # type: ignore[no-untyped-def]
    for i in range(len(used)):
        hashes[used[i]] = _hash(key_bytes[used[i]], 0, lengths[used[i]])


@jit
def rehash(table, hashes, used):  # type: ignore[no-untyped-def]
    mask = np.uint64(len(table) - 1)
    for i in range(len(used)):
        position = hashes[used[i]] & mask
        while table[position] >= 0:
            position = (position + np.uint64(1)) & mask
        table[position] = used[i]
