"""RocksDB as a cache of the changelog: the same bytes under the same keys, one database per partition.

It is always right to delete it: it is rebuilt from the changelog. `open_store` does so itself whenever what it finds cannot be trusted.

What the slab holds is written some seconds late (`state.slab`); after a kill that is read from the changelog's tail.
"""

from __future__ import annotations

import json
import logging
import shutil
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rocksdict import (
    BlockBasedOptions,
    BottommostLevelCompaction,
    CompactOptions,
    DBCompressionType,
    Options,
    Rdict,
    WriteBatch,
    WriteBufferManager,
)

from crossrep.columnar.algebra import NEVER
from crossrep.columnar.records import EVENT_TIME_AT
from crossrep.errors import StateError

log = logging.getLogger(__name__)

FILE_BYTES = 64 << 20  # RocksDB's own size of a file
_META = b"\xffmeta"  # entities have prefixes 0, 1, ...
_EVENT_TIME = struct.Struct("<d")


@dataclass
class Room:
    """Free space on the disk of a worker's stores: RocksDB must never meet a full one."""

    folder: Path
    least: int  # bytes
    full: bool = False  # somebody is waiting

    def wait(self) -> None:
        """Block while there is less than `least`; says so every ten seconds."""
        told = -np.inf
        while (free := shutil.disk_usage(self.folder).free) < self.least:
            self.full = True
            if time.monotonic() - told > 10:
                told = time.monotonic()
                log.error(
                    "the disk of %s is full: %d MB are free, %d MB must be. Nothing is written until there is space; nothing is lost",
                    *(self.folder, free >> 20, self.least >> 20),
                )
            time.sleep(0.2)
        self.full = False


@dataclass(frozen=True)
class Memory:
    """RocksDB's memory for a whole worker, shared by all its partitions: its write buffers."""

    write_buffers: WriteBufferManager

    @classmethod
    def of(cls, size: int) -> Memory:
        return cls(WriteBufferManager(size, False))


@dataclass
class Meta:
    """Up to where a store is true; written in one batch with the records that make it so, so that the two never disagree."""

    space_hash: str
    topic_ids: dict[str, str]  # of the frames topic and every changelog
    changelog: dict[str, int] = field(default_factory=dict)  # entity, or in a replica partition -> next changelog offset to read
    folded: dict[str, int] = field(default_factory=dict)  # entity -> frame offset up to which its newest record is true
    # Wall clock, seconds: when the store last began to agree with the changelog's end. What was deleted later is still to be read there,
    # as long as the topic keeps its tombstones.
    current: float = field(default_factory=time.time)
    stream_time: float = NEVER  # in a replica: the newest event time in any record it has read, seconds since 1970
    deletions: bool = False  # in a replica: records of deleted keys may be in the files

    def advanced(self, changelog: dict[str, int], folded: dict[str, int], current: float) -> Meta:
        """The same, further on."""
        return replace(self, changelog={**self.changelog, **changelog}, folded={**self.folded, **folded}, current=current)

    @property
    def progress(self) -> int:
        """Frame offset up to which the newest record is true; -1: there is none."""
        return max(self.folded.values(), default=-1)


