"""What was known of a key at a moment: archived rows of earlier event time, folded by the stream's own kernels.

One partition at a time: rows sorted by key and time, moments too, and one sweep through both. A row counts for a moment if all its events
are strictly earlier, which the time of its newest says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossrep.archive.columns import Archived
from crossrep.archive.store import Archive
from crossrep.columnar.algebra import NEVER, decay, fold_decayed, fold_entity, fold_latest
from crossrep.columnar.rows import ColumnRows, Known, Rows
from crossrep.control.cuts import Cut
from crossrep.kernels import jit
from crossrep.keys import MISSING, KeyIndex, Keys
from crossrep.spec import Column, Entity

MEMORY = 1 << 30  # bytes of rows held at a time

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Moments:
    """n questions: what was known of this key?"""

    keys: Keys  # of one partition
    before: Floats  # [n], strictly earlier events count, seconds since 1970
    at: Floats  # [n], the moments themselves: a key that has expired by then is not known


@dataclass
class Used:
    """What it was made of."""

    rows: int = 0  # archived rows that were looked at
    combined: int = 0  # of these, rows of several events, which cannot be cut
    blurred: int = 0  # moments whose next row is one of these: events before the moment may be in it, and are then not in the answer
    passes: int = 0  # through a partition


def weights_at(answer: ColumnRows, half_life: float, at: Floats) -> Floats:
    """What is left of a decayed column's weights at the moments [n]; 0 where nothing has touched it."""
    since = np.subtract(at, answer.times, out=np.zeros(len(at)), where=answer.present)
    return decay(answer.weights, since, half_life)


Array = Callable[[str, tuple[int, ...], type], NDArray[Any]]


def unknown(spec: Entity, n: int, array: Array = lambda name, shape, dtype: np.zeros(shape, dtype)) -> Known:
    """n answers that nothing was known.

    Args:
        array: gives zeros of a name, shape and dtype.
    """
    columns = {}
    for name, column in spec.columns.items():
        vectors, weights = array(name, (n, column.dim), np.float32), array(f"{name}_weight", (n,), float)
        columns[name] = ColumnRows(vectors, weights, _never(array, f"{name}_time", n), array(f"{name}_present", (n,), bool))
    return Known(array("count", (n,), np.int64), _never(array, "event_time", n), columns)


def _never(array: Array, name: str, n: int) -> NDArray[np.float64]:
    times = array(name, (n,), float)
    times[:] = NEVER
    return times


def attach(
    archive: Archive, cut: Cut, entity: str, partition: int, moments: Moments, known: Known, to: Ints, used: Used, memory: int = MEMORY
) -> None:
    """What was known of keys of one partition, by the frames that the archive held at a cut: written to the rows `to` of `known`.

    Memory: `memory` bytes of archived rows, and as much again while they are sorted. With more rows of these keys than that, the partition
    is read several times, each time for a part of the keys.

    Raises:
        DataError: there is no archive, or a file is damaged.
    """
    spec, n = archive.declared().entities[entity], len(moments.keys)
    index, slots = KeyIndex(n), np.full(n, MISSING, np.int32)
    index.insert(moments.keys, slots)
    last = np.full(index.size, NEVER)
    np.maximum.at(last, slots, moments.before)
    parts = [(0, index.size)]  # slots whose rows are to be read
    while parts:
        first, end = parts.pop()
        used.passes += 1
        runs = _wanted(archive, cut, entity, partition, index, last, first, end)
        found = _gather(runs, memory if end - first > 1 else None)
        if found is None:
            middle = (first + end) // 2
            parts += [(first, middle), (middle, end)]
        elif found:
            asked = np.flatnonzero((slots >= first) & (slots < end))
            asked = asked[np.lexsort((moments.before[asked], slots[asked]))]
            before, at = moments.before[asked], moments.at[asked]
            _sweep(spec, *_sorted(found), slots[asked], before, at, known, to[asked], used)


