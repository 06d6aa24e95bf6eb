"""A view's table on disk: arrays in files, and a note that says up to where in the topic they are true.

It is a cache of the topic, and always right to delete: `open_folder` empties it itself where it cannot be trusted.

The files are mapped into memory and written in place. What a killed process has written stays with the kernel, in its order: a key's bytes
before its length, and both after whatever removed it. So at worst some keys are newer than the note says, or have a record half written;
the topic is read again from the note on, and records are absolute: the last one of each key is right. After a crash of the machine
nothing of that holds; then the files are trusted only if the view was closed, which writes them out.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Set
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from crossrep import kafka
from crossrep.errors import CrossrepError, TopicError
from crossrep.spec import Space
from crossrep.views.probe import describe

log = logging.getLogger(__name__)

NOTE_EVERY = 5.0  # seconds; what a killed process has read since is read again
FORMAT = 1
_NOTE = "note.json"
_BOOT = Path("/proc/sys/kernel/random/boot_id")  # Linux alone has it; elsewhere only closed folders are trusted


@dataclass(frozen=True)
class Note:
    """What the arrays are a cache of, and up to where."""

    space_hash: str
    topic_id: str
    kept: str  # which keys the view was told to hold
    positions: dict[str, int]  # partition -> next offset to read
    current: float  # wall clock, seconds: when the arrays last were what the topic held; deletions since are still to be read there
    stream_time: float = -np.inf  # seconds since 1970
    closed: bool = False  # all is written out
    boot: str = ""  # of the machine that wrote last
    sizes: dict[str, int] = field(default_factory=dict)  # file -> bytes it had at least
    format: int = FORMAT


class Folder:
    """Files of one table, opened by one process at a time."""

    def __init__(self, path: Path, lock: int, note: Note):
        self.path = path
        self.note = note
        self._lock = lock
        self._arrays: dict[str, Any] = {}  # np.memmap
        self._noted = time.monotonic()

    def begin(self, topic_id: str, bounds: Mapping[int, tuple[int, int]]) -> dict[int, int]:
        """The next offsets to read of the partitions that `bounds` names. Raises TopicError if the topic is not the one that was noted."""
        if topic_id != self.note.topic_id:
            raise TopicError(f"the topic was deleted and created anew (id {topic_id}, not {self.note.topic_id}) while the view was opened")
        return {number: self.note.positions[str(number)] for number in bounds}

    def array(self, name: str, dtype: DTypeLike, shape: tuple[int, ...]) -> Any:
        """The array of this name: what it held before, with zeros behind; earlier ones of that name show the same memory.

        Raises:
            CrossrepError: there is no room on the disk.
        """
        path, size = self.path / name, np.dtype(dtype).itemsize * int(np.prod(shape))
        with path.open("ab") as file:
            try:
                if hasattr(os, "posix_fallocate"):  # else a page the disk has no room for kills the process that writes it
                    os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise
                raise CrossrepError(f"no room on the disk: {path} needs {size:,} bytes ({error.strerror})") from None
        self._arrays[name] = np.memmap(path, dtype, "r+", shape=shape)
        return self._arrays[name].view(np.ndarray)

    def rows(self, name: str, row_bytes: int) -> int:
        """Rows in the file of an array; 0 if there is none."""
        path = self.path / name
        return path.stat().st_size // row_bytes if path.exists() else 0

    def advance(self, positions: dict[int, int], stream_time: float, complete: float) -> None:
        """Note, now and then, that all below `positions` is in the arrays, and when (seconds since 1970) that was all there was."""
        if time.monotonic() > self._noted + NOTE_EVERY:
            self._write(positions, stream_time, complete)

    def close(self, positions: dict[int, int], stream_time: float, complete: float) -> None:
        """Write everything out, say so, and let others open it."""
        for array in self._arrays.values():
            array.flush()
        self._write(positions, stream_time, complete, closed=True)
        self.release()

    def release(self) -> None:
        """Let others open it, as the end of the process does."""
        fcntl.flock(self._lock, fcntl.LOCK_UN)  # closing it would not do while a forked process has it too
        os.close(self._lock)

    def _write(self, positions: dict[int, int], stream_time: float, complete: float, closed: bool = False) -> None:
        self._noted = time.monotonic()
        current = max(self.note.current, complete)
        sizes = {name: array.nbytes for name, array in self._arrays.items()}
        numbers = self.note.positions | {str(number): at for number, at in positions.items()}
        self.note = replace(self.note, positions=numbers, stream_time=stream_time, current=current, sizes=sizes, closed=closed)
        _write(self.path, self.note, durably=closed)


def open_table(path: Path, space: Space, entity: str, partitions: Set[int] | None, only: Set[bytes] | None, bootstrap: str) -> Folder:
    """The folder of one entity's table below `path`; raises as `open_folder` does, and CrossrepError if the cluster does not answer."""
    topic = space.representations_topic(entity)
    topic_id = str(describe(topic, bootstrap).topic_id)
    bounds = {number: ends for number, ends in kafka.bounds(bootstrap, topic).items() if partitions is None or number in partitions}
    kept = "all"
    if partitions is not None:
        kept = sha256(repr((sorted(partitions), None if only is None else sorted(only))).encode()).hexdigest()
    empty = Note(space.hash.hex(), topic_id, kept, {str(number): first for number, (first, _) in bounds.items()}, time.time())
    return open_folder(path / f"{space.name}.{entity}", empty, bounds, lambda: kafka.tombstones_kept(bootstrap, topic))


