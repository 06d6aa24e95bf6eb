"""The proof: what the state must be, computed independently from the recorded frames, held against what readers see.

It works while frames are written and folded. Every record says up to which frame it is true (`source_offset`), and the group's progress,
read before the changelog, up to which frame every record is true at least: each key is compared at the later of the two. What a key must
be there, `recompute.py` sums up from the frames: each must be in the state, in the dead letters, or left out by a rewind.

What is assumed:

- Readers and workers are `read_committed`, and every frame's fate (folded, or a dead letter) is committed with the progress that passes it.
- A transaction that is open when the changelog is read is waited for. After a kill it takes up to 10 s until the broker aborts it.
- A key without a record has nothing that says up to where it is gone. It may be gone if it was forgotten, or had expired, anywhere up to
  the progress read behind the changelog. An expired key may also be there still: then it must be what it was.
- With a base (`live`), what the changelog held at the start and the stream times committed with it are taken as true.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from confluent_kafka import KafkaException, TopicPartition
from numpy.typing import NDArray
from rich.table import Table

from crossrep import kafka
from crossrep.errors import CrossrepError
from crossrep.spec import Space, fold_group
from schemas import codec
from streams.proof.readout import Bounds, Place, Seen, look, refuse_rewound, settled
from streams.proof.recompute import Expected, recompute
from streams.proof.recorded import Progressed

TOLERANCE = 1e-6  # of vectors and weights, relative
EXAMPLES = 5  # keys that a verdict names
FOLDED_WITHIN = 60.0  # seconds that frames may take which lay there at the start


@dataclass(frozen=True)
class Verdict:
    """The comparison of one entity."""

    entity: str
    keys: int  # keys that must exist
    events: int  # that these keys count
    since: int  # of these events, those counted from frames: all of them, or with a base those since then
    wrong_counts: int  # keys whose count differs, or that only one side has
    worst_vector: float  # greatest |difference| / |vector| over all keys and columns
    worst_weight: float
    differences: int  # keys with anything beyond the tolerance
    examples: tuple[str, ...] = ()  # the first keys that differ, and in what


def verify(
    space: Space,
    bootstrap: str,
    progressed: Progressed = lambda done, total: None,
    share: float = 1.0,
    live: float = 0.0,
    as_is: bool = False,
) -> list[Verdict]:
    """Compare every key of every entity with an independent computation over all recorded frames.

    Args:
        progressed: told frames read and frames there are, over both passes; and while watching, seconds.
        share: of the keys, chosen by hash; of other keys' rows nothing is kept.
        live: if not 0, take what the changelog holds now as given, watch for so many seconds, and verify what came in them.
        as_is: do not wait until the frames already written are folded.

    Raises:
        CrossrepError: frames have been deleted by retention, so that the whole truth is no longer recorded; frames are not being folded;
            the state is rewound meanwhile; or the cluster does not answer. Says what to do.
    """
    log = kafka.bounds(bootstrap, space.frames_topic)
    base = look(space, bootstrap, share) if live else None
    if base is None:
        _refuse_incomplete(space, log)
    else:
        started = time.monotonic()
        while (passed := time.monotonic() - started) < live:
            progressed(int(passed), int(live))
            time.sleep(min(1.0, live - passed))
        log = kafka.bounds(bootstrap, space.frames_topic)
    if not as_is:
        _wait_until_folded(space, bootstrap, log)
    seen = look(space, bootstrap, share)
    if base is not None:
        refuse_rewound(base.before, seen.after)
    expected, stream_times = recompute(space, bootstrap, seen, base, _refused(space, bootstrap), share, progressed)
    return [_compare(space, entity, expected[entity], seen, stream_times) for entity in space.entities]


def unfolded(space: Space, bootstrap: str, log: Bounds | None = None) -> set[int]:
    """Partitions with committed frames beyond the group's progress.

    Args:
        log: the frames to ask about; without it, all there are now.

    Raises:
        CrossrepError: the cluster does not answer.
    """
    client = kafka.consumer(bootstrap, fold_group(space), kafka.ENDS)
    try:
        parts = kafka.committed(client, [TopicPartition(space.frames_topic, n) for n in range(space.partitions)])
        log = log or {part.partition: kafka.watermarks(client, part.topic, part.partition) for part in parts}
        starts = [TopicPartition(part.topic, part.partition, max(part.offset, log[part.partition][0])) for part in parts]
        # A last offset is often a transaction's marker, which nobody folds. Where more is missing, it may still be markers and aborted
        # frames alone, so one must look.
        starts = [part for part in starts if part.offset < log[part.partition][1] - (part.offset > 0)]
        client.assign(starts)
        undecided, behind = {part.partition for part in starts}, set()
        while undecided:
            for message in client.consume(100, 0.05):
                number = message.partition()
                if message.error() and not kafka.is_end(message):
                    raise CrossrepError(f"reading {space.frames_topic}: {message.error().str()}")
                if number in undecided and not message.error() and message.offset() < log[number][1]:
                    behind.add(number)
                undecided.discard(number)
        return behind
    except KafkaException as error:
        raise CrossrepError(f"the cluster does not say how far {space.frames_topic} is folded: {error.args[0].str()}") from None
    finally:
        client.close()


def table(verdicts: list[Verdict]) -> Table:
    """Verdicts as people read them."""
    based = any(v.since != v.events for v in verdicts)
    rows = Table("entity", "keys", "events", *(["of them verified"] if based else []), box=None)
    for name in ("wrong counts", "worst vector", "worst weight", "differences"):
        rows.add_column(name)
    for v in verdicts:
        counted = (f"{v.events:,}", *((f"{v.since:,}",) if based else ()))
        worst = (f"{v.worst_vector:.1e}", f"{v.worst_weight:.1e}")
        rows.add_row(v.entity, f"{v.keys:,}", *counted, str(v.wrong_counts), *worst, str(v.differences))
    return rows


def _refused(space: Space, bootstrap: str) -> set[tuple[int, int]]:
    """Partition and offset of every frame that lies in the dead letters: each frame must be either there or in the state."""
    topic, letters = space.dead_letters_topic, codec("dead_letter")
    bounds = settled(bootstrap, [topic])[topic]
    found = (letters.decode(message.value()) for message in kafka.messages(bootstrap, topic, bounds))
    return {(letter["partition"], letter["offset"]) for letter in found if letter["topic"] == space.frames_topic}


def _refuse_incomplete(space: Space, log: Bounds) -> None:
    gone = {number: first for number, (first, _) in log.items() if first > 0}
    if gone:
        raise CrossrepError(
            f"{space.frames_topic} has lost its first frames to retention (partition -> first offset: {gone}), so the whole truth is no "
            "longer recorded. Verify what comes from now on: --live 60s"
        )


def _wait_until_folded(space: Space, bootstrap: str, log: Bounds) -> None:
    """Until the progress has passed these frames: those that come meanwhile are not waited for."""
    deadline = time.monotonic() + FOLDED_WITHIN
    while behind := unfolded(space, bootstrap, log):
        if time.monotonic() > deadline:
            raise CrossrepError(
                f"partitions {sorted(behind)} of {space.frames_topic} hold frames that were not folded within {FOLDED_WITHIN:.0f} s; is a "
                "fold worker running? To verify what is folded so far: --as-is"
            )
        time.sleep(0.2)


def _compare(space: Space, entity: str, e: Expected, seen: Seen, stream_times: dict[int, float]) -> Verdict:
    spec, held, n = space.entities[entity], seen.records[entity].values, len(e)
    m = len(held)  # the keys that readers see have the first slots
    about = e.table[:n]
    must, wanted = about["count"] > 0, about[:m]
    both = must[:m]
    may_miss = about["may_miss"]
    if spec.expire_after is not None:
        limits = np.array([stream_times[number] - spec.expire_after for number in range(space.partitions)])
        may_miss = may_miss | (about["event_time"] < limits[about["partition"]])
    progress = np.array([seen.after[number].offset for number in range(space.partitions)])[wanted["partition"]]

    aspects: list[tuple[NDArray[np.bool_], Callable[[int], str]]] = []  # which keys differ in it, and how one does

    def compare(name: str, here: NDArray[np.generic], there: NDArray[np.generic], wrong: NDArray[np.bool_] | None = None) -> None:
        aspects.append((both & (here != there if wrong is None else wrong), lambda i: f"{name} {here[i]}, by the frames {there[i]}"))

    aspects.append((~both, lambda i: f"it must not exist, but counts {held['count'][i]:.0f}"))
    ahead = held["source_offset"] >= progress
    aspects.append((ahead, lambda i: f"it claims frame {held['source_offset'][i]:.0f}, but the next to fold is {progress[i]}"))
    compare("count", held["count"].astype(np.int64), wanted["count"])
    wrong_counts = int(((aspects[-1][0]) | ~both).sum())
    compare("newest event", held["event_time"], wanted["event_time"])
    worst_vector = worst_weight = 0.0
    for name, column in spec.columns.items():
        compare(f"{name} newest", held[f"{name}_time"], e.time(name)[:m])
        if column.half_life is not None:
            here, there = held[f"{name}_weight"], e.weight[name][:m]
            error = _no_nan(np.abs(here - there) / np.maximum(there, 1e-300))
            worst_weight = max(worst_weight, float(error[both].max(initial=0.0)))
            compare(f"{name} weight", here, there, error > TOLERANCE)
        if column.dim:
            vector = e.vector[name][:m]
            size = np.maximum(np.abs(vector).max(axis=1), 1e-30)
            error = _no_nan(np.abs(held[name] - vector).max(axis=1) / size)
            worst_vector = max(worst_vector, float(error[both].max(initial=0.0)))
            aspects.append((both & (error > TOLERANCE), lambda i, n=name, off=error: f"{n} is off by {off[i]:.1e}"))  # type: ignore[misc]
    different = np.flatnonzero(np.logical_or.reduce([wrong for wrong, _ in aspects]))
    missing = m + np.flatnonzero(must[m:] & ~may_miss[m:])
    said = [(i, [text(i) for wrong, text in aspects if wrong[i]]) for i in different[:EXAMPLES].tolist()]
    said += [(i, [f"it is missing; by the frames it counts {about['count'][i]}"]) for i in missing[:EXAMPLES].tolist()]
    must[m:] &= ~may_miss[m:]
    return Verdict(
        entity,
        keys=int(must.sum()),
        events=int(about["count"][must].sum()),
        since=e.since(np.flatnonzero(must)),
        wrong_counts=wrong_counts + len(missing),
        worst_vector=worst_vector,
        worst_weight=worst_weight,
        differences=len(different) + len(missing),
        examples=tuple(f"{name_of(entity, e.places[i])}: {'; '.join(how)}" for i, how in said[:EXAMPLES]),
    )


def _no_nan(error: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.nan_to_num(error, nan=np.inf, posinf=np.inf)


def name_of(entity: str, place: Place) -> str:
    return f"{entity} {place[1].decode(errors='replace')} (partition {place[0]})"
