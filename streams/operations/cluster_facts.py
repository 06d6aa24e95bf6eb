"""What `crossrep doctor` looks at: one look at the cluster, as plain data. Nothing is judged here, and nothing is written."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from confluent_kafka import (
    TIMESTAMP_LOG_APPEND_TIME,
    ConsumerGroupTopicPartitions,
    IsolationLevel,
    KafkaException,
    TopicCollection,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient, ConfigResource, OffsetSpec, ResourceType

from crossrep import kafka
from crossrep.control.groups import missed
from crossrep.control.workers import stages, unless_unknown
from crossrep.errors import CrossrepError, SpaceError, SpecError, TopicError
from crossrep.spec import Space
from streams import topics
from streams.topics import Topic

INTERNAL = ("__consumer_offsets", "__transaction_state")
Place = tuple[str, int]  # topic, partition


@dataclass(frozen=True)
class Replicas:
    """One partition of a topic, as broker ids."""

    all: tuple[int, ...]
    in_sync: tuple[int, ...]
    leader: int | None


@dataclass(frozen=True)
class TopicFacts:
    partitions: dict[int, Replicas]
    config: dict[str, str]  # as effective: the topic's own, the brokers' or Kafka's default

    @property
    def replicas(self) -> int:
        """Of the partition that has the fewest."""
        return min(len(replicas.all) for replicas in self.partitions.values())

    def least_in_sync(self, replicas: int) -> int:
        """min.insync.replicas as brokers take it: never more than there are replicas."""
        return min(int(self.config["min.insync.replicas"]), replicas)

    @property
    def retention(self) -> float:
        """Seconds."""
        kept = int(self.config["retention.ms"])
        return float("inf") if kept < 0 else kept / 1000


@dataclass(frozen=True)
class Setting:
    """A broker's."""

    value: str
    dynamic: bool  # can be changed while the broker runs


@dataclass(frozen=True)
class Behind:
    """Where a group is in one partition. Times are the messages' own, seconds since 1970."""

    topic: str
    partition: int
    position: int  # next offset to consume
    first: int
    end: int
    lag: int  # offsets to go, transaction markers among them; 0 if no message is left
    oldest: float | None = None  # time of the next message to consume

    @property
    def place(self) -> str:
        return f"{self.topic}[{self.partition}]"

    @property
    def lost(self) -> bool:
        """Was anything deleted unread?"""
        return missed(self.position, self.first, self.end)


@dataclass(frozen=True)
class Group:
    """A consumer group of the space's workers."""

    name: str
    members: dict[str, int] = field(default_factory=dict)  # worker -> partitions it has
    used: bool = False  # has it ever committed?
    behind: list[Behind] = field(default_factory=list)
    unreadable: str | None = None  # why nothing of the above is known


@dataclass(frozen=True)
class Open:
    """A partition of the frames topic with a transaction that has not ended, so that readers wait before it."""

    partition: int
    stable: int  # its first offset, and the last stable one: where readers wait
    since: float | None  # append time by the broker's clock, seconds since 1970, where that could be learned


@dataclass(frozen=True)
class Facts:
    """Everything the checks look at."""

    space: Space
    bootstrap: str
    planned: list[Topic]
    misfit: str | None  # what `topics.check` says
    topics: dict[str, TopicFacts]  # those that exist, of the plan and of Kafka itself
    brokers: dict[int, dict[str, Setting]]
    unreadable: str | None  # why the brokers' settings are not known
    groups: dict[str, Group]  # "fold", "infer", "frame"
    open: list[Open]
    newest_frame: float | None  # append time by the broker's clock, seconds since 1970
    now: float  # by this machine's clock, seconds since 1970
    production: bool  # several brokers, or so told


def gather(space: Space, bootstrap: str, production: bool = False) -> Facts:
    """Ask the cluster everything once. Writes nothing.

    Args:
        production: judge a cluster of one broker as strictly as one of several.

    Raises:
        CrossrepError: the cluster does not answer, or refuses what no check can do without.
    """
    try:
        return _gather(space, bootstrap, production)
    except KafkaException as error:
        raise CrossrepError(f"the cluster at {bootstrap} cannot be examined: {error.args[0].str()}. Are its brokers up?") from None


