"""What bounds a fold worker's memory, part by part. docs/operations.md has the table; `python -m benchmarks.soak` measures beside it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from crossrep.columnar import frames
from crossrep.columnar.records import RecordLayout
from crossrep.spec import MAX_KEY_BYTES, Space
from state.partition import BEHIND
from state.slab import Slab
from streams.stateful import fetch
from streams.stateful.fold_options import FoldOptions
from streams.stateful.owner import RESTORES

MIB = 1 << 20
PROCESS = 240 * MIB  # an idle worker: interpreter, libraries, compiled kernels; half of it is mapped files
PARTITION = 4 * MIB  # of each, idle: five threads, a producer, a RocksDB
PREFETCHED = 128 * MIB  # queued.max.messages.kbytes of a restoring consumer (crossrep.kafka.consumer)
RUN = 20_000  # records a restore writes at a time (state.changelog.Changelog.tail)
PYTHON = 600  # bytes of Python objects that carry one record through a flush or a restore: two bytes objects, a dict, places in lists
LIBRDKAFKA = 400  # bytes that librdkafka adds to a queued record
TABLES = 1.15  # of RocksDB's budget: what its write buffers do not count, such as compactions under way
KEPT = 0.25  # of what comes and goes: freed memory that glibc keeps in its arenas instead of giving it back


def memory_bound(space: Space, options: FoldOptions) -> dict[str, int]:
    """Bytes at most, by part, of a worker that owns all of the space's partitions, every part at its worst at the same moment.

    It holds for frames as this package writes them, uncompressed: where a topic is compressed, a fetch grows by what that saves.
    """
    layouts = [RecordLayout(space, entity) for entity in space.entities]
    slots = max(options.slots, frames.MAX_ROWS)  # a frame is folded whole
    dirty = min(slots * len(layouts), 4 * options.flush_rows + frames.MAX_ROWS)
    record = max(layout.size for layout in layouts) + MAX_KEY_BYTES
    # In a flush a record exists as a row, as a value, and in the producer's queue or RocksDB's batch; what it was before, at a rewind
    # point, as an undo message and in the producer's queue.
    flush = space.partitions * dirty * (5 * record + PYTHON + LIBRDKAFKA)
    queued = PREFETCHED * (1 + LIBRDKAFKA / min(layout.size for layout in layouts))
    run = RUN * (3 * record + PYTHON)
    queue = (fetch.BUFFERED + 3) * (fetch.RUN + fetch.AT_ONCE * frames.MAX_BYTES)
    bound = {
        "process": PROCESS + PARTITION * space.partitions,
        "slabs": space.partitions * sum(slab_bytes(each, slots) for each in layouts) + max(growing(each, slots) for each in layouts),
        "behind": space.partitions * min(slots, BEHIND) * len(layouts) * (3 * record + PYTHON),  # on its way to RocksDB
        "rocksdb": int(TABLES * (options.rocksdb_mb << 20)),
        # In librdkafka's queue, which the last answer may overfill; in the agent's; and three fetches that come on top. What is taken from
        # librdkafka is a copy, and what it was taken from goes only with the last frame of its answer.
        "frames": fetch.QUEUED + 2 * space.partitions * fetch.FETCHED + queue,
        "flushes": flush,
        "restores": int(min(RESTORES, space.partitions) * (queued + run)),
    }
    moving = sum(bound[part] for part in ("behind", "rocksdb", "frames", "flushes", "restores"))
    return {**bound, "allocator": int(KEPT * moving)}


def slots_within(space: Space, options: FoldOptions, limit: int) -> int:
    """The slots that the options name, doubled as often as the bound stays within `limit` bytes."""
    slots = options.slots
    while sum(memory_bound(space, replace(options, slots=2 * slots)).values()) <= limit:
        slots *= 2
    return slots


def installed() -> int:
    """Bytes of memory that this machine has, or that its container may use."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for cgroup in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # there is no such file, or no limit ("max")
            limits.append(int(Path(cgroup).read_text()))
    return min(limits)


def slab_bytes(layout: RecordLayout, slots: int) -> int:
    """Bytes of one slab at its full size."""
    table = 4 * (1 << math.ceil(math.log2(2 * slots))) - 8 * slots  # the index's table has a power of two as its length
    return slots * sum(_slot_bytes(layout)) + table


def growing(layout: RecordLayout, slots: int) -> int:
    """Bytes that a slab needs beside itself while it doubles: its largest array, once more."""
    return slots * max(_slot_bytes(layout)) // 2


def _slot_bytes(layout: RecordLayout) -> list[int]:
    small = Slab(layout, lambda keys: [None] * len(keys), 1024)
    return [array.nbytes // 1024 for array in _arrays(small)]


def _arrays(owner: Any) -> Iterator[np.ndarray[Any, Any]]:
    """All arrays that an object of ours holds, however deep."""
    for value in vars(owner).values():
        if isinstance(value, np.ndarray):
            yield value
        elif isinstance(value, dict):
            for each in value.values():
                yield from _arrays(each) if hasattr(each, "__dict__") else ()
        elif hasattr(value, "__dict__") and not callable(value):
            yield from _arrays(value)
