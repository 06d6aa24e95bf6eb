"""The newest record of every key, in memory: what a reader of a representation topic holds."""

from __future__ import annotations

import mmap
import sys
import threading
from collections.abc import Iterator, Set
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from crossrep.columnar.records import RecordLayout
from crossrep.errors import CrossrepError
from crossrep.keys import MISSING, KeyIndex, Keys
from crossrep.spec import Space
from crossrep.views.means import Means

if TYPE_CHECKING:
    from crossrep.views.disk import Folder

_SLOTS = 1024  # of an empty index
_INDEX_BYTES = 86  # KeyIndex, a slot
_IN_PLACE = sys.platform == "linux"  # has mremap


class RecordTable:
    """An index from key to slot, and for every slot in use a record, some in reserve.

    Whoever looks at `index` and `records` while another thread applies holds `lock`, and takes copies: the memory moves as it grows.

    Args:
        max_bytes: applying raises rather than take more than this for index and records, also while they grow.
        only: keep these keys alone.
        with_means: keep `means` up to date, which costs a second look at every record that is replaced.
        folder: keep records and keys there, and begin with what it holds; of a key, 20 to 30 bytes of the index stay in memory.
    """

    def __init__(
        self,
        space: Space,
        entity: str,
        max_bytes: int | None = None,
        only: Set[bytes] | None = None,
        with_means: bool = False,
        folder: Folder | None = None,
    ):
        self.lock = threading.Lock()
        self.layout = RecordLayout(space, entity)
        if folder is None:
            self.index, self._rows = KeyIndex(_SLOTS), _Rows(self.layout.dtype)
        else:
            self.index = KeyIndex(max(_SLOTS, folder.rows("lengths", 1)), lambda name, shape: folder.array(name, np.uint8, shape))
            self._rows = _FileRows(self.layout.dtype, folder)
        self.stream_time = -np.inf  # the newest event time in any record applied, wanted or not, seconds since 1970
        self.means = Means(self.layout) if with_means else None
        self._place = f"a record of {space.representations_topic(entity)}:"
        self._of = f"{entity} keys of space {space.name!r}"
        self._max_bytes = max_bytes
        self._only = only
        if folder is not None:
            self.stream_time = folder.note.stream_time
        if folder is not None and self.means is not None:
            slots = self.index.slots()
            for first in range(0, len(slots), 65_536):
                self.means.add(self.records[slots[first : first + 65_536]])

    @property
    def records(self) -> NDArray[np.void]:
        """By slot; what lies in slots that are not in use means nothing."""
        return self._rows.records

    @property
    def memory_bytes(self) -> int:
        """Bytes of records and index."""
        return self.records.nbytes + self.index.capacity * _INDEX_BYTES

    def apply(self, names: list[bytes], values: list[bytes | None]) -> tuple[list[bytes], list[bytes]]:
        """A run of messages in the topic's order: keys, and their records, or None where a key is deleted.

        Returns the keys that have a new record, and those that were held and are gone.

        Raises:
            BadRecord: a value is not a record of this space.
            CrossrepError: there is no memory; says how much would be needed.
        """
        newest = dict(zip(names, values))  # within a run, only the last record of a key matters
        kept = {name: value for name, value in newest.items() if value}
        gone = [name for name, value in newest.items() if not value]
        held = self.index.size
        wanted = held + len(kept)
        try:
            records = self.layout.decode(list(kept.values()), self._place)
            stream_time = float(records["event_time"].max(initial=self.stream_time))
            came = list(kept)
            if self._only is not None:
                rows = [row for row, name in enumerate(came) if name in self._only]
                came, records = [came[row] for row in rows], records[rows]
            keys = Keys.of(came)
            with self.lock:
                dropped = self.index.find(Keys.of(gone))
                found = dropped != MISSING
                slots = self.index.find(keys)
                if self.means is not None:
                    self.means.take(self.records[dropped[found]])
                    self.means.take(self.records[slots[slots != MISSING]])
                    self.means.add(records)
                self.records[dropped[found]] = np.zeros((), self.layout.dtype)  # first: a key without a length is not looked for again
                self.index.remove(dropped[found])
                wanted = self.index.size + int(np.count_nonzero(slots == MISSING))
                self.make_room(wanted)
                self.index.insert(keys, slots)
                self.records[slots] = records
                self.stream_time = stream_time
            return came, [name for name, was in zip(gone, found.tolist()) if was]
        except MemoryError:
            limit = "this process cannot have them" if self._max_bytes is None else f"max_bytes is {self._max_bytes:,}"
            raise CrossrepError(
                f"no memory for {wanted:,} {self._of}: {held:,} are held, in {self.memory_bytes:,} bytes; {self.bytes_for(wanted):,} would "
                f"be needed, and {limit}. Give the reader more memory, or let it read a space that declares fewer or shorter columns for "
                f"{self.layout.entity}"
            ) from None

    def runs(self, rows: int) -> Iterator[tuple[Keys, NDArray[np.void]]]:
        """All keys and their records, so many at a time; copies."""
        slots = self.index.slots()
        for first in range(0, len(slots), rows):
            chosen = slots[first : first + rows]
            yield self.index.keys(chosen), self.records[chosen]

    def make_room(self, keys: int) -> None:
        """Room for so many keys in index and records. Raises MemoryError."""
        if self._max_bytes is not None and self.bytes_for(keys) > self._max_bytes:
            raise MemoryError
        if keys > self.index.capacity:
            self.index.grow(_slots(keys))
        if keys > len(self.records):
            self._rows.grow(_reserved(keys))

    def bytes_for(self, keys: int) -> int:
        """The most that index and records take on the way to so many keys."""
        index, table = self.index.capacity * _INDEX_BYTES, self.records.nbytes
        larger_index = max(index, _slots(keys) * _INDEX_BYTES)
        larger_table = max(table, _reserved(keys) * self.layout.size)
        index_grows = index + larger_index + table if larger_index > index else 0
        table_grows = larger_index + larger_table + (table if larger_table > table and not _IN_PLACE else 0)
        return max(index_grows, table_grows)


class _Rows:
    """`records` that can become more; on Linux where they lie, without a copy of them beside."""

    def __init__(self, dtype: np.dtype[np.void]):
        self.records = np.zeros(1, dtype)
        if _IN_PLACE:
            self._memory = mmap.mmap(-1, dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self.records = np.frombuffer(self._memory, dtype)

    def grow(self, rows: int) -> None:
        """Raises MemoryError, and is then as it was."""
        if not _IN_PLACE:
            larger = np.zeros(rows, self.records.dtype)
            larger[: len(self.records)] = self.records
            self.records = larger
            return
        dtype = self.records.dtype
        self.records = np.zeros(0, dtype)
        try:
            self._memory.resize(rows * dtype.itemsize)
        except OSError:
            raise MemoryError from None
        finally:
            self.records = np.frombuffer(self._memory, dtype)


class _FileRows(_Rows):
    """The same, in a file."""

    def __init__(self, dtype: np.dtype[np.void], folder: Folder):
        self._folder = folder
        self.records = folder.array("records", dtype, (max(1, folder.rows("records", dtype.itemsize)),))

    def grow(self, rows: int) -> None:
        """Raises CrossrepError if there is no room on the disk."""
        self.records = self._folder.array("records", self.records.dtype, (rows,))


def _slots(keys: int) -> int:
    """Of an index for so many keys; its hash table has a power of two in any case."""
    return max(_SLOTS, 1 << (keys - 1).bit_length())


def _reserved(keys: int) -> int:
    """Records for so many keys."""
    return keys + keys // 8
