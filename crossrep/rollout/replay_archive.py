"""What a replay reads of an archive: its rows as they are, or, where each is of one event, aggregated in another way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from crossrep.archive.columns import Archived
from crossrep.archive.store import Archive, File
from crossrep.columnar.algebra import NEVER
from crossrep.columnar.rows import ColumnRows, Rows
from crossrep.control.cuts import Cut, InFront
from crossrep.errors import DataError, SpaceError
from crossrep.rollout.replay_tables import Source, Task
from crossrep.spec import Column, Space


def of_archive(store: Archive, space: Space, cut: Cut | None, accept_gap: bool = False) -> Source:
    """Everything in front of the cut; without one, everything.

    Raises:
        SpaceError: the space aggregates what the archived rows do not tell; says what.
        DataError: there is no archive, or it has a gap.
    """
    about = store.described()
    archived = about.declared()
    tasks: list[Task] = []
    total = 0
    in_front = InFront(cut)
    for entity, how in fitted(archived, space).items():
        if (gaps := store.gaps(entity)) and not accept_gap:
            places = ", ".join(f"[{number}] {first} to {end}" for number, first, end in gaps)
            raise DataError(
                f"{store.root} lacks {entity} frames that were deleted before they were archived (partition, offsets: {places}). To replay "
                "without them: --accept-gap"
            )
        files, forgotten = store.files(entity), store.forgotten(entity)
        for number in sorted({file.partition for file in files}):
            mine = [file for file in files if file.partition == number]
            read = partial(_runs, store, archived, mine, forgotten.get(number, {}), in_front)
            expire_after = space.entities[entity].expire_after
            if expire_after is None:
                tasks.append(partial(_as_they_come, read, how))
            else:
                clock = partial(_clock, store, archived, number, in_front)
                tasks.append(partial(_frame_by_frame, read, how, clock, expire_after))
        total += sum(store.size(file) for file in files)
    return Source(tasks, total, about.model)


Runs = Callable[[], Iterator[Archived]]
Clock = tuple[NDArray[np.int64], NDArray[np.float64]]


def _runs(store: Archive, archived: Space, files: list[File], forgotten: dict[bytes, int], in_front: InFront) -> Iterator[Archived]:
    for file in files:
        for run in store.read(archived, file, forgotten):
            run = run.where(in_front.rows(run.partition, run.offsets, run.sources, run.headers))
            if len(run.rows):
                yield run


def _as_they_come(read: Runs, how: Fit) -> Iterator[tuple[Rows, float]]:
    for run in read():
        yield how.of(run), NEVER


def _frame_by_frame(read: Runs, how: Fit, clock: Callable[[], Clock], expire_after: float) -> Iterator[tuple[Rows, float]]:
    """As the fold workers do: what has expired is decided when a frame is folded, by the newest event in its partition before."""
    offsets, newest = clock()
    for run in read():
        starts = np.flatnonzero(np.diff(run.offsets, prepend=-1))
        for first, end in pairwise([*starts.tolist(), len(run.offsets)]):
            before = float(newest[np.searchsorted(offsets, run.offsets[first])])
            yield how.of(run.take(np.arange(first, end))), before - expire_after


def _clock(store: Archive, archived: Space, partition: int, in_front: InFront) -> Clock:
    """Of every frame of a partition, of all entities: its offset, and the newest event time in those before it."""
    found = [store.times(file, in_front.rows) for entity in archived.entities for file in store.files(entity, partition)]
    offsets, times = (np.concatenate(arrays) for arrays in zip(*found))
    order = np.argsort(offsets, kind="stable")
    starts = np.flatnonzero(np.diff(offsets[order], prepend=-1))
    newest = np.maximum.accumulate(np.maximum.reduceat(times[order], starts)) if len(starts) else np.zeros(0)
    return offsets[order][starts], np.concatenate([[NEVER], newest[:-1]])


@dataclass(frozen=True)
class Fit:
    """How rows of an archived entity become rows of the same entity in another space."""

    columns: dict[str, str]  # column -> the archived column whose rows it takes
    decayed: frozenset[str]  # columns with a weight
    anew: str  # why rows of several events cannot be taken; empty: they can
    weights: tuple[NDArray[np.float64], NDArray[np.float64]] | None  # of events: archived, ascending, and now; None: the same

    def of(self, run: Archived) -> Rows:
        """Raises DataError: a row is of several events, or has a weight of its own, and that cannot be taken."""
        rows, place = run.rows, f"partition {run.partition} of the archive"
        if self.anew and (rows.counts != 1).any():
            raise DataError(
                f"{place} holds rows that several events were merged into, and {self.anew}: what each of them weighed is not known any "
                "more. Archive a space whose `crossrep infer` runs with --no-combine"
            )
        columns = {}
        for name, of in self.columns.items():
            column = rows.columns[of]
            if self.weights is not None and name in self.decayed:
                column = ColumnRows(column.vectors, self._now(column, place), column.times, column.present)
            columns[name] = column
        return Rows(rows.entity, rows.keys, rows.times, rows.counts, columns)

    def _now(self, column: ColumnRows, place: str) -> NDArray[np.float64]:
        assert self.weights is not None
        then, now = self.weights
        at = np.minimum(np.searchsorted(then, column.weights), len(then) - 1)
        unknown = column.present & (then[at] != column.weights)
        if unknown.any():
            raise DataError(
                f"{place} holds a row of weight {column.weights[unknown][0]}, which is no event's in [weights]: it cannot change"
            )
        return now[at]


def fitted(archived: Space, space: Space) -> dict[str, Fit]:
    """By entity of the space. Raises SpaceError: the archived rows do not tell what it aggregates; names every column."""
    problems: list[str] = []
    weights = None
    if archived.weights != space.weights:
        by_weight: dict[float, set[float]] = {}
        for event, weight in archived.weights.items():
            by_weight.setdefault(weight, set()).add(space.weights.get(event, np.nan))
        if any(len(now) > 1 or np.isnan(list(now)).any() for now in by_weight.values()):
            problems.append("weights: two events of the same weight cannot be told apart, or an event has none now")
        else:
            then = np.array(sorted(by_weight))
            weights = (then, np.array([by_weight[weight].copy().pop() for weight in then.tolist()]))
    fits = {}
    for entity, spec in space.entities.items():
        if entity not in archived.entities:
            problems.append(f"{entity}: not in the archive")
            continue
        there = archived.entities[entity].columns
        columns, why = {}, ["[weights] differ"] if weights else []
        for name, column in spec.columns.items():
            alike = [other for other, of in there.items() if _alike(of, column)]
            same = [other for other in alike if there[other].half_life == column.half_life]
            chosen = same or alike
            if not chosen:
                problems.append(f"{entity}.{name}: no column with this source, dim, aggregate and events is in the archive")
                continue
            columns[name] = name if name in chosen else chosen[0]
            if not same:
                why.append(f"{entity}.{name} has another half-life than the archived {columns[name]}")
        decayed = frozenset(name for name, column in spec.columns.items() if column.half_life is not None)
        fits[entity] = Fit(columns, decayed, "; ".join(why), weights)
    if problems:
        raise SpaceError(
            f"the archive of space {archived.name!r} does not tell what space {space.name!r} aggregates:\n"
            + "\n".join(f"  {problem}" for problem in problems)
        )
    return fits


def _alike(one: Column, other: Column) -> bool:
    return all(getattr(one, name) == getattr(other, name) for name in ("source", "dim", "aggregate")) and (
        set(one.events or ()) == set(other.events or ())
    )
