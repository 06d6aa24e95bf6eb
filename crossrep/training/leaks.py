"""Does a training set, or a space's topic of training samples, know the future? What is attached to some samples, computed again in another
way: from all archived rows of the key, one by one, in float64, by the definition's sums instead of the fold.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossrep import kafka
from crossrep.archive.store import Archive
from crossrep.columnar.rows import ColumnRows, Rows
from crossrep.control.cuts import Cut
from crossrep.extras import extra
from crossrep.spec import Column, Space
from crossrep.training.attach import Progressed, usable_cut
from crossrep.training.records import TrainingBatch, TrainingLayout
from crossrep.training.samples import attached_entities
from crossrep.training.sets import TrainingSet, TrainingSets, names_of
from crossrep.training.sweep import valid

with extra("analytics"):
    import pyarrow.parquet as pq

TOLERANCE = 1e-5  # of a vector's length, and of a weight: vectors are stored in float32

Row = tuple[Rows, int, int]  # a row of many, and the offset of its frame


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
    """Check that many samples of a set, chosen at random, or all if there are fewer. Returns how many, and what is wrong with them.

    Memory: the archived rows of the keys of these samples.

    Raises:
        DataError: a file or the archive cannot be read.
    """
    space = made.declared()
    chosen = np.sort(np.random.default_rng(seed).permutation(made.rows)[:rows])
    samples = _samples(store, made, chosen)
    claims = {entity: _claims_of_rows(space, entity, samples, made.delay) for entity in attached_entities(space)}
    return len(samples), _findings(space, archive, made.cut, claims, progressed)


def check_topic(
    space: Space,
    bootstrap: str,
    archive: Archive,
    rows: int = 1000,
    seed: int = 0,
    progressed: Progressed = lambda what, done, total: None,
) -> tuple[int, list[Finding]]:
    """The same for samples of training.<space>, corrected ones too. Each says itself up to where the archive was when it was attached.

    A rewind since then has taken frames out of the archive that are rightly in samples of before: those are found to hold too much.

    Raises:
        DataError: the archive cannot be read, or has no cut.
        BadRecord: a message is no training sample of this space.
        CrossrepError: the cluster does not answer, or the topic is missing.
    """
    cut = usable_cut(space, archive)
    chosen = _drawn(space, bootstrap, rows, seed, progressed)
    if not chosen:
        return 0, []
    batch = TrainingLayout(space).decode(chosen, {})
    return len(batch), _findings(space, archive, cut, {entity: _claims_of_batch(entity, batch) for entity in batch.known}, progressed)


@dataclass(frozen=True)
class _Claim:
    """What a sample says was known of one entity."""

    sample_id: str
    key: str
    at: float  # the impression's time, seconds since 1970
    before: float  # events strictly earlier may be known
    archived: float  # of frames up to and including this offset
    count: int
    event_time: float  # -inf: nothing was known
    columns: dict[str, tuple[Sequence[float] | None, float]]  # vector, None if nothing had touched it, and weight


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


def _claims_of_rows(space: Space, entity: str, samples: list[dict[str, Any]], delay: float) -> list[_Claim]:
    names, claims = names_of(space), []
    for sample in samples:
        at = float(sample["event_time"].timestamp())
        newest = sample[f"{entity}_event_time"]
        columns = {
            column: (sample.get(names[entity, column]), float(sample.get(f"{names[entity, column]}_weight", 0.0)))
            for column in space.entities[entity].columns
        }
        claims.append(
            _Claim(
                sample_id=sample["sample_id"],
                key=sample[space.key_field(entity)],
                at=at,
                before=(round(at * 1000) - round(max(0.0, delay) * 1000)) / 1000,  # a set made with less than no delay knows the future
                archived=math.inf,  # the set's cut says it
                count=sample[f"{entity}_count"],
                event_time=-math.inf if newest is None else newest.timestamp(),
                columns=columns,
            )
        )
    return claims


def _drawn(space: Space, bootstrap: str, rows: int, seed: int, progressed: Progressed) -> list[bytes]:
    """That many messages at random, from one look at them all."""
    bounds, random = kafka.bounds(bootstrap, space.training_topic), np.random.default_rng(seed)
    total = sum(end - first for first, end in bounds.values())
    kept: list[tuple[float, int, bytes]] = []  # those of the lowest numbers, of random ones that all have got; a heap of the negated
    seen = 0
    for run in kafka.runs(bootstrap, space.training_topic, bounds):
        for drawn, message in zip(random.random(len(run)).tolist(), run):
            seen += 1
            push = heapq.heappush if len(kept) < rows else heapq.heappushpop
            push(kept, (-drawn, seen, message.value()))
        progressed("reading", len(run), total)
    return [value for _, _, value in kept]


def _claims_of_batch(entity: str, batch: TrainingBatch) -> list[_Claim]:
    known, claims = batch.known[entity], []
    for i, key in enumerate(known.ids.tolist()):
        columns = {
            column: (values.vectors[i].tolist() if values.known[i] else None, float(np.nan_to_num(values.weights[i])))
            for column, values in known.items()
        }
        claims.append(
            _Claim(
                sample_id=batch.sample_ids[i],
                key=key.decode(),
                at=float(batch.event_times[i]),
                before=min(float(batch.known_before[i]), float(batch.event_times[i])),
                archived=float(known.source_offsets[i]),
                count=int(known.counts[i]),
                event_time=float(known.event_times[i]),
                columns=columns,
            )
        )
    return claims


def _findings(space: Space, archive: Archive, cut: Cut, claims: dict[str, list[_Claim]], progressed: Progressed) -> list[Finding]:
    findings = []
    for entity, of in claims.items():
        declared = space.entities[entity]
        known = _archived(archive, cut, entity, {claim.key.encode() for claim in of})
        for claim in of:
            past = _past(known.get(claim.key.encode(), []), claim, declared.expire_after)
            for problem, future in _problems(declared.columns, claim, past):
                findings.append(Finding(claim.sample_id, entity, claim.key, problem, future))
            progressed(entity, 1, len(of))
    return findings


def _archived(archive: Archive, cut: Cut, entity: str, keys: set[bytes]) -> dict[bytes, list[Row]]:
    """All archived rows of these keys: where each is, and the offset of its frame."""
    found: dict[bytes, list[Row]] = defaultdict(list)
    for run in archive.rows(entity):
        names = run.rows.keys.tolist()
        here = np.array([i for i in np.flatnonzero(valid(run, cut)).tolist() if names[i] in keys], np.int64)
        kept = run.rows.take(here)
        for place, i in enumerate(here.tolist()):
            found[names[i]].append((kept, place, int(run.offsets[i])))
    return found


def _past(rows: list[Row], claim: _Claim, expire_after: float | None) -> list[tuple[Rows, int]]:
    """The rows that may be known: of events strictly earlier, since the key last began anew; by time."""
    earlier = [(part, i) for part, i, offset in rows if part.times[i] < claim.before and offset <= claim.archived]
    past = sorted(earlier, key=lambda row: float(row[0].times[row[1]]))
    times = [*(float(part.times[i]) for part, i in past), claim.at]
    begins = [n + 1 for n in range(len(past)) if expire_after is not None and times[n + 1] - times[n] > expire_after]
    return past[begins[-1] :] if begins else past


def _problems(columns: Mapping[str, Column], claim: _Claim, past: list[tuple[Rows, int]]) -> Iterator[tuple[str, bool]]:
    """What is wrong with an entity's part of a sample, and whether that is the future."""
    count = sum(int(part.counts[i]) for part, i in past)
    if claim.count != count:
        yield f"{claim.count} events are attached, {count} were known before {_written(claim.at)}", claim.count > count
    if claim.event_time >= claim.at:
        yield f"the newest of them is of {_written(claim.event_time)}, not before {_written(claim.at)}", True
    for name, column in columns.items():
        touching = [(part.columns[name], i) for part, i in past if part.columns[name].present[i]]
        expected, left = _expected(column, touching, claim.at)
        vector, weight = claim.columns[name]
        if column.half_life is not None and not math.isclose(weight, left, rel_tol=TOLERANCE, abs_tol=1e-300):
            yield f"the weight of {name} is {weight:.9g}, not {left:.9g}", weight > left
        if column.dim and not _alike(vector, expected):
            yield f"{name} is not the aggregate of what was known before", False


def _written(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S.%f")


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


def _alike(attached: Sequence[float] | None, expected: NDArray[np.float64] | None) -> bool:
    if attached is None or expected is None:
        return attached is None and expected is None
    return bool(np.linalg.norm(np.array(attached) - expected) <= TOLERANCE * max(1e-30, float(np.linalg.norm(expected))) + 1e-6)
