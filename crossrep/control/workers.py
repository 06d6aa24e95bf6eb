"""The workers of a space as Kafka knows them: their groups, what they read, who is a member, and how far behind they are."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from confluent_kafka import ConsumerGroupTopicPartitions, IsolationLevel, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec

from crossrep import kafka
from crossrep.errors import CrossrepError
from crossrep.spec import Space, fold_group, samples_group

Place = tuple[str, int]  # topic, partition
Offsets = dict[Place, int]


@dataclass(frozen=True)
class Stage:
    """Workers of one kind, and what they read."""

    group: str
    topics: tuple[str, ...]


def stages(space: Space) -> dict[str, Stage]:
    inputs = (space.inputs.impressions, space.inputs.clicks)
    return {
        "infer": Stage(f"infer.{space.name}", inputs),
        "frame": Stage(f"frame.{space.name}", (space.inference_topic,)),
        "fold": Stage(fold_group(space), (space.frames_topic,)),
        "samples": Stage(samples_group(space), inputs),
    }


def positions(stage: Stage, parts: Sequence[TopicPartition]) -> Offsets:
    """Next offsets to consume, of what a group has committed. That of `samples` commits the oldest events it still needs, and in the
    metadata of the impressions' offset where it is (state/samples_progress.py)."""
    found = {(part.topic, part.partition): part.offset for part in parts if part.offset >= 0}
    for part in parts:
        for topic, position in zip(stage.topics, _positions_said(part.metadata)):
            place = (topic, part.partition)
            found[place] = max(position, found.get(place, 0))
    return found


def _positions_said(metadata: str | None) -> list[int]:
    try:
        return [int(position) for position in json.loads(metadata or "{}").get("positions", ())]
    except (ValueError, AttributeError, TypeError):
        return []


def lag(role: str, end: int, position: int | None) -> int:
    """Offsets to go, markers of transactions among them. Frames are written by transactions alone, so one left over is a marker."""
    behind = max(0, end - (position or 0))
    return 0 if role == "fold" and behind == 1 else behind


@dataclass(frozen=True)
class Standing:
    """A stage as it is."""

    role: str
    members: tuple[str, ...]  # names of the workers that are there
    committed: Offsets  # next offsets to consume; empty: it has never been used
    ends: Offsets  # as read_committed readers see them

    @property
    def used(self) -> bool:
        return bool(self.committed or self.members)

    @property
    def lag(self) -> int:
        return self.behind(self.ends)

    def behind(self, ends: Mapping[Place, int]) -> int:
        """Offsets to go until these ends."""
        return sum(lag(self.role, end, self.committed.get(place)) for place, end in ends.items())


def standings(space: Space, bootstrap: str) -> dict[str, Standing]:
    """Every stage of a space, by role.

    Raises:
        CrossrepError: the cluster does not answer.
    """
    admin, declared = kafka.admin(bootstrap), stages(space)
    try:
        known = admin.list_topics(timeout=kafka.REQUEST_TIMEOUT).topics
        found = {}
        for role, stage in declared.items():
            places = {(topic, number) for topic in stage.topics if topic in known for number in known[topic].partitions}
            committed = {place: offset for place, offset in _committed(admin, stage).items() if place in places}
            found[role] = Standing(role, members(admin, stage.group), committed, latest(admin, places))
        return found
    except KafkaException as error:
        raise CrossrepError(f"the cluster at {bootstrap} does not say how far the workers are: {error.args[0].str()}") from None


def falls_behind(space: Space, bootstrap: str, within: float) -> list[str]:
    """The stages whose workers do not get, `within` so many seconds, to where their inputs end now.

    `infer` counts once it has been used: its inputs are everybody's. What lies in the space's own topics must be read by somebody.
    `samples` does not count: no reader of representations waits for it.

    Raises:
        CrossrepError: the cluster does not answer.
    """
    asked = standings(space, bootstrap)
    deadline = time.monotonic() + within
    now = asked
    while True:
        needed = [role for role, standing in now.items() if role in ("frame", "fold") or (role == "infer" and standing.used)]
        late = [role for role in needed if now[role].behind(asked[role].ends)]
        if not late or time.monotonic() > deadline:
            return late
        time.sleep(0.2)
        now = standings(space, bootstrap)


def members(admin: AdminClient, group: str) -> tuple[str, ...]:
    """The names of a group's members; raises KafkaException."""
    (described,) = admin.describe_consumer_groups([group], request_timeout=kafka.REQUEST_TIMEOUT).values()
    return tuple(sorted(member.group_instance_id or member.client_id for member in unless_unknown(described, "members")))


def latest(admin: AdminClient, places: Collection[Place]) -> Offsets:
    """Where partitions end for read_committed readers; those that do not answer, or are gone, are left out."""
    asked = {TopicPartition(topic, number): OffsetSpec.latest() for topic, number in places}
    if not asked:
        return {}
    found = {}
    answers = admin.list_offsets(asked, isolation_level=IsolationLevel.READ_COMMITTED, request_timeout=kafka.REQUEST_TIMEOUT)
    for place, answer in answers.items():
        with suppress(KafkaException):
            found[place.topic, place.partition] = answer.result().offset
    return found


def _committed(admin: AdminClient, stage: Stage) -> Offsets:
    asked = admin.list_consumer_group_offsets([ConsumerGroupTopicPartitions(stage.group)], request_timeout=kafka.REQUEST_TIMEOUT)
    (listed,) = asked.values()
    return positions(stage, list(unless_unknown(listed, "topic_partitions")))


def unless_unknown(answer: Any, field: str) -> Any:
    """Of an answer, or nothing where the group does not exist: some brokers say so by an error."""
    try:
        return getattr(answer.result(), field)
    except KafkaException as error:
        if error.args[0].name() == "GROUP_ID_NOT_FOUND":
            return ()
        raise