Found = tuple[NDArray[np.int32], Rows]  # rows, and the slot of each one's key


def _wanted(
    archive: Archive, cut: Cut, entity: str, partition: int, index: KeyIndex, last: Floats, first: int, end: int
) -> Iterator[Found]:
    """Rows of keys in slots [first, end) that are early enough for any moment; combined ones anyway, to be told of."""
    for run in archive.rows(entity, partition):
        slots = index.find(run.rows.keys)
        wanted = (slots >= first) & (slots < end) & ((run.rows.times < last[slots]) | (run.rows.counts > 1))
        chosen = np.flatnonzero(wanted & valid(run, cut))
        if len(chosen):
            yield slots[chosen], run.rows.take(chosen)


def valid(run: Archived, cut: Cut) -> NDArray[np.bool_]:
    """Which rows lie in front of the cut, in frames that no rewind has left out."""
    there: NDArray[np.bool_] = run.offsets < cut.ends.get(run.partition, 0)
    for first, end in cut.skipped.get(run.partition, []):
        there &= (run.offsets < first) | (run.offsets >= end)
    return there


def _gather(runs: Iterator[Found], memory: int | None) -> list[Found] | None:
    """All of them; None: they take more than `memory` bytes."""
    found, size = [], 0
    for slots, rows in runs:
        vectors = {id(column.vectors): column.vectors.nbytes for column in rows.columns.values()}
        size += sum(vectors.values()) + len(rows) * (20 + 17 * len(rows.columns))
        if memory is not None and size > memory:
            return None
        found.append((slots, rows))
    return found


def _sorted(found: list[Found]) -> Found:
    """As one, by slot and time; without keys."""
    slots, times = (np.concatenate(parts) for parts in zip(*((slots, rows.times) for slots, rows in found)))
    order = np.lexsort((times, slots))
    blocks: dict[tuple[int, ...], NDArray[np.float32]] = {}  # what columns share in every run they still share

    def vectors(name: str) -> NDArray[np.float32]:
        parts = [rows.columns[name].vectors for _, rows in found]
        same = tuple(map(id, parts))
        if same not in blocks:
            blocks[same] = np.concatenate(parts)[order]
        return blocks[same]

    def column(name: str) -> ColumnRows:
        parts = [rows.columns[name] for _, rows in found]
        weights, own, present = (np.concatenate([getattr(part, what) for part in parts])[order] for what in ("weights", "times", "present"))
        return ColumnRows(vectors(name), weights, own, present)

    first = found[0][1]
    counts = np.concatenate([rows.counts for _, rows in found])[order]
    return slots[order], Rows(first.entity, Keys.of([]), times[order], counts, {name: column(name) for name in first.columns})


def _sweep(
    spec: Entity,
    row_slots: NDArray[np.int32],
    rows: Rows,
    slots: NDArray[np.int32],
    before: Floats,
    at: Floats,
    known: Known,
    to: Ints,
    used: Used,
) -> None:
    """Answer moments that have these slots, to these rows of `known`; both they and the archive's rows are sorted by slot and time."""
    starts = np.searchsorted(row_slots, np.arange(int(slots.max()) + 2)).astype(np.int64)
    begins, ends = np.empty(len(slots), np.int64), np.empty(len(slots), np.int64)
    expire_after = np.inf if spec.expire_after is None else spec.expire_after
    used.rows += len(rows)
    used.combined += int((rows.counts > 1).sum())
    used.blurred += spans(starts, rows.times, rows.counts, slots, before, at, expire_after, begins, ends)
    counts, times = np.zeros(len(slots), np.int64), np.full(len(slots), NEVER)
    _sweep_entity(begins, ends, rows.counts, rows.times, counts, times)
    known.counts[to], known.event_times[to] = counts, times
    for name, column in spec.columns.items():
        answer = column_at(column, rows.columns[name], begins, ends)
        for what in ("vectors", "weights", "times", "present"):
            getattr(known.columns[name], what)[to] = getattr(answer, what)


