"""What a replay reads of an archive: its rows as they are, or, where each is of one event, aggregated in another way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from crossrep.archive import Archive, File
from crossrep.cuts import Cut, InFront
from crossrep.errors import DataError, SpaceError
from crossrep.replay import Source, Task
from crossrep.rows import ColumnRows, Rows
from crossrep.spec import Column, Space


def of_archive(store: Archive, space: Space, cut: Cut | None, accept_gap: bool = False) -> Source:
    """Everything in front of the cut; without one, everything.

    Raises:
        SpaceError: the space aggregates what the archived rows do not tell; says what.
        DataError: there is no archive, or it has a gap.
    """
    archived = store.declared()
    tasks: list[Task] = []
    total = 0
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
            tasks.append(partial(_partition, store, archived, mine, forgotten.get(number, {}), InFront(cut) if cut else None, how))
        total += sum(store.size(file) for file in files)
    return Source(tasks, total)


def _partition(
    store: Archive, archived: Space, files: list[File], forgotten: dict[bytes, int], in_front: InFront | None, how: Fit
) -> Iterator[Rows]:
    for file in files:
        for run in store.read(archived, file, forgotten):
            if in_front is not None:
                run = run.where(in_front.rows(run.partition, run.offsets, run.sources, run.headers))
            if len(run.rows):
                yield how.of(run.rows, file.path)


@dataclass(frozen=True)
class Fit:
    """How rows of an archived entity become rows of the same entity in another space."""

    columns: dict[str, str]  # column -> the archived column whose rows it takes
    decayed: frozenset[str]  # columns with a weight
    anew: str  # why rows of several events cannot be taken; empty: they can
    weights: tuple[NDArray[np.float64], NDArray[np.float64]] | None  # of events: archived, ascending, and now; None: the same

    def of(self, rows: Rows, place: str) -> Rows:
        """Raises DataError: a row is of several events, or has a weight of its own, and that cannot be taken."""
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
