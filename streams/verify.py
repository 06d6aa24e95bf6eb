"""The proof: what the state must be, computed independently from the recorded frames, held against what readers see.

Every recorded frame must be either in the state or in the dead letters. Nothing of the system's own path is used: frames are read with
plain fastavro, and each key's decayed mean is the textbook sum in float64,

    mean = Σ wᵢ·2^(-(T-tᵢ)/h)·xᵢ / Σ wᵢ·2^(-(T-tᵢ)/h),   T = max tᵢ

not the incremental fold of `crossrep.algebra`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.resources import files
from io import BytesIO
from itertools import pairwise
from typing import Any

import numpy as np
from confluent_kafka import Message, TopicPartition
from fastavro import parse_schema, schemaless_reader
from numpy.typing import NDArray
from rich.table import Table

from crossrep import kafka
from crossrep.errors import CrossrepError
from crossrep.spec import Column, Space, fold_group
from crossrep.view import LocalView
from schemas import codec

TOLERANCE = 1e-6  # of vectors and weights, relative


@dataclass
class Expected:
    """What the frames say of one entity. Row i of every array belongs to the i-th key of `ids`."""

    ids: dict[bytes, int] = field(default_factory=dict)
    count: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    time: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    weight: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    vector: dict[str, NDArray[np.float64]] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """The comparison of one entity."""

    entity: str
    keys: int
    events: int
    wrong_counts: int  # keys whose count differs, or that only one side has
    worst_vector: float  # greatest |difference| / |vector| over all keys and columns
    worst_weight: float
    differences: int  # keys with anything beyond the tolerance


def verify(space: Space, bootstrap: str, progressed: Callable[[int, int], None] = lambda done, total: None) -> list[Verdict]:
    """Compare every key of every entity with an independent computation over all recorded frames.

    Args:
        progressed: told frames read and frames there are, over both passes.

    Raises:
        CrossrepError: frames have been deleted by retention, so the whole truth is no longer recorded; or frames are being written or
            folded right now, so that there is no one moment to compare at.
    """
    before = _bounds(space.frames_topic, bootstrap)
    _wait_until_folded(space, bootstrap)
    expected = recompute(space, bootstrap, progressed)
    verdicts = []
    for entity in space.entities:
        with LocalView(entity, space.name, bootstrap) as view:
            view.wait(120)
            verdicts.append(_compare(view, expected[entity]))
    if _bounds(space.frames_topic, bootstrap) != before:
        raise CrossrepError(f"frames were written to {space.frames_topic} meanwhile; verify while nothing publishes or infers")
    return verdicts


def unfolded(space: Space, bootstrap: str) -> set[int]:
    """Partitions with committed frames beyond the group's progress."""
    client = kafka.consumer(bootstrap, fold_group(space), kafka.ENDS)
    try:
        progress = client.committed([TopicPartition(space.frames_topic, n) for n in range(space.partitions)], timeout=kafka.REQUEST_TIMEOUT)
        starts = [TopicPartition(part.topic, part.partition, max(part.offset, 0)) for part in progress]
        # A last offset is often a transaction's marker, which nobody folds. Where more is missing, it may still be markers and aborted
        # frames alone, so one must look.
        ends = {part.partition: kafka.watermarks(client, part.topic, part.partition)[1] for part in starts}
        starts = [part for part in starts if part.offset < ends[part.partition] - (part.offset > 0)]
        client.assign(starts)
        undecided, behind = {part.partition for part in starts}, set()
        while undecided:
            for message in client.consume(100, 0.05):
                if message.error() and not kafka.is_end(message):
                    raise CrossrepError(f"reading {space.frames_topic}: {message.error().str()}")
                if message.partition() in undecided and not message.error():
                    behind.add(message.partition())
                undecided.discard(message.partition())
        return behind
    finally:
        client.close()


def table(verdicts: list[Verdict]) -> Table:
    """Verdicts as people read them."""
    rows = Table("entity", "keys", "events", "wrong counts", "worst vector", "worst weight", "differences", box=None)
    for v in verdicts:
        worst = (f"{v.worst_vector:.1e}", f"{v.worst_weight:.1e}")
        rows.add_row(v.entity, f"{v.keys:,}", f"{v.events:,}", str(v.wrong_counts), *worst, str(v.differences))
    return rows


