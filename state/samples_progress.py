"""How far a partition of the join is: the group's committed offsets, and in the metadata of the impressions' what commits with them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace

from confluent_kafka import TopicPartition

from crossrep import kafka
from crossrep.control import groups
from crossrep.errors import StateError
from crossrep.spec import Space, samples_group
from state.join import Marks


@dataclass(frozen=True)
class Settings:
    """What all partitions of a worker share."""

    space: Space
    bootstrap: str
    window: int  # ms
    lateness: int  # ms
    start: str | None = None  # earliest or latest: where to begin if the group has no offsets although there are samples

    @property
    def group(self) -> str:
        return samples_group(self.space)

    @property
    def inputs(self) -> tuple[str, str]:
        return self.space.inputs.impressions, self.space.inputs.clicks


@dataclass(frozen=True)
class Progress:
    """What is committed of a partition."""

    starts: tuple[int, int]  # offsets of the oldest impression and click that are needed again
    positions: tuple[int, int]  # the next impression and click to take in
    marks: Marks = field(default_factory=Marks)
    open: bool = False  # are there impressions that are not emitted?


def committed(settings: Settings, number: int) -> Progress:
    """What is committed of a partition, or where it begins.

    Raises:
        StateError: the log no longer holds what is needed, or the group has lost its offsets; says how to go on.
    """
    parts = [TopicPartition(topic, number) for topic in settings.inputs]
    client = kafka.consumer(settings.bootstrap, settings.group)
    try:
        found = kafka.committed(client, parts)
        bounds = [kafka.watermarks(client, part.topic, number) for part in parts]
    finally:
        client.close()
    if any(part.offset < 0 for part in found):
        if settings.start is None and groups.lost(settings.bootstrap, settings.group, settings.inputs, settings.space.samples_topic):
            raise StateError(
                f"group {settings.group!r} has no offsets, but {settings.space.samples_topic} holds samples already. If the "
                "offsets expired: --start latest goes on with what comes from now on, --start earliest writes all samples "
                "again, under the same ids"
            )
        begins = [end if settings.start == "latest" else first for first, end in bounds]
        begins = [part.offset if part.offset >= 0 else begin for part, begin in zip(found, begins)]
        return Progress((begins[0], begins[1]), (begins[0], begins[1]))
    at = _decode(found[0].metadata, (found[0].offset, found[1].offset))
    return _within_log(settings, number, at, bounds)


def _within_log(settings: Settings, number: int, at: Progress, bounds: list[tuple[int, int]]) -> Progress:
    """The same, where the log holds what is needed; what is not needed any more may be gone."""
    starts, positions = list(at.starts), list(at.positions)
    for which, (topic, (first, end)) in enumerate(zip(settings.inputs, bounds)):
        if positions[which] > end:
            raise StateError(
                f"{topic}[{number}] ends at {end}, but the next to join is {positions[which]}: the topic was created anew. To "
                f"begin anew too, beside the old one's samples: stop all workers, kafka-consumer-groups.sh --delete --group "
                f"{settings.group}, and start with --start earliest"
            )
        if groups.missed(positions[which], first, end) or (first > starts[which] and at.open):
            raise StateError(
                f"{topic}[{number}] begins at {first}, but is needed from {starts[which]} on: events were deleted before they "
                f"were joined. To accept the gap: kafka-consumer-groups.sh --group {settings.group} "
                f"--topic {topic}:{number} --reset-offsets --to-earliest --execute"
            )
        starts[which], positions[which] = max(starts[which], first), max(positions[which], first)
    return replace(at, starts=(starts[0], starts[1]), positions=(positions[0], positions[1]))


def metadata(progress: Progress) -> str:
    """Of the impressions' committed offset; brokers take 4,096 bytes, this has some 200."""
    return json.dumps({"positions": progress.positions, "open": progress.open, "marks": asdict(progress.marks)})


def _decode(text: str | None, starts: tuple[int, int]) -> Progress:
    """Progress as committed. Where the metadata is not ours, somebody has moved the group: it begins there, knowing nothing."""
    try:
        found = json.loads(text or "")
        positions = max(found["positions"][0], starts[0]), max(found["positions"][1], starts[1])  # the clicks' offset alone may be moved
        return Progress(starts, positions, Marks(**found["marks"]), found["open"])
    except (ValueError, KeyError, TypeError, IndexError):
        return Progress(starts, starts)