def column_at(column: Column, rows: ColumnRows, begins: NDArray[np.int64], ends: NDArray[np.int64]) -> ColumnRows:
    """One column's answer to n moments: the rows [begins, ends) of each folded; what keys share is swept once.

    Rows are sorted by key and time, moments too (`spans`).
    """
    n = len(begins)
    vectors, weights, times = np.zeros((n, column.dim), np.float32), np.zeros(n), np.full(n, NEVER)
    if column.half_life is None:
        _sweep_latest(begins, ends, rows.vectors, rows.times, rows.present, vectors, times)
        return ColumnRows(vectors, weights, times, times > NEVER)
    _sweep_decayed(begins, ends, rows.vectors, rows.weights, rows.times, rows.present, column.half_life, vectors, weights, times)
    return ColumnRows(vectors, weights, times, times > NEVER)


@jit
def spans(starts, times, counts, slots, before, at, expire_after, begins, ends):  # type: ignore[no-untyped-def]
    """For each moment: the rows [begin, end) of its key that count. Returns how many moments have a combined row next."""
    slot, i, begin, newest, blurred = -1, 0, 0, -np.inf, 0
    for q in range(len(slots)):
        if slots[q] != slot:
            slot = slots[q]
            i = begin = starts[slot]
            newest = -np.inf
        while i < starts[slot + 1] and times[i] < before[q]:
            if times[i] - newest > expire_after:  # the key was deleted in between, and began anew
                begin = i
            newest = times[i]
            i += 1
        begins[q] = i if at[q] - newest > expire_after else begin
        ends[q] = i
        blurred += i < starts[slot + 1] and counts[i] > 1
    return blurred


# In these, state is one slot. Moments of one key and life share `begin`, so that a new one says where to begin anew.


@jit
def _sweep_entity(begins, ends, counts, times, out_count, out_time):  # type: ignore[no-untyped-def]
    count, newest, slot = np.zeros(1, np.int64), np.full(1, -np.inf), np.zeros(len(times), np.int32)
    begin = i = -1
    for q in range(len(begins)):
        if begins[q] != begin:
            begin = i = begins[q]
            count[0], newest[0] = 0, -np.inf
        fold_entity(count, newest, slot[i : ends[q]], counts[i : ends[q]], times[i : ends[q]])
        i = ends[q]
        out_count[q], out_time[q] = count[0], newest[0]


@jit
def _sweep_decayed(begins, ends, vectors, weights, times, present, half_life, out_mean, out_weight, out_time):  # type: ignore[no-untyped-def]
    dim, slot = vectors.shape[1], np.zeros(len(times), np.int32)
    mean, weight, newest = np.zeros((1, dim)), np.zeros(1), np.full(1, -np.inf)
    begin = i = -1
    for q in range(len(begins)):
        if begins[q] != begin:
            begin = i = begins[q]
            mean[:], weight[0], newest[0] = 0.0, 0.0, -np.inf
        j = ends[q]
        fold_decayed(mean, weight, newest, slot[i:j], vectors[i:j], weights[i:j], times[i:j], present[i:j], half_life)
        i = j
        out_mean[q], out_weight[q], out_time[q] = mean[0], weight[0], newest[0]


@jit
def _sweep_latest(begins, ends, vectors, times, present, out_vector, out_time):  # type: ignore[no-untyped-def]
    slot = np.zeros(len(times), np.int32)
    vector, newest = np.zeros((1, vectors.shape[1]), np.float32), np.full(1, -np.inf)
    begin = i = -1
    for q in range(len(begins)):
        if begins[q] != begin:
            begin = i = begins[q]
            vector[:], newest[0] = 0.0, -np.inf
        j = ends[q]
        fold_latest(vector, newest, slot[i:j], vectors[i:j], times[i:j], present[i:j])
        i = j
        out_vector[q], out_time[q] = vector[0], newest[0]