def _gather(space: Space, bootstrap: str, production: bool) -> Facts:
    misfit = None
    try:
        topics.check(space, bootstrap)
    except (SpaceError, SpecError, TopicError) as error:
        misfit = str(error)
    admin = kafka.admin(bootstrap)
    metadata = admin.list_topics(timeout=kafka.REQUEST_TIMEOUT)
    planned = [*topics.plan(space), *topics.CONTROL]
    found = _topics(admin, [name for name in (*(t.name for t in planned), *INTERNAL) if name in metadata.topics])
    brokers, unreadable = _brokers(admin, list(metadata.brokers))
    led = {name: [TopicPartition(name, n) for n, r in topic.partitions.items() if r.leader is not None] for name, topic in found.items()}
    groups = {
        role: _group(admin, bootstrap, stage.group, [part for topic in stage.topics for part in led.get(topic, ())])
        for role, stage in stages(space).items()
    }
    frames = led.get(space.frames_topic, [])
    newest = max((stamp for _, stamp in _offsets(admin, frames, OffsetSpec.max_timestamp()).values()), default=-1)
    known = {*metadata.brokers, *(id for topic in found.values() for replicas in topic.partitions.values() for id in replicas.all)}
    return Facts(
        space=space,
        bootstrap=bootstrap,
        planned=planned,
        misfit=misfit,
        topics=found,
        brokers=brokers,
        unreadable=unreadable,
        groups=groups,
        open=_open(admin, bootstrap, frames),
        newest_frame=newest / 1000 if newest > 0 else None,
        now=time.time(),
        production=production or len(known) > 1,
    )


def _topics(admin: AdminClient, names: list[str]) -> dict[str, TopicFacts]:
    if not names:
        return {}
    described = admin.describe_topics(TopicCollection(names), request_timeout=kafka.REQUEST_TIMEOUT)
    resources = [ConfigResource(ResourceType.TOPIC, name) for name in names]
    configs = {r.name: answer.result() for r, answer in admin.describe_configs(resources, request_timeout=kafka.REQUEST_TIMEOUT).items()}
    found = {}
    for name, answer in described.items():
        partitions = {
            p.id: Replicas(tuple(b.id for b in p.replicas), tuple(b.id for b in p.isr), None if p.leader is None else p.leader.id)
            for p in answer.result().partitions
        }
        found[name] = TopicFacts(partitions, {key: entry.value for key, entry in configs[name].items() if entry.value is not None})
    return found


def _brokers(admin: AdminClient, ids: list[int]) -> tuple[dict[int, dict[str, Setting]], str | None]:
    """Every broker's settings; none, and why, where the cluster keeps them to itself, as managed ones do."""
    brokers: dict[int, dict[str, Setting]] = {}
    for id in ids:  # librdkafka takes one broker a request
        resource = ConfigResource(ResourceType.BROKER, str(id))
        (answer,) = admin.describe_configs([resource], request_timeout=kafka.REQUEST_TIMEOUT).values()
        try:
            entries = answer.result()
        except KafkaException as error:
            return {id: {} for id in ids}, f"the brokers' settings cannot be read: {error.args[0].str()}"
        brokers[id] = {key: Setting(e.value, not e.is_read_only) for key, e in entries.items() if e.value is not None}
    return brokers, None


def _group(admin: AdminClient, bootstrap: str, name: str, parts: list[TopicPartition]) -> Group:
    try:
        members, committed = _members_of(admin, name), _committed(admin, name)
    except KafkaException as error:  # its coordinator may be the very broker that is down
        return Group(name, unreadable=f"group {name} cannot be read: {error.args[0].str()}")
    firsts = _offsets(admin, parts, OffsetSpec.earliest())
    ends = _offsets(admin, parts, OffsetSpec.latest())
    positions = {place: committed.get(place, firsts[place][0]) for place in firsts if place in ends}
    starts = {place: max(position, firsts[place][0]) for place, position in positions.items()}
    left = {place: start for place, start in starts.items() if start < ends[place][0]}
    nexts = _next_messages(bootstrap, left) if left and (committed or members or name.startswith("fold.")) else {}
    behind = []
    for place, position in positions.items():
        first, end, oldest = firsts[place][0], ends[place][0], nexts.get(place)
        # A partition whose end was reached without any message: what is left there are markers of transactions.
        lag = end - left[place] if place in left and not (place in nexts and oldest is None) else 0
        behind.append(Behind(*place, position, first, end, lag, oldest))
    return Group(name, members, bool(committed), behind)


