"""What the page asks the cluster: ends of topics, positions and members of the workers' groups. Reads only, with short timeouts."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from confluent_kafka import ConsumerGroupTopicPartitions, IsolationLevel, KafkaError, KafkaException, TopicCollection, TopicPartition
from confluent_kafka.admin import OffsetSpec

from crossrep import kafka
from crossrep.control.workers import Offsets, Place, lag, positions, stages
from crossrep.spec import Space

LIMIT = 2.0  # seconds for one question
WINDOW = 5.0  # seconds that a rate is taken over


@dataclass(frozen=True)
class Member:
    name: str
    host: str
    places: tuple[Place, ...]


@dataclass(frozen=True)
class Look:
    """One look at the flow. Taken from its start to its end, so that nothing is ahead of what feeds it."""

    at: float  # monotonic
    ends: Offsets  # as read_committed readers see them
    committed: dict[str, Offsets]  # stage -> next offset to consume


@dataclass
class Cluster:
    """The questions, and one connection to ask them over. What cannot be answered now raises KafkaException or TimeoutError."""

    space: Space
    bootstrap: str
    topics: dict[str, int] = field(default_factory=dict)  # those that exist -> partitions

    def __post_init__(self) -> None:
        self.stages = stages(self.space)
        self._admin = kafka.admin(self.bootstrap)
        outputs = [self.space.representations_topic(entity) for entity in self.space.entities]
        inputs = [topic for stage in self.stages.values() for topic in stage.topics]
        self._names = list(dict.fromkeys([*inputs, self.space.dead_letters_topic, *outputs]))  # some have two kinds of workers

    def describe(self) -> None:
        """Which topics there are, with how many partitions."""
        found: dict[str, int] = {}
        for name, answer in self._admin.describe_topics(TopicCollection(self._names), request_timeout=LIMIT).items():
            try:
                found[name] = len(answer.result(LIMIT + 1).partitions)
            except KafkaException as error:
                if error.args[0].code() != KafkaError.UNKNOWN_TOPIC_OR_PART:
                    raise
        self.topics = found

    def look(self) -> Look:
        at = time.monotonic()
        ends = self._list([*self._names], OffsetSpec.latest())
        return Look(at, {place: offset for place, (offset, _) in ends.items()}, self._committed())

    def newest(self) -> dict[str, float]:
        """Per topic the append time of its newest message, seconds since 1970 by the broker's clock."""
        newest: dict[str, float] = {}
        for (topic, _), (_, stamp) in self._list(self._names, OffsetSpec.max_timestamp()).items():
            if stamp > 0:
                newest[topic] = max(newest.get(topic, 0.0), stamp / 1000)
        return newest

    def members(self) -> dict[str, list[Member]]:
        groups = {stage.group: role for role, stage in self.stages.items()}
        found: dict[str, list[Member]] = {role: [] for role in self.stages}
        for group, answer in self._admin.describe_consumer_groups(list(groups), request_timeout=LIMIT).items():
            for member in _known(answer, "members"):
                places = tuple((part.topic, part.partition) for part in (member.assignment.topic_partitions if member.assignment else ()))
                name = member.group_instance_id or member.client_id
                found[groups[group]].append(Member(name, member.host.lstrip("/"), tuple(sorted(places))))
        return {role: sorted(members, key=lambda member: member.name) for role, members in found.items()}

    def _committed(self) -> dict[str, Offsets]:
        asked = {
            role: self._admin.list_consumer_group_offsets([ConsumerGroupTopicPartitions(stage.group)], request_timeout=LIMIT)
            for role, stage in self.stages.items()
        }
        return {
            role: positions(self.stages[role], list(_known(answer, "topic_partitions")))
            for role, answers in asked.items()
            for answer in answers.values()
        }

    def _list(self, names: list[str], spec: OffsetSpec) -> dict[Place, tuple[int, int]]:
        """Offset, and time in milliseconds, of the partitions that answer."""
        parts = [TopicPartition(name, number) for name in names for number in range(self.topics.get(name, 0))]
        if not parts:
            return {}
        committed = IsolationLevel.READ_COMMITTED
        asked = self._admin.list_offsets(dict.fromkeys(parts, spec), isolation_level=committed, request_timeout=LIMIT)
        found: dict[Place, tuple[int, int]] = {}
        failed: KafkaException | None = None
        for part, answer in asked.items():
            try:
                result = answer.result(LIMIT + 1)
                found[part.topic, part.partition] = (result.offset, result.timestamp)
            except KafkaException as error:  # its leader went away, or the whole cluster has
                failed = error
        if not found and failed is not None:
            raise failed
        return found


def _known(answer: Any, field: str) -> Any:
    """A field of an answer; nothing where the group does not exist: some brokers say so by an error."""
    try:
        return getattr(answer.result(LIMIT + 1), field)
    except KafkaException as error:
        if error.args[0].name() == "GROUP_ID_NOT_FOUND":
            return ()
        raise


class Rates:
    """Counters as they were a moment ago, so that a rate can be told."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, dict[str, float]]] = deque()

    def add(self, at: float, counters: Mapping[str, float]) -> None:
        self._seen.append((at, dict(counters)))
        while len(self._seen) > 2 and at - self._seen[1][0] >= WINDOW:
            self._seen.popleft()

    def of(self, name: str) -> float | None:
        """A second; None: not yet known. A counter that began anew counts from 0."""
        (then, before), (now, after) = self._seen[0], self._seen[-1]
        if now <= then or name not in before or name not in after:
            return None
        return max(0.0, after[name] - before[name] if after[name] >= before[name] else after[name]) / (now - then)


class Freshness:
    """An upper bound of how long an event takes from its append until the fold's records hold it, from looks alone.

    Take the events' ends. Once `infer` has committed past them, the frames of those events are there: take the frames' ends. Once
    `fold` has committed past those, everything that the events changed is visible. As coarse as looks are apart, and never too small.
    """

    def __init__(self) -> None:
        self.seconds: float | None = None  # the last that was measured
        self._begun = 0.0
        self._events: Offsets | None = None
        self._frames: Offsets | None = None

    def add(self, look: Look) -> None:
        if not look.committed["fold"]:  # nothing has come through yet
            return
        if self._events is None:
            self._begin(look)
            return
        if self._frames is None and _behind(look, "infer", self._events) == 0:
            self._frames = _only(look.ends, "fold", look)
        if self._frames is not None and _behind(look, "fold", self._frames) == 0:
            self.seconds = time.monotonic() - self._begun
            self._begin(look)

    def waiting(self) -> float:
        """Seconds since the events' ends were taken that have not come through yet."""
        return time.monotonic() - self._begun if self._events is not None else 0.0

    def _begin(self, look: Look) -> None:
        self._events, self._frames, self._begun = _only(look.ends, "infer", look), None, look.at


def _only(offsets: Offsets, stage: str, look: Look) -> Offsets:
    """The offsets of what a stage reads: no others has it ever committed."""
    topics = {topic for topic, _ in look.committed[stage]}
    return {place: offset for place, offset in offsets.items() if place[0] in topics}


def _behind(look: Look, stage: str, ends: Offsets) -> int:
    return sum(lag(stage, end, look.committed[stage].get(place)) for place, end in ends.items())
