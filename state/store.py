"""RocksDB as a cache of the changelog: the same bytes under the same keys, one database per partition.

It is always right to delete it: it is rebuilt from the changelog. `open_store` does so itself whenever what it finds cannot be trusted.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from rocksdict import BlockBasedOptions, Cache, DBCompressionType, Options, Rdict, WriteBatch, WriteBufferManager

from crossrep.errors import StateError

log = logging.getLogger(__name__)

_META = b"\xffmeta"  # entities have prefixes 0, 1, ...


@dataclass(frozen=True)
class Memory:
    """RocksDB's memory for a whole worker, shared by all its partitions: block cache with the write buffers counted in."""

    cache: Cache
    write_buffers: WriteBufferManager

    @classmethod
    def of(cls, size: int) -> Memory:
        cache = Cache(size)
        return cls(cache, WriteBufferManager.new_write_buffer_manager_with_cache(size // 2, False, cache))


@dataclass
class Meta:
    """Up to where a store is true; written with every batch, so it can never disagree with the records."""

    space_hash: str
    topic_ids: dict[str, str]  # of the frames topic and every changelog
    changelog: dict[str, int] = field(default_factory=dict)  # entity -> next changelog offset to read
    progress: int = -1  # next frame offset, as committed with the last batch
    written: float = 0.0  # wall clock, seconds: tombstones older than the topic's delete.retention.ms would be missed


class Store:
    """One partition's records of all entities.

    `get` and `write` may be called from different threads.
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
            return self._db.get([prefix + key for key in keys])  # type: ignore[no-any-return]

    def write(self, records: dict[str, tuple[list[bytes], list[bytes]]], changelog: dict[str, int], progress: int) -> None:
        """One atomic batch: records of entities as (keys, values), and up to where the store is true with them."""
        batch = WriteBatch(raw_mode=True)
        for entity, (keys, values) in records.items():
            prefix = self._prefix[entity]
            for key, value in zip(keys, values, strict=True):
                if value:
                    batch[prefix + key] = value
                else:
                    del batch[prefix + key]
        self.meta.changelog.update(changelog)
        self.meta.progress = progress
        self.meta.written = time.time()
        batch[_META] = json.dumps(asdict(self.meta)).encode()
        with self._noting_corruption():
            self._db.write(batch)

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
        self._db.close()


def open_store(folder: Path, expected: Meta, bounds: dict[str, tuple[int, int]], memory: Memory, tombstones_kept: float) -> Store:
    """Open a partition's store, or start an empty one where the one on disk cannot be trusted.

    Args:
        expected: the space's hash and the topics' ids; a store that says otherwise belongs to something else.
        bounds: per entity, the first and the next offset of its changelog; a store that knows more than there is cannot be its cache.
        tombstones_kept: the changelogs' delete.retention.ms in seconds; an older store may have missed deletions.

    Raises:
        StateError: another process has it open.
    """
    reason = f"it was found damaged: {_note_of(folder).read_text()}" if _note_of(folder).exists() else None
    try:
        if reason is None:
            store = _open(folder, expected, bounds, memory)
            reason = _distrust(store.meta, expected, bounds, tombstones_kept)
            if reason is None:
                return store
            store.close()
    except Exception as error:  # rocksdict raises plain Exceptions: a corrupt or foreign database
        if "lock file" in str(error) or "lock hold" in str(error):
            raise StateError(f"store {folder} is open in another process: {error}. Stop that one first") from None
        reason = f"it does not open: {error}"
    log.warning("store %s is dropped and will be rebuilt from the changelog: %s", folder.name, reason)
    if folder.is_dir():
        shutil.rmtree(folder)
    folder.unlink(missing_ok=True)
    _note_of(folder).unlink(missing_ok=True)
    return _open(folder, expected, bounds, memory)


def _note_of(folder: Path) -> Path:
    return folder.with_suffix(".damaged")


def _open(folder: Path, expected: Meta, bounds: dict[str, tuple[int, int]], memory: Memory) -> Store:
    folder.parent.mkdir(parents=True, exist_ok=True)
    db = Rdict(str(folder), _options(memory))
    stored = db.get(_META)
    meta = Meta(**json.loads(stored)) if stored else replace(expected, changelog={entity: first for entity, (first, _) in bounds.items()})
    return Store(db, folder, meta, list(bounds))


def _distrust(found: Meta, expected: Meta, bounds: dict[str, tuple[int, int]], tombstones_kept: float) -> str | None:
    if found.space_hash != expected.space_hash:
        return "it was written with another spec"
    if found.topic_ids != expected.topic_ids:
        return "its topics were deleted and created anew"
    if found.written and time.time() - found.written > tombstones_kept:
        return f"it is older than the {tombstones_kept:.0f} s for which the changelog keeps deletions"
    if found.changelog.keys() != bounds.keys():
        return f"it knows the changelogs of {list(found.changelog)}, not of {list(bounds)}"
    for entity, (first, end) in bounds.items():
        if found.changelog[entity] < first:
            return f"it knows the changelog of {entity} up to {found.changelog[entity]}, which now begins at {first}"
        if found.changelog[entity] > end:
            return f"it knows the changelog of {entity} up to {found.changelog[entity]}, which ends at {end}"
    return None


def _options(memory: Memory) -> Options:
    options = Options(raw_mode=True)
    options.create_if_missing(True)
    options.set_paranoid_checks(True)
    options.set_write_buffer_size(32 << 20)
    options.set_max_write_buffer_number(3)
    options.set_write_buffer_manager(memory.write_buffers)
    options.set_max_open_files(512)
    options.set_keep_log_file_num(2)
    options.set_compression_type(DBCompressionType.none())  # float vectors do not compress
    table = BlockBasedOptions()
    table.set_block_cache(memory.cache)
    table.set_cache_index_and_filter_blocks(True)
    table.set_bloom_filter(10, False)  # most misses are keys never seen
    options.set_block_based_table_factory(table)
    return options
