"""What happened to a key, from the frames that are retained: each replayed as the fold workers fold it, in the order of the partition."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import chain

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from crossrep import kafka
from crossrep.columnar import forget, frames
from crossrep.columnar.aggregates import Aggregates, combine
from crossrep.columnar.algebra import NEVER
from crossrep.columnar.forget import Forget
from crossrep.columnar.records import RecordLayout
from crossrep.columnar.rows import Rows
from crossrep.control import groups
from crossrep.errors import BadFrame, BadRecord, SpaceError
from crossrep.keys import Keys
from crossrep.spec import Space

FOLDED, EXPIRED, FORGOTTEN = "folded", "expired, begun anew", "forgotten"
BAD, LEFT_OUT, WAITS = "refused", "left out by a rewind", "waits to be folded"

Progressed = Callable[[int], None]  # how many offsets further
Earlier = Callable[[int, int], Iterator[tuple[int, float, Rows]]]
_SLOT = np.zeros(1, np.int32)


@dataclass(frozen=True)
class Happened:
    """One frame that holds the key, or one order to forget it."""

    offset: int
    appended: float  # by the broker's clock, seconds since 1970
    what: str  # FOLDED, EXPIRED, FORGOTTEN, WAITS, LEFT_OUT, or BAD and the reason
    row: Rows | None  # [1], the key's rows of the frame, combined; None of an order, and of a bad frame
    after: NDArray[np.void] | None  # [1], the record that the retained frames up to here give; None: nothing is held


@dataclass(frozen=True)
class KeyHistory:
    """All that the retained frames say of one key."""

    partition: int
    first: int  # the first offset retained; if not 0, older frames are gone
    end: int
    record: NDArray[np.void] | None  # [1], what readers see now; None: the key is not held
    happened: list[Happened] = field(default_factory=list)

    @property
    def older(self) -> int:
        """Events of the record that are in no retained frame: they are older, or frames were written since."""
        counted = [after["count"][0] for after in (h.after for h in self.happened if h.what != WAITS) if after is not None]
        return int(self.record["count"][0] - (counted[-1] if counted else 0)) if self.record is not None else 0


def history(
    space: Space,
    entity: str,
    key: bytes,
    bootstrap: str,
    progressed: Progressed = lambda offsets: None,
    earlier: Earlier = lambda number, before: iter(()),
) -> KeyHistory:
    """Read the key's partition of the frames topic, and its record.

    Args:
        earlier: offset, append time and rows of the key in frames of a partition below an offset: those of an archive.

    An entity whose keys expire needs every frame of the partition decoded, since they expire by its newest event; else only those that
    hold the key are.

    Raises:
        SpaceError: no such entity.
        CrossrepError: the cluster does not answer.
    """
    if entity not in space.entities:
        raise SpaceError(f"space {space.name!r} has no entity {entity!r}; it has {', '.join(space.entities)}")
    number = forget.partition_of(space, key)
    first, end = kafka.bounds(bootstrap, space.frames_topic)[number]
    old = list(earlier(number, first))
    found = KeyHistory(number, old[0][0] if old else first, end, _record(space, entity, key, number, bootstrap))
    progress, skipped = groups.folded(space, bootstrap)[number]
    expire_after = space.entities[entity].expire_after
    state, stream_time, held = Aggregates(RecordLayout(space, entity), 1), NEVER, False
    retained = _works(space, entity, key, number, (first, end), bootstrap, expire_after is not None, progressed)
    for offset, appended, work in chain(old, retained):
        if isinstance(work, str):
            found.happened.append(Happened(offset, appended, f"{BAD}: {work}", None, state.records(_SLOT) if held else None))
            continue
        row = None if isinstance(work, Forget) else _only(space, work, entity, key)
        if isinstance(work, Rows) and any(a <= offset < b for a, b in skipped):
            what = LEFT_OUT
        elif isinstance(work, Forget):
            state.clear(_SLOT)
            what, held = FORGOTTEN, False
        else:
            what = FOLDED
            if row is not None:
                if held and expire_after is not None and state.event_time[0] < stream_time - expire_after:
                    state.clear(_SLOT)
                    what = EXPIRED
                state.fold(_SLOT, row)
                held = True
            stream_time = max(stream_time, float(work.times.max()))
        if row is not None or isinstance(work, Forget):
            said = WAITS if offset >= progress and what != LEFT_OUT else what
            found.happened.append(Happened(offset, appended, said, row, state.records(_SLOT, offset) if held else None))
    return found


def table(found: KeyHistory, space: Space, entity: str, last: int) -> Table:
    """The last so many as people read them. Of each column: what the frame adds, and what is then held: weight and length."""
    rows = Table("appended (UTC)", "offset", "what", "events", "newest event", *space.entities[entity].columns, box=None)
    for happened in found.happened[-last:]:
        about = ("", "", *("" for _ in space.entities[entity].columns))
        if happened.row is not None and happened.after is not None:
            cells = (_cell(happened.row, happened.after, name) for name in space.entities[entity].columns)
            events = f"+{happened.row.counts[0]:,} → {int(happened.after['count'][0]):,}"
            about = (events, _text(happened.row.times[0]), *cells)
        rows.add_row(_text(happened.appended), f"{happened.offset:,}", happened.what, *about)
    return rows


def _works(
    space: Space, entity: str, key: bytes, number: int, bounds: tuple[int, int], bootstrap: str, all_frames: bool, progressed: Progressed
) -> Iterator[tuple[int, float, Rows | Forget | str]]:
    """Offset, append time, and what concerns the key: a frame, an order, or why a frame that names it was refused."""
    done = bounds[0]
    for run in kafka.runs(bootstrap, space.frames_topic, {number: bounds}):
        for message in run:
            value, appended = message.value(), message.timestamp()[1] / 1000
            try:
                if forget.is_order(value):
                    order = forget.decode(space, value, number)
                    if (order.entity, order.key) == (entity, key):
                        yield message.offset(), appended, order
                elif all_frames or (value and key in value):
                    yield message.offset(), appended, frames.decode(space, value, appended, number)
            except BadFrame as error:
                if _names(value, entity, key):
                    yield message.offset(), appended, error.reason
        progressed(run[-1].offset() + 1 - done)
        done = run[-1].offset() + 1


def _names(value: bytes | None, entity: str, key: bytes) -> bool:
    """Does a bad frame name the key, as far as can be seen?"""
    try:
        frame = frames.CODEC.decode(value)
        keys = Keys(np.frombuffer(frame["keys"], np.uint8), np.frombuffer(frame["key_offsets"], np.int32))
    except (BadRecord, ValueError):
        return False
    return frame["entity"] == entity and len(keys) > 0 and keys.well_formed() and key in keys.tolist()


def _only(space: Space, rows: Rows, entity: str, key: bytes) -> Rows | None:
    """The key's rows of a frame as one."""
    if rows.entity != entity:
        return None
    at = np.array([i for i, name in enumerate(rows.keys.tolist()) if name == key], np.int64)
    return combine(space, rows.take(at)) if len(at) else None


def _record(space: Space, entity: str, key: bytes, number: int, bootstrap: str) -> NDArray[np.void] | None:
    topic, newest = space.representations_topic(entity), None
    for run in kafka.runs(bootstrap, topic, {number: kafka.bounds(bootstrap, topic)[number]}):
        for message in run:
            if message.key() == key:
                newest = message.value()
    return RecordLayout(space, entity).decode([newest], f"the record of {key!r} on {topic}:") if newest else None


def _cell(row: Rows, after: NDArray[np.void], name: str) -> str:
    column = row.columns[name]
    if not column.present[0]:
        return ""
    length = f"|{np.linalg.norm(after[name][0].astype(np.float64)):.4f}|" if column.vectors.shape[1] else ""
    if f"{name}_weight" not in (after.dtype.names or ()):
        return length
    return f"+{column.weights[0]:.4g} → {after[f'{name}_weight'][0]:.4g} {length}".rstrip()


def _text(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")