def _members_of(admin: AdminClient, group: str) -> dict[str, int]:
    (described,) = admin.describe_consumer_groups([group], request_timeout=kafka.REQUEST_TIMEOUT).values()
    members: dict[str, int] = {}
    for member in unless_unknown(described, "members"):
        worker = member.group_instance_id or f"{member.client_id} at {member.host}"
        members[worker] = members.get(worker, 0) + len(member.assignment.topic_partitions if member.assignment else ())
    return members


def _committed(admin: AdminClient, group: str) -> dict[Place, int]:
    (listed,) = admin.list_consumer_group_offsets([ConsumerGroupTopicPartitions(group)], request_timeout=kafka.REQUEST_TIMEOUT).values()
    parts = unless_unknown(listed, "topic_partitions")
    return {(part.topic, part.partition): part.offset for part in parts if part.offset >= 0}


def _open(admin: AdminClient, bootstrap: str, parts: list[TopicPartition]) -> list[Open]:
    """The partitions whose last stable offset is behind the high watermark."""
    stable = _offsets(admin, parts, OffsetSpec.latest())
    ends = _offsets(admin, parts, OffsetSpec.latest(), IsolationLevel.READ_UNCOMMITTED)
    behind = {place: offset for place, (offset, _) in stable.items() if place in ends and offset < ends[place][0]}
    since = _next_messages(bootstrap, behind, appended=True) if behind else {}
    return [Open(place[1], offset, since.get(place)) for place, offset in sorted(behind.items())]


def _offsets(
    admin: AdminClient, parts: list[TopicPartition], spec: OffsetSpec, isolation: IsolationLevel = IsolationLevel.READ_COMMITTED
) -> dict[Place, tuple[int, int]]:
    """Offset, and time in milliseconds where the question has one, of the partitions that answer."""
    if not parts:
        return {}
    asked = admin.list_offsets(dict.fromkeys(parts, spec), isolation_level=isolation, request_timeout=kafka.REQUEST_TIMEOUT)
    found = {}
    for part, answer in asked.items():
        with suppress(KafkaException):  # its leader went away meanwhile
            found[part.topic, part.partition] = (answer.result().offset, answer.result().timestamp)
    return found


def _next_messages(bootstrap: str, positions: Mapping[Place, int], appended: bool = False) -> dict[Place, float | None]:
    """The time of the first message at or behind each position, seconds since 1970; None where there is none.

    Args:
        appended: look at uncommitted messages too, and take no time but the broker's.
    """
    isolation = "read_uncommitted" if appended else "read_committed"
    few = {"queued.min.messages": 1, "fetch.message.max.bytes": 64 << 10}
    client = kafka.consumer(bootstrap, config={**kafka.ENDS, **few, "isolation.level": isolation})
    try:
        client.assign([TopicPartition(topic, number, offset) for (topic, number), offset in positions.items()])
        times: dict[Place, float | None] = {}
        deadline = time.monotonic() + kafka.REQUEST_TIMEOUT
        while len(times) < len(positions) and time.monotonic() < deadline:
            for message in client.consume(100, 0.05):
                if message.error() is None:
                    kind, stamp = message.timestamp()
                    known = not appended or kind == TIMESTAMP_LOG_APPEND_TIME
                    times.setdefault((message.topic(), message.partition()), stamp / 1000 if known else None)
                elif kafka.is_end(message):
                    times.setdefault((message.topic(), message.partition()), None)
        return times
    finally:
        client.close()
