"""Does a training set know the future? What is attached to some of its samples, computed again in another way: from all archived rows of
the key, one by one, in float64, by the definition's sums instead of the fold.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossrep.archive import Archive
from crossrep.attach import valid
from crossrep.attached import Progressed
from crossrep.extras import extra
from crossrep.rows import ColumnRows, Rows
from crossrep.samples import attached_entities
from crossrep.spec import Column
from crossrep.training_sets import TrainingSet, TrainingSets, names_of

with extra("analytics"):
    import pyarrow.parquet as pq

TOLERANCE = 1e-5  # of a vector's length, and of a weight: vectors are stored in float32

Row = tuple[Rows, int]  # a row of many


@dataclass(frozen=True)
class Finding:
    """A value that is not what was known before the impression."""

    sample_id: str
    entity: str
    key: str
    problem: str
    future: bool  # it holds, or may hold, events at or after the impression; otherwise it lacks some, or is wrong in another way


def check(
    store: TrainingSets,
    made: TrainingSet,
    archive: Archive,
    rows: int = 1000,
    seed: int = 0,
    progressed: Progressed = lambda what, done, total: None,
) -> tuple[int, list[Finding]]:
    """Check that many samples, chosen at random, or all if there are fewer. Returns how many, and what is wrong with them.

    Memory: the archived rows of the keys of these samples.

    Raises:
        DataError: a file or the archive cannot be read.
    """
    space = made.declared()
    chosen = np.sort(np.random.default_rng(seed).permutation(made.rows)[:rows])
    samples, names, findings = _samples(store, made, chosen), names_of(space), []
    for entity, field in attached_entities(space).items():
        known = _archived(archive, made, entity, {sample[field].encode() for sample in samples})
        columns = {name: (names[entity, name], column) for name, column in space.entities[entity].columns.items()}
        for sample in samples:
            past = _past(known.get(sample[field].encode(), []), _seconds(sample), made.delay, space.entities[entity].expire_after)
            for problem, future in _problems(entity, columns, sample, past):
                findings.append(Finding(sample["sample_id"], entity, sample[field], problem, future))
            progressed(entity, 1, len(samples))
    return len(samples), findings


def _samples(store: TrainingSets, made: TrainingSet, chosen: NDArray[np.int64]) -> list[dict[str, Any]]:
    """These rows of the set, as they were written."""
    found, first = [], 0
    for file in made.files:
        here = chosen[(chosen >= first) & (chosen < first + file.rows)] - first
        if len(here):
            with store.fs.open(store.path(made.id, file.path)) as opened:
                found += pq.read_table(opened).take(here).to_pylist()
        first += file.rows
    return found


def _archived(archive: Archive, made: TrainingSet, entity: str, keys: set[bytes]) -> dict[bytes, list[Row]]:
    """All archived rows of these keys: where each is."""
    found: dict[bytes, list[Row]] = defaultdict(list)
    for run in archive.rows(entity):
        names = run.rows.keys.tolist()
        here = np.array([i for i in np.flatnonzero(valid(run, made.cut)).tolist() if names[i] in keys], np.int64)
        kept = run.rows.take(here)
        for place, i in enumerate(here.tolist()):
            found[names[i]].append((kept, place))
    return found


def _seconds(sample: dict[str, Any]) -> float:
    return float(sample["event_time"].timestamp())


def _past(rows: list[Row], at: float, delay: float, expire_after: float | None) -> list[Row]:
    """The rows that may be known: of events strictly earlier, since the key last began anew; by time."""
    before = (round(at * 1000) - round(max(0.0, delay) * 1000)) / 1000  # a set made with less than no delay knows the future
    past = sorted(((part, i) for part, i in rows if part.times[i] < before), key=lambda row: float(row[0].times[row[1]]))
    times = [*(float(part.times[i]) for part, i in past), at]
    begins = [n + 1 for n in range(len(past)) if expire_after is not None and times[n + 1] - times[n] > expire_after]
    return past[begins[-1] :] if begins else past


def _problems(entity: str, columns: dict[str, tuple[str, Column]], sample: dict[str, Any], past: list[Row]) -> Iterator[tuple[str, bool]]:
    """What is wrong with an entity's part of a sample, and whether that is the future."""
    at = _seconds(sample)
    count, attached = sum(int(part.counts[i]) for part, i in past), sample[f"{entity}_count"]
    if attached != count:
        yield f"{attached} events are attached, {count} were known before {sample['event_time']:%Y-%m-%d %H:%M:%S.%f}", attached > count
    newest = sample[f"{entity}_event_time"]
    if newest is not None and newest >= sample["event_time"]:
        yield f"the newest of them is of {newest:%Y-%m-%d %H:%M:%S.%f}, not before {sample['event_time']:%Y-%m-%d %H:%M:%S.%f}", True
    for name, (field, column) in columns.items():
        touching = [(part.columns[name], i) for part, i in past if part.columns[name].present[i]]
        vector, weight = _expected(column, touching, at)
        if column.half_life is not None and not math.isclose(sample[f"{field}_weight"], weight, rel_tol=TOLERANCE, abs_tol=1e-300):
            yield f"{field}_weight is {sample[f'{field}_weight']:.9g}, not {weight:.9g}", sample[f"{field}_weight"] > weight
        if column.dim and not _alike(sample[field], vector):
            yield f"{field} is not the aggregate of what was known before", False


def _expected(column: Column, touching: list[tuple[ColumnRows, int]], at: float) -> tuple[NDArray[np.float64] | None, float]:
    """Vector and weight by definition; None and 0 where nothing has touched the column."""
    if not touching:
        return None, 0.0
    times = np.array([part.times[i] for part, i in touching])
    vectors = np.array([part.vectors[i] for part, i in touching], np.float64)
    if column.half_life is None:
        newest = [vector for vector, time in zip(vectors, times) if time == times.max()]
        return max(newest, key=lambda vector: vector.astype("<f4").tobytes()), 0.0
    weights = np.array([part.weights[i] for part, i in touching])
    shares = weights * np.exp2((times - times.max()) / column.half_life)
    left = float((weights * np.exp2((times - at) / column.half_life)).sum())
    return shares @ vectors / shares.sum(), left


def _alike(attached: list[float] | None, expected: NDArray[np.float64] | None) -> bool:
    if attached is None or expected is None:
        return attached is None and expected is None
    return bool(np.linalg.norm(np.array(attached) - expected) <= TOLERANCE * max(1e-30, float(np.linalg.norm(expected))) + 1e-6)
