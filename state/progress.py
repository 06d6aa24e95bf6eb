"""How far a partition is folded: the group's committed offset, and in that offset's metadata what else must commit with it.

Kafka keeps an offset and its metadata together, in the same transaction as the records, so none of this can disagree with the state.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

from confluent_kafka import TopicPartition

from crossrep import kafka
from crossrep.columnar.algebra import NEVER
from crossrep.control import groups
from crossrep.errors import StateError
from crossrep.spec import Space, fold_group

MOST_SKIPPED = 50  # ranges left out that can be remembered


@dataclass(frozen=True)
class Point:
    """A rewind point: the history can bring the state back to it."""

    offset: int = -1  # every frame below it was folded
    append_time: float = 0.0  # of the last of them, by the broker's clock, seconds since 1970
    stream_time: float = NEVER


@dataclass(frozen=True)
class Progress:
    """What of a partition's frames is in the state."""

    offset: int  # the next frame to fold
    append_time: float = 0.0  # of the last frame folded, by the broker's clock, seconds since 1970
    stream_time: float = NEVER  # newest event folded, seconds since 1970; keys expire by it
    point: Point = Point()
    skipped: tuple[tuple[int, int], ...] = ()  # [first, next) offsets of frames that a rewind has left out

    def skips(self, offset: int) -> bool:
        return any(first <= offset < end for first, end in self.skipped)

    def as_point(self) -> Point:
        return Point(self.offset, self.append_time, self.stream_time)


def encode(progress: Progress) -> str:
    """The metadata of the committed offset; brokers take 4,096 bytes, which MOST_SKIPPED stays below."""
    return json.dumps(
        {
            "append_time": progress.append_time,
            "stream_time": _number(progress.stream_time),
            "point": [progress.point.offset, progress.point.append_time, _number(progress.point.stream_time)],
            "skipped": progress.skipped,
        }
    )


def decode(offset: int, metadata: str | None) -> Progress | None:
    """Progress as committed; None where the metadata is not ours: somebody else has committed the offset."""
    try:
        found = json.loads(metadata or "")
        point = Point(found["point"][0], found["point"][1], _time(found["point"][2]))
        skipped = tuple((int(first), int(end)) for first, end in found["skipped"])
        return Progress(offset, found["append_time"], _time(found["stream_time"]), point, skipped)
    except (ValueError, KeyError, TypeError, IndexError):
        return None


def _number(time: float) -> float | None:
    return None if time == NEVER else time  # JSON has no infinity


def _time(number: float | None) -> float:
    return NEVER if number is None else float(number)


def committed(space: Space, bootstrap: str) -> dict[int, Progress]:
    """Every partition's progress, as it is committed; a partition without one is left out."""
    client = kafka.consumer(bootstrap, fold_group(space))
    try:
        parts = kafka.committed(client, [TopicPartition(space.frames_topic, number) for number in range(space.partitions)])
    finally:
        client.close()
    return {part.partition: decode(part.offset, part.metadata) or Progress(part.offset) for part in parts if part.offset >= 0}


def at_takeover(space: Space, bootstrap: str, number: int, folded: int) -> tuple[Progress, bool]:
    """Where a partition goes on, and whether that is all we must know: False if its stream time has to be found in the records.

    Args:
        folded: the offset up to which the records prove that frames are folded; -1: there are no records.

    Raises:
        StateError: progress, records and frames contradict each other in a way only a person can resolve; says how.
    """
    client = kafka.consumer(bootstrap, fold_group(space))
    try:
        part = kafka.committed(client, [TopicPartition(space.frames_topic, number)])[0]
        first, end = kafka.watermarks(client, space.frames_topic, number)
    finally:
        client.close()
    found = decode(part.offset, part.metadata) if part.offset >= 0 else None
    if part.offset < 0 and folded < 0 and 0 < first < end:
        raise _gap(space, number, 0, (first, end))  # a new space whose first frames are gone; `--to-earliest` commits an offset
    # A group's offsets expire after a week of silence; the records know better. With neither, this is a new space.
    progress = found or Progress(part.offset if part.offset >= 0 else folded if folded >= 0 else first)
    if found is None and progress.offset < folded:  # with our metadata, offset and records were committed together
        raise StateError(
            f"group {fold_group(space)!r} says {space.frames_topic}[{number}] is folded up to {progress.offset}, but records hold frames "
            f"up to {folded}: somebody moved the group back, and folding again would count twice. To go on: "
            f"{_reset(space, number, f'--to-offset {folded}')}. To take the state back too: crossrep rewind {space.name} --to TIME"
        )
    return replace(progress, offset=within_log(space, number, progress.offset, (first, end))), found is not None or folded < 0


def within_log(space: Space, number: int, offset: int, log: tuple[int, int]) -> int:
    """The same offset, or the log's end where only a transaction's marker lay in between and retention has emptied the partition.

    Args:
        log: first and next offset of the partition's frames.

    Raises:
        StateError: the offset is outside of the log.
    """
    first, end = log
    if groups.missed(offset, first, end) or offset > end:
        raise _gap(space, number, offset, log)
    return max(offset, first)


def _gap(space: Space, number: int, offset: int, log: tuple[int, int]) -> StateError:
    return StateError(
        f"{space.frames_topic}[{number}] holds offsets {log[0]} to {log[1]}, but the next to fold is {offset}: frames were deleted before "
        "they were folded, or the topic was created anew. Nothing is skipped silently: create a new space, or accept the gap: "
        f"{_reset(space, number, '--to-earliest')}"
    )


def _reset(space: Space, number: int, to: str) -> str:
    return f"kafka-consumer-groups.sh --group {fold_group(space)} --topic {space.frames_topic}:{number} --reset-offsets {to} --execute"