def _wait_until_folded(space: Space, bootstrap: str, timeout: float = 60.0) -> None:
    deadline = time.monotonic() + timeout
    while behind := unfolded(space, bootstrap):
        if time.monotonic() > deadline:
            raise CrossrepError(f"partitions {sorted(behind)} of {space.frames_topic} hold unfolded frames; is a fold worker running?")
        time.sleep(0.2)


def recompute(space: Space, bootstrap: str, progressed: Callable[[int, int], None] = lambda done, total: None) -> dict[str, Expected]:
    """What the state of every entity must be, from the frames topic alone."""
    expected = {entity: Expected() for entity in space.entities}
    bounds = _bounds(space.frames_topic, bootstrap)
    gone = {n: first for n, (first, _) in bounds.items() if first > 0}
    if gone:
        raise CrossrepError(f"{space.frames_topic} has lost its first frames to retention (partition -> first offset: {gone})")
    refused = _refused(space, bootstrap)
    for done, total, frame in _frames(space, bootstrap, bounds, refused):  # first pass: keys, counts, and each column's newest time
        _first_pass(expected[frame["entity"]], space, frame)
        progressed(done, 2 * total)
    for entity, e in expected.items():
        for name, column in space.entities[entity].columns.items():
            e.weight[name] = np.zeros(len(e.ids))
            e.vector[name] = np.zeros((len(e.ids), column.dim))
    for done, total, frame in _frames(space, bootstrap, bounds, refused):  # second pass: sums decayed to those times
        _second_pass(expected[frame["entity"]], space, frame)
        progressed(total + done, 2 * total)
    for entity, e in expected.items():
        for name, column in space.entities[entity].columns.items():
            if column.aggregate == "decayed_mean":
                weight = e.weight[name][:, None]
                e.vector[name] = np.divide(e.vector[name], weight, out=np.zeros_like(e.vector[name]), where=weight > 0)
    return expected


def _bounds(topic: str, bootstrap: str) -> dict[int, tuple[int, int]]:
    """First and next offset of every partition."""
    client = kafka.consumer(bootstrap)
    try:
        partitions = client.list_topics(topic, timeout=kafka.REQUEST_TIMEOUT).topics[topic].partitions
        return {n: kafka.watermarks(client, topic, n) for n in partitions}
    finally:
        client.close()


def _messages(topic: str, bootstrap: str, bounds: dict[int, tuple[int, int]]) -> Iterator[Message]:
    """Everything committed within the bounds, per partition in order."""
    client = kafka.consumer(bootstrap, config=kafka.ENDS)
    try:
        left = {n for n, (first, end) in bounds.items() if end > first}
        client.assign([TopicPartition(topic, n, bounds[n][0]) for n in left])
        while left:
            for message in client.consume(1000, 0.05):
                if kafka.is_end(message):
                    left.discard(message.partition())
                elif message.error():
                    raise CrossrepError(f"reading {topic}: {message.error().str()}")
                elif message.offset() < bounds[message.partition()][1]:
                    yield message
    finally:
        client.close()


def _refused(space: Space, bootstrap: str) -> set[tuple[int, int]]:
    """Partition and offset of every frame that lies in the dead letters: each frame must be either there or in the state."""
    topic, letters = space.dead_letters_topic, codec("dead_letter")
    found = [letters.decode(message.value()) for message in _messages(topic, bootstrap, _bounds(topic, bootstrap))]
    return {(letter["partition"], letter["offset"]) for letter in found if letter["topic"] == space.frames_topic}