class Store:
    """One partition's records of all entities.

    `get` and `write` may be called from different threads.
    `meta` is what the store says of itself on the disk. Single records may be newer, which the changelog's tail, read again, does not mind.
    """

    def __init__(self, db: Rdict, folder: Path, meta: Meta, entities: list[str]):
        self._db = db
        self._folder = folder
        self.meta = meta
        self._prefix = {entity: bytes([i]) for i, entity in enumerate(entities)}

    def get(self, entity: str, keys: list[bytes]) -> list[bytes | None]:
        """Records of many keys; None where there is none."""
        prefix = self._prefix[entity]
        with self._noting_corruption():
            found: list[bytes | None] = self._db.get([prefix + key for key in keys])
        return found

    def scan(self, entity: str, start: bytes, count: int) -> tuple[list[bytes], NDArray[np.float64], bytes | None]:
        """Up to `count` keys from `start` on in byte order, their newest event times, and where to go on (None: that was the end).

        A scan in several steps finds every key that was there all the time.
        """
        keys: list[bytes] = []
        times: list[float] = []
        for key, value in self._entries(entity, start):
            if len(keys) == count:
                return keys, np.array(times), key
            keys.append(key)
            times.append(_EVENT_TIME.unpack_from(value, EVENT_TIME_AT)[0])
        return keys, np.array(times), None

    def records(self, entity: str, start: bytes, count: int) -> tuple[list[bytes], list[bytes], bytes | None]:
        """Up to `count` keys from `start` on in byte order, their records, and where to go on, as `scan`."""
        keys: list[bytes] = []
        values: list[bytes] = []
        for key, value in self._entries(entity, start):
            if len(keys) == count:
                return keys, values, key
            keys.append(key)
            values.append(value)
        return keys, values, None

    def _entries(self, entity: str, start: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Keys and records from `start` on, in byte order of the keys."""
        prefix = self._prefix[entity]
        with self._noting_corruption():
            entries = self._db.iter()
            entries.seek(prefix + start)
            while entries.valid() and (key := entries.key()).startswith(prefix):
                yield key[1:], entries.value()
                entries.next()
            entries.status()  # raises if it ended at a damaged block

    @property
    def estimated_records(self) -> int:
        """RocksDB's own guess; overwritten and deleted records count until they are compacted away."""
        return int(self._db.property_int_value("rocksdb.estimate-num-keys") or 0)

    def newest_event(self) -> float:
        """The newest event time in any record, seconds since 1970. Reads the whole store."""
        newest = NEVER
        for entity in self._prefix:
            start: bytes | None = b""
            while start is not None:
                _, times, start = self.scan(entity, start, 50_000)
                newest = max(newest, float(times.max(initial=NEVER)))
        return newest

    def write(self, records: dict[str, tuple[list[bytes], list[bytes]]], meta: Meta | None = None) -> None:
        """One atomic batch, which all later reads see.

        Args:
            records: entities to keys and values; an empty value deletes.
            meta: what is true of the store with this batch; None if it is still the former.
        """
        newest: dict[bytes, bytes] = {}
        for entity, (keys, values) in records.items():
            prefix = self._prefix[entity]
            newest.update(zip([prefix + key for key in keys], values, strict=True))
        if meta is not None:
            newest[_META] = json.dumps(asdict(meta)).encode()
        batch = WriteBatch(raw_mode=True)
        for key in sorted(newest):  # in order, RocksDB's memtable takes them in 1.4 µs a record instead of 1.6 to 1.9
            if value := newest[key]:
                batch[key] = value
            else:
                del batch[key]
        with self._noting_corruption():
            self._db.write(batch)
        self.meta = meta or self.meta

    def shred(self, entity: str, keys: list[bytes] | None = None) -> None:
        """Make deleted keys leave the files too, where RocksDB would keep their old records until it next compacts them.

        Every key costs a file or two of 64 MB, 0.2 to 0.8 s. Where that is more than all of the entity, or the keys are not given, all of
        it is compacted, at 4 s a GB. Other threads go on meanwhile.
        """
        prefix = self._prefix[entity]
        spans = [(prefix + key, prefix + key + b"\x00") for key in keys or []]
        if keys is None or len(keys) * FILE_BYTES > int(self._db.property_int_value("rocksdb.total-sst-files-size") or 0):
            spans = [(prefix, bytes([prefix[0] + 1]))]
        options = CompactOptions()
        options.set_bottommost_level_compaction(BottommostLevelCompaction.force())
        with self._noting_corruption():
            self._db.flush()
            for first, behind in spans:
                self._db.compact_range(first, behind, compact_opt=options)

    @contextmanager
    def _noting_corruption(self) -> Iterator[None]:
        """A damaged block is found only when it is read. The worker ends then; the note makes the next start rebuild the store."""
        try:
            yield
        except Exception as error:
            if "Corruption" in str(error):
                _note_of(self._folder).write_text(str(error))
            raise

    def close(self) -> None:
        with self._noting_corruption():
            self._db.close()


def open_store(
    folder: Path,
    expected: Meta,
    bounds: dict[str, tuple[int, int]],
    memory: Memory,
    tombstones_kept: float,
    entities: list[str] | None = None,
) -> Store:
    """Open a partition's store, or a replica's, or start an empty one where the one on disk cannot be trusted.

    Args:
        expected: the space's hash and the topics' ids; a store that says otherwise belongs to something else.
        bounds: per entity, the first and the next offset of its changelog; a store that knows more than there is cannot be its cache.
            A replica's store is of one entity and all partitions: per partition then.
        tombstones_kept: the changelogs' delete.retention.ms in seconds. A store that is behind and older than half of that may have missed
            deletions; the other half is there so that the clocks of two workers may differ by hours.
        entities: whose records it holds; default those that `bounds` names.

    Raises:
        StateError: another process has it open.
    """
    entities = list(bounds) if entities is None else entities
    reason = f"it was found damaged: {_note_of(folder).read_text()}" if _note_of(folder).exists() else None
    try:
        if reason is None:
            store = _open(folder, expected, bounds, memory, entities)
            reason = _distrust(store.meta, expected, bounds, tombstones_kept)
            if reason is None:
                return store
            store.close()
    except Exception as error:  # rocksdict raises plain Exceptions: a corrupt or foreign database
        if "lock file" in str(error) or "lock hold" in str(error):
            raise StateError(f"store {folder} is open in another process: {error}. Stop that one first") from None
        if "No space left" in str(error):
            raise  # the store is good; the next start waits for space
        reason = f"it does not open: {error}"
    log.warning("store %s is dropped and will be rebuilt from the changelog: %s", folder.name, reason)
    if folder.is_dir():
        shutil.rmtree(folder)
    folder.unlink(missing_ok=True)
    _note_of(folder).unlink(missing_ok=True)
    return _open(folder, expected, bounds, memory, entities)


def _note_of(folder: Path) -> Path:
    return folder.with_suffix(".damaged")


def _open(folder: Path, expected: Meta, bounds: dict[str, tuple[int, int]], memory: Memory, entities: list[str]) -> Store:
    folder.parent.mkdir(parents=True, exist_ok=True)
    db = Rdict(str(folder), _options(memory))
    stored = db.get(_META)
    meta = (
        Meta(**json.loads(stored))
        if stored
        else replace(expected, changelog={entity: first for entity, (first, _) in bounds.items()}, folded={})
    )
    return Store(db, folder, meta, entities)


def _distrust(found: Meta, expected: Meta, bounds: dict[str, tuple[int, int]], tombstones_kept: float) -> str | None:
    if found.space_hash != expected.space_hash:
        return "it was written with another spec"
    if found.topic_ids != expected.topic_ids:
        return "its topics were deleted and created anew"
    if found.changelog.keys() != bounds.keys():
        return f"it knows the changelogs of {list(found.changelog)}, not of {list(bounds)}"
    for entity, (first, end) in bounds.items():
        if found.changelog[entity] < first:
            return f"it knows the changelog of {entity} up to {found.changelog[entity]}, which now begins at {first}"
        if found.changelog[entity] > end:
            return f"it knows the changelog of {entity} up to {found.changelog[entity]}, which ends at {end}"
    # One offset behind is the marker of our own last transaction, and nothing to have missed.
    behind = any(end - found.changelog[entity] > 1 for entity, (_, end) in bounds.items())
    age = abs(time.time() - found.current)
    if behind and age > tombstones_kept / 2:
        return f"it is {age / 3600:.0f} h old, and the changelog keeps deletions for {tombstones_kept / 3600:.0f} h"
    return None


def _options(memory: Memory) -> Options:
    options = Options(raw_mode=True)
    options.create_if_missing(True)
    options.set_paranoid_checks(True)
    options.set_write_buffer_size(32 << 20)
    options.set_max_write_buffer_number(3)
    options.set_write_buffer_manager(memory.write_buffers)
    options.set_memtable_whole_key_filtering(True)  # most keys asked for were never seen, and are not to be searched for
    options.set_memtable_prefix_bloom_ratio(0.1)
    options.set_max_open_files(512)
    options.set_keep_log_file_num(2)
    options.set_compression_type(DBCompressionType.none())  # float vectors do not compress
    options.set_level_zero_file_num_compaction_trigger(8)  # in the background a record costs 1.2 µs; with four files, 1.7
    table = BlockBasedOptions()
    # What is asked for is what is not in the slab, so hardly the same again: 2.6 µs a key from the kernel's page cache, 3.8 where blocks go
    # through a cache of RocksDB's own. Indexes and filters, by reckoning 4 bytes a key, stay in memory.
    table.disable_cache()
    table.set_cache_index_and_filter_blocks(False)
    table.set_bloom_filter(10, False)
    options.set_block_based_table_factory(table)
    return options