def open_folder(path: Path, expected: Note, bounds: dict[int, tuple[int, int]], tombstones_kept: Callable[[], float]) -> Folder:
    """A table's folder, emptied where what it holds cannot be trusted.

    Args:
        expected: of an empty table of this view.
        bounds: first and next offset of every partition that is followed.
        tombstones_kept: asks for how many seconds the topic keeps deletions (delete.retention.ms).

    Raises:
        CrossrepError: another process has it open.
        OSError: it cannot be written.
    """
    path.mkdir(parents=True, exist_ok=True)
    lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise CrossrepError(f"{path} is open in another view. Give each view a folder of its own, or share one view") from None
    try:
        return Folder(path, lock, _trusted(path, expected, bounds, tombstones_kept))
    except BaseException:
        os.close(lock)
        raise


def _trusted(path: Path, expected: Note, bounds: dict[int, tuple[int, int]], tombstones_kept: Callable[[], float]) -> Note:
    """What a folder's note says, if that can be trusted; else empties it. Marks it as open either way."""
    try:
        note = Note(**json.loads((path / _NOTE).read_bytes()))
        reason = _distrust(path, note, expected, bounds, tombstones_kept)
    except FileNotFoundError:
        note, reason = expected, None if {file.name for file in path.iterdir()} == {"lock"} else "it has no note"
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        note, reason = expected, f"its note cannot be read: {error!r}"
    if reason is not None:
        log.warning("%s is emptied and filled again from the topic: %s", path, reason)
        for name in (_NOTE, "records", "keys", "lengths"):
            (path / name).unlink(missing_ok=True)
        note = expected
    note = replace(note, closed=False, boot=_boot())
    _write(path, note, durably=True)  # before anything is changed, the disk must know that it is open
    return note


def _distrust(
    path: Path, found: Note, expected: Note, bounds: dict[int, tuple[int, int]], tombstones_kept: Callable[[], float]
) -> str | None:
    if found.format != FORMAT:
        return f"it has format {found.format}, not {FORMAT}"
    if found.space_hash != expected.space_hash:
        return "it was written with another spec"
    if found.topic_id != expected.topic_id:
        return "its topic was deleted and created anew"
    if found.kept != expected.kept:
        return "it was filled for other partitions or ids"
    if not found.closed and (not found.boot or found.boot != _boot()):
        return "the machine went down, or it was moved, while it was open"
    if found.positions.keys() != expected.positions.keys():
        return f"it knows partitions {', '.join(found.positions)}, not {', '.join(expected.positions)}"
    for name, size in found.sizes.items():
        if not (path / name).exists() or (path / name).stat().st_size < size:
            return f"its file {name} is not whole"
    behind = False
    for number, (first, end) in bounds.items():
        at = found.positions[str(number)]
        if not first <= at <= end:
            return f"it is true up to offset {at} of partition {number}, which has {first} to {end}"
        behind |= at < end
    age = abs(time.time() - found.current)
    if behind and age > (kept := tombstones_kept()) / 2:  # the other half is for clocks that differ, as in state/store.py
        return f"it is {age / 3600:.0f} h old, and the topic keeps deletions for {kept / 3600:.0f} h"
    return None


def _write(path: Path, note: Note, durably: bool) -> None:
    """Replace the note in one step; `durably`: it outlives a crash of the machine, for which this waits."""
    temporary = path / f"{_NOTE}.new"
    with temporary.open("w") as file:
        json.dump(asdict(note), file)
        if durably:
            file.flush()
            os.fsync(file.fileno())
    temporary.replace(path / _NOTE)
    if not durably:
        return
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name too
    finally:
        os.close(folder)


def _boot() -> str:
    try:
        return _BOOT.read_text().strip()
    except OSError:
        return ""