def _frames(
    space: Space, bootstrap: str, bounds: dict[int, tuple[int, int]], refused: set[tuple[int, int]]
) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Every frame that must have been folded, with how far reading is: offsets read, offsets in all."""
    schema = parse_schema(json.loads((files("crossrep") / "schemas" / "frame.1.avsc").read_text()))
    total = max(1, sum(end for _, end in bounds.values()))
    position = dict.fromkeys(bounds, 0)
    for message in _messages(space.frames_topic, bootstrap, bounds):
        position[message.partition()] = message.offset() + 1
        if (message.partition(), message.offset()) not in refused:
            frame: Any = schemaless_reader(BytesIO(message.value()[10:]), schema, None)
            yield sum(position.values()), total, frame


def _keys(frame: dict[str, Any]) -> list[bytes]:
    offsets = np.frombuffer(frame["key_offsets"], "<i4").tolist()
    return [frame["keys"][a:b] for a, b in pairwise(offsets)]


def _columns(space: Space, frame: dict[str, Any]) -> Iterator[tuple[str, Column, Any, Any, Any, Any]]:
    """Name, spec, rows present, and of those rows: times, weights, vectors in float64."""
    n = frame["rows"]
    times = np.frombuffer(frame["times"], "<f8")
    for part in frame["columns"]:
        column = space.entities[frame["entity"]].columns[part["name"]]
        here = np.flatnonzero(np.frombuffer(part["present"], np.uint8)) if part["present"] else np.arange(n)
        own = np.frombuffer(part["times"], "<f8") if part["times"] else times
        weights = np.frombuffer(part["weights"], "<f8") if part["weights"] else np.ones(n)
        vectors = np.zeros((n, 0))
        if part["vectors"] >= 0:
            block = frame["vectors"][part["vectors"]]
            vectors = np.frombuffer(block["values"], "<f2" if block["dtype"] == "float16" else "<f4").reshape(n, block["dim"])
        yield part["name"], column, here, own[here], weights[here], vectors[here].astype(np.float64)


def _first_pass(e: Expected, space: Space, frame: dict[str, Any]) -> None:
    rows = np.array([e.ids.setdefault(key, len(e.ids)) for key in _keys(frame)])
    if len(e.count) < len(e.ids):
        more = max(1024, len(e.ids))
        e.count = np.append(e.count, np.zeros(more, np.int64))
        for name in space.entities[frame["entity"]].columns:
            e.time[name] = np.append(e.time.get(name, np.zeros(0)), np.full(more, -np.inf))
    counts = np.frombuffer(frame["counts"], "<i8") if frame["counts"] else np.ones(len(rows), np.int64)
    np.add.at(e.count, rows, counts)
    for name, _, here, times, _, _ in _columns(space, frame):
        np.maximum.at(e.time[name], rows[here], times)


def _second_pass(e: Expected, space: Space, frame: dict[str, Any]) -> None:
    rows = np.array([e.ids[key] for key in _keys(frame)])
    for name, column, here, times, weights, vectors in _columns(space, frame):
        at = rows[here]
        if column.half_life is not None:
            decayed = weights * np.exp2(-(e.time[name][at] - times) / column.half_life)
            np.add.at(e.weight[name], at, decayed)
            np.add.at(e.vector[name], at, decayed[:, None] * vectors)
        else:
            for i in np.flatnonzero(times == e.time[name][at]):
                held = e.vector[name][at[i]].astype("<f4").tobytes()
                if not e.weight[name][at[i]] or vectors[i].astype("<f4").tobytes() > held:
                    e.vector[name][at[i]], e.weight[name][at[i]] = vectors[i], 1.0


def _compare(view: LocalView, e: Expected) -> Verdict:
    ids = list(e.ids)
    n = len(ids)
    seen = view.get(ids)
    surplus = len(view) - int(seen.found.sum())
    wrong_counts = seen.counts != e.count[:n]
    different = wrong_counts.copy()
    worst_vector = worst_weight = 0.0
    raw = view.get(ids, at=0.0)  # weights as they are recorded: no event is older than 1970, so none is decayed
    for name, values in raw.items():
        vector = e.vector[name]
        size = np.maximum(np.abs(vector).max(axis=1, initial=0.0), 1e-30)
        error = np.abs(values.vectors - vector).max(axis=1, initial=0.0) / size
        worst_vector = max(worst_vector, float(error.max(initial=0.0)))
        different |= error > TOLERANCE
        different |= values.times != e.time.get(name, np.zeros(0))[:n]  # nothing was ever written of an entity: no times
        if view.space.entities[view.entity].columns[name].aggregate == "decayed_mean":
            error = np.abs(values.weights - e.weight[name]) / np.maximum(e.weight[name], 1e-300)
            worst_weight = max(worst_weight, float(error.max(initial=0.0)))
            different |= error > TOLERANCE
    wrong = int(wrong_counts.sum()) + surplus
    return Verdict(view.entity, n, int(e.count[:n].sum()), wrong, worst_vector, worst_weight, int(different.sum()) + surplus)
