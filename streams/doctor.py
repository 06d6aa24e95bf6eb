"""`crossrep doctor`: is the cluster set up as the guarantees assume, and are the workers keeping up?

`gather` asks the cluster once and changes nothing; every check judges those facts alone and names the command that mends what it found.
A *problem* loses data, stops workers or breaks a promise, now or at the next fault. A *warning* leaves less room than it should.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from confluent_kafka import ConsumerGroupTopicPartitions, IsolationLevel, KafkaException, TopicCollection, TopicPartition
from confluent_kafka.admin import AdminClient, ConfigResource, OffsetSpec, ResourceType
from rich.table import Table

from crossrep import kafka
from crossrep.errors import CrossrepError, SpaceError, SpecError, TopicError
from crossrep.spaces import SPACES_TOPIC
from crossrep.spec import Space, fold_group
from state import changelog
from streams import pipeline, rewind, topics
from streams.topics import Topic

INTERNAL = ("__consumer_offsets", "__transaction_state")
REPLICAS = 3
BATCH = 1 << 20  # bytes, the producers' batch.size: brokers limit batches, not records
DAY, WEEK = 86_400.0, 7 * 86_400.0
NEVER = 2**63 - 1  # Kafka's default of max.compaction.lag.ms
CLOCKS_APART = 60.0  # seconds


class Status(StrEnum):
    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"
    SKIPPED = "skipped"  # could not be learned


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


@dataclass(frozen=True)
class Group:
    """A consumer group of the space's workers."""

    name: str
    members: dict[str, int] = field(default_factory=dict)  # worker -> partitions it has
    used: bool = False  # has it ever committed?
    behind: list[Behind] = field(default_factory=list)
    unreadable: str | None = None  # why nothing of the above is known


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
    newest_frame: float | None  # append time by the broker's clock, seconds since 1970
    now: float  # by this machine's clock, seconds since 1970
    production: bool  # several brokers, or so told

    @property
    def own(self) -> Iterator[tuple[Topic, TopicFacts]]:
        """The planned topics that exist."""
        return ((topic, self.topics[topic.name]) for topic in self.planned if topic.name in self.topics)


@dataclass(frozen=True)
class Defect:
    status: Status
    found: str
    fix: str


@dataclass(frozen=True)
class Finding:
    """What one check says."""

    check: str
    status: Status
    found: str
    why: str
    fixes: tuple[str, ...] = ()


# --- gathering ---


def gather(space: Space, bootstrap: str, production: bool = False) -> Facts:
    """Ask the cluster everything once. Writes nothing.

    Args:
        production: judge a cluster of one broker as strictly as one of several.

    Raises:
        CrossrepError: the cluster does not answer, or refuses what no check can do without.
    """
    try:
        try:
            topics.check(space, bootstrap)
            misfit = None
        except (SpaceError, SpecError, TopicError) as error:
            misfit = str(error)
        return _gather(space, bootstrap, production, misfit)
    except KafkaException as error:
        raise CrossrepError(f"the cluster at {bootstrap} cannot be examined: {error.args[0].str()}. Are its brokers up?") from None


def _gather(space: Space, bootstrap: str, production: bool, misfit: str | None) -> Facts:
    admin = kafka.admin(bootstrap)
    metadata = admin.list_topics(timeout=kafka.REQUEST_TIMEOUT)
    planned = [*topics.plan(space), Topic(SPACES_TOPIC, 1, {"cleanup.policy": "compact"}, shared=True)]
    found = _topics(admin, [name for name in (*(t.name for t in planned), *INTERNAL) if name in metadata.topics])
    brokers, unreadable = _brokers(admin, list(metadata.brokers))
    led = {name: [TopicPartition(name, n) for n, r in topic.partitions.items() if r.leader is not None] for name, topic in found.items()}
    inputs = {
        "fold": (fold_group(space), [space.frames_topic]),
        "infer": (f"infer.{space.name}", [space.inputs.impressions, space.inputs.clicks]),
        "frame": (f"frame.{space.name}", [space.inference_topic]),
    }
    groups = {
        role: _group(admin, bootstrap, name, [part for topic in names for part in led.get(topic, ())])
        for role, (name, names) in inputs.items()
    }
    newest = max((stamp for _, stamp in _offsets(admin, led.get(space.frames_topic, []), OffsetSpec.max_timestamp()).values()), default=-1)
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
    brokers: dict[int, dict[str, Setting]] = {id: {} for id in ids}
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
    for (topic, number), position in positions.items():
        place = (topic, number)
        first, end, oldest = firsts[place][0], ends[place][0], nexts.get(place)
        # A partition whose end was reached without any message: what is left there are markers of transactions.
        lag = end - left[place] if place in left and not (place in nexts and oldest is None) else 0
        behind.append(Behind(topic, number, position, first, end, lag, oldest))
    return Group(name, members, bool(committed), behind)


def _members_of(admin: AdminClient, group: str) -> dict[str, int]:
    (described,) = admin.describe_consumer_groups([group], request_timeout=kafka.REQUEST_TIMEOUT).values()
    members: dict[str, int] = {}
    for member in _unless_unknown(described, lambda answer: answer.members):
        worker = member.group_instance_id or f"{member.client_id} at {member.host}"
        members[worker] = members.get(worker, 0) + len(member.assignment.topic_partitions if member.assignment else ())
    return members


def _committed(admin: AdminClient, group: str) -> dict[tuple[str, int], int]:
    (listed,) = admin.list_consumer_group_offsets([ConsumerGroupTopicPartitions(group)], request_timeout=kafka.REQUEST_TIMEOUT).values()
    parts = _unless_unknown(listed, lambda answer: answer.topic_partitions)
    return {(part.topic, part.partition): part.offset for part in parts if part.offset >= 0}


def _unless_unknown(answer: Any, read: Callable[[Any], Any]) -> Any:
    """What is read of an answer, or nothing where the group does not exist: some brokers say so by an error."""
    try:
        return read(answer.result())
    except KafkaException as error:
        if error.args[0].name() == "GROUP_ID_NOT_FOUND":
            return ()
        raise


def _offsets(admin: AdminClient, parts: list[TopicPartition], spec: OffsetSpec) -> dict[tuple[str, int], tuple[int, int]]:
    """Offset, and time in milliseconds where the question has one, as read_committed readers see them, of the partitions that answer."""
    if not parts:
        return {}
    asked = admin.list_offsets(
        dict.fromkeys(parts, spec), isolation_level=IsolationLevel.READ_COMMITTED, request_timeout=kafka.REQUEST_TIMEOUT
    )
    found = {}
    for part, answer in asked.items():
        with suppress(KafkaException):  # its leader went away meanwhile
            found[part.topic, part.partition] = (answer.result().offset, answer.result().timestamp)
    return found


def _next_messages(bootstrap: str, positions: Mapping[tuple[str, int], int]) -> dict[tuple[str, int], float | None]:
    """The time of the first message at or behind each position, seconds since 1970; None where there is none."""
    client = kafka.consumer(bootstrap, config={**kafka.ENDS, "queued.min.messages": 1, "fetch.message.max.bytes": 64 << 10})
    try:
        client.assign([TopicPartition(topic, number, offset) for (topic, number), offset in positions.items()])
        times: dict[tuple[str, int], float | None] = {}
        deadline = time.monotonic() + kafka.REQUEST_TIMEOUT
        while len(times) < len(positions) and time.monotonic() < deadline:
            for message in client.consume(100, 0.05):
                if message.error() is None:
                    times.setdefault((message.topic(), message.partition()), message.timestamp()[1] / 1000)
                elif kafka.is_end(message):
                    times.setdefault((message.topic(), message.partition()), None)
        return times
    finally:
        client.close()


# --- judging ---


def topics_fit(facts: Facts) -> Finding:
    defects = [] if facts.misfit is None else [Defect(Status.PROBLEM, facts.misfit, f"crossrep topics check {facts.space.name}")]
    return _finding("topics fit", "workers do not start otherwise", defects, f"{len(facts.planned)} topics, published")


def replication(facts: Facts) -> Finding:
    status = Status.PROBLEM if facts.production else Status.WARNING
    few = {name: least for name, topic in facts.topics.items() if (least := _replicas(topic)) < REPLICAS}
    plan = (
        f"crossrep doctor {facts.space.name} --bootstrap {facts.bootstrap} --reassignment replicas.json; kafka-reassign-partitions.sh "
        f"--bootstrap-server {facts.bootstrap} --reassignment-json-file replicas.json --execute"
    )
    if len(facts.brokers) < REPLICAS:
        plan = f"run {REPLICAS} brokers (there are {len(facts.brokers)}), then: {plan}"
    defects = [Defect(status, f"{n} of {REPLICAS} replicas: {_names(names)}", plan) for n, names in _inverted(few).items()]
    for name, setting in zip(INTERNAL, ("offsets.topic.replication.factor", "transaction.state.log.replication.factor")):
        if name not in facts.topics:  # it is made at its first use, with these
            defects += _of_brokers(facts, setting, str(REPLICAS), lambda value: int(value) >= REPLICAS, status)
    return _finding("replication", "one lost disk must lose nothing", defects, f"{REPLICAS} or more everywhere")


def min_insync_replicas(facts: Facts) -> Finding:
    def judge(name: str, topic: TopicFacts) -> Iterator[tuple[Status, str, str]]:
        replicas = _replicas(topic)  # a single one can have no second copy: that is for `replication` to say
        least = _least_in_sync(topic, replicas)
        if least < 2 <= replicas:
            yield Status.PROBLEM, f"{least} of {replicas} replicas", "min.insync.replicas=2"
        elif least == replicas >= REPLICAS:
            yield Status.WARNING, f"{least} of {replicas} replicas: one broker down stops writing", f"min.insync.replicas={replicas - 1}"

    defects = _of_topics(facts, facts.topics, judge)
    if INTERNAL[1] not in facts.topics and facts.production:
        defects += _of_brokers(facts, "transaction.state.log.min.isr", "2", lambda value: int(value) >= 2, Status.PROBLEM)
    why = "what is acknowledged must be on two disks"
    return _finding("min.insync.replicas", why, defects, "2 or more wherever there are copies")


def replicas_now(facts: Facts) -> Finding:
    defects = []
    missing: dict[tuple[Status, str], list[str]] = {}
    absent: set[int] = set()
    for name, topic in facts.topics.items():
        for number, replicas in topic.partitions.items():
            gone = set(replicas.all) - set(replicas.in_sync)
            if replicas.leader is None:
                kind = (Status.PROBLEM, "without a leader")
            elif len(replicas.in_sync) < _least_in_sync(topic, len(replicas.all)):
                kind = (Status.PROBLEM, "with fewer than min.insync.replicas in sync")
            elif gone:
                kind = (Status.WARNING, "under-replicated")
            else:
                continue
            absent |= gone
            missing.setdefault(kind, []).append(f"{name}[{number}]")
    for (status, what), places in missing.items():
        brokers = ", ".join(map(str, sorted(absent))) or "in question"
        look = f"kafka-topics.sh --bootstrap-server {facts.bootstrap} --describe --unavailable-partitions"
        if status is Status.WARNING:
            look = look.replace("unavailable", "under-replicated")
        defects.append(Defect(status, f"{len(places)} partitions {what}: {_names(places)}", f"start broker {brokers} again; look: {look}"))
    return _finding("replicas now", "the next fault stops or loses writes", defects, "all in sync")


def unclean_election(facts: Facts) -> Finding:
    setting = "unclean.leader.election.enable"
    status = Status.PROBLEM if facts.production else Status.WARNING
    defects = _of_brokers(facts, setting, "false", lambda value: value == "false", status)
    if not defects:

        def judge(name: str, topic: TopicFacts) -> Iterator[tuple[Status, str, str]]:
            if topic.config.get(setting) == "true":
                yield status, f"{setting}=true", f"{setting}=false"

        defects = _of_topics(facts, facts.topics, judge)
    return _finding("unclean leader election", "it discards acknowledged records", defects, "off")


_JUDGED_ELSEWHERE = {
    "retention.ms",
    "retention.bytes",
    "delete.retention.ms",
    "min.cleanable.dirty.ratio",
    "max.compaction.lag.ms",
    "segment.ms",
    "segment.bytes",
    "max.message.bytes",
    "min.insync.replicas",
}


def as_planned(facts: Facts) -> Finding:
    def judge(name: str, topic: TopicFacts) -> Iterator[tuple[Status, str, str]]:
        for key, wanted in _plan_of(facts, name).items():
            if key not in _JUDGED_ELSEWHERE and topic.config.get(key) != wanted:
                status = Status.PROBLEM if key in ("cleanup.policy", "message.timestamp.type") else Status.WARNING
                yield status, f"{key}={topic.config.get(key)}", f"{key}={wanted}"

    keys = dict.fromkeys(key for topic in facts.planned for key in topic.config if key not in _JUDGED_ELSEWHERE)
    return _finding("topics' settings", "a wrong one deletes state or history", _of_planned(facts, judge), f"{', '.join(keys)} as planned")


def retention(facts: Facts) -> Finding:
    def judge(name: str, topic: TopicFacts) -> Iterator[tuple[Status, str, str]]:
        wanted = _plan_of(facts, name).get("retention.ms")
        if wanted is None:
            return
        kept = _retention(topic)
        if kept < float(wanted) / 1000:
            status = Status.PROBLEM if name == facts.space.frames_topic and kept < DAY else Status.WARNING
            yield status, f"retention.ms keeps {_text(kept)} of planned {_text(float(wanted) / 1000)}", f"retention.ms={wanted}"
        if int(topic.config["retention.bytes"]) >= 0:
            yield Status.WARNING, f"retention.bytes={topic.config['retention.bytes']} may delete sooner", "retention.bytes=-1"

    return _finding("retention", "what is deleted before it is read is lost", _of_planned(facts, judge), "as planned, no limit of bytes")


def compaction(facts: Facts) -> Finding:
    def judge(name: str, topic: TopicFacts) -> Iterator[tuple[Status, str, str]]:
        plan = _plan_of(facts, name)
        key = "delete.retention.ms"
        if key in plan and int(topic.config[key]) < int(plan[key]):
            yield Status.PROBLEM, f"{key} is {_text(int(topic.config[key]) / 1000)}, stores trust {_ms(plan[key])}", f"{key}={plan[key]}"
        key = "max.compaction.lag.ms"
        if key in plan and int(topic.config[key]) > int(plan[key]):
            never = int(topic.config[key]) == NEVER
            lag = "not set: an erased key may stay for ever" if never else f"{_ms(topic.config[key])} instead of {_ms(plan[key])}"
            yield Status.PROBLEM if never else Status.WARNING, f"{key} {lag}", f"{key}={plan[key]}"
        key = "min.cleanable.dirty.ratio"
        if key in plan and float(topic.config[key]) > float(plan[key]):
            yield Status.WARNING, f"{key}={topic.config[key]}: restores read up to that share of old records", f"{key}={plan[key]}"

    why = "a store must see every deletion, and an erased key must go"
    return _finding("compaction", why, _of_planned(facts, judge), "as planned")


def segments(facts: Facts) -> Finding:
    def judge(name: str, topic: TopicFacts) -> Iterator[tuple[Status, str, str]]:
        plan, rolled = _plan_of(facts, name), int(topic.config["segment.ms"])
        if "compact" in topic.config["cleanup.policy"]:  # Kafka rolls these by the shorter of the two
            rolled = min(rolled, int(topic.config["max.compaction.lag.ms"]))
        wanted = int(plan.get("segment.ms", 2 * WEEK * 1000))
        if rolled > wanted:
            yield Status.WARNING, f"rolled after {_text(rolled / 1000)}", f"segment.ms={min(wanted, int(WEEK * 1000))}"
        needed = max(BATCH, int(plan.get("max.message.bytes", 0)))
        size = int(topic.config["segment.bytes"])
        if size < needed:
            yield Status.PROBLEM, f"segment.bytes={size} refuses batches up to {needed}", f"segment.bytes={1 << 30}"

    why = "the active segment is neither compacted nor deleted"
    return _finding("segments", why, _of_planned(facts, judge), "rolled within two weeks")


def message_sizes(facts: Facts) -> Finding:
    own = {topic.name: int(topic.config.get("max.message.bytes", BATCH)) for topic in facts.planned if not topic.shared}

    def judge(name: str, topic: TopicFacts) -> Iterator[tuple[Status, str, str]]:
        size = int(topic.config["max.message.bytes"])  # a broker's message.max.bytes holds only where a topic has none, and is in it
        if size < own.get(name, 0):
            yield Status.PROBLEM, f"max.message.bytes={size}, needed {own[name]}", f"max.message.bytes={own[name]}"

    defects = _of_planned(facts, judge)
    if facts.production:
        most = max(own.values())
        defects += _of_brokers(facts, "replica.fetch.max.bytes", str(most), lambda value: int(value) >= most, Status.WARNING)
    return _finding("message sizes", "a commit that is too large fails for ever", defects, f"up to {max(own.values()) >> 20} MiB")


def transactions(facts: Facts) -> Finding:
    longest = int(max(changelog.TRANSACTION_TIMEOUT, pipeline.TRANSACTION_TIMEOUT) * 1000)
    setting, wanted = "transaction.max.timeout.ms", "900000"
    fits = _of_brokers(facts, setting, wanted, lambda value: int(value) >= longest, Status.PROBLEM) or _of_brokers(
        facts, setting, wanted, lambda value: int(value) >= rewind.TIMEOUT * 1000, Status.WARNING
    )
    # A dead worker's transaction is aborted at the first look behind its timeout.
    swept = _of_brokers(
        facts, "transaction.abort.timed.out.transaction.cleanup.interval.ms", "10000", lambda value: int(value) <= 10_000, Status.WARNING
    )
    why = "a dead worker's transaction stalls readers"
    return _broker_finding(
        facts, "transaction timeouts", why, fits + swept, f"brokers allow {longest / 1000:g} s, and a rewind's {rewind.TIMEOUT:g} s"
    )


def expiry(facts: Facts) -> Finding:
    def lasting(unit: float, least: float) -> Callable[[str], bool]:
        return lambda value: float(value) * unit >= least

    defects = []
    for setting, unit, week in (("offsets.retention.minutes", 60.0, "10080"), ("transactional.id.expiration.ms", 0.001, "604800000")):
        defects += _of_brokers(facts, setting, week, lasting(unit, DAY), Status.PROBLEM) or _of_brokers(
            facts, setting, week, lasting(unit, WEEK), Status.WARNING
        )
    return _broker_finding(facts, "expiry", "workers that were down must find their place", defects, "offsets and ids last a week or more")


def sessions(facts: Facts) -> Finding:
    session = int(pipeline.Options.session_timeout * 1000)
    least = _of_brokers(facts, "group.min.session.timeout.ms", "6000", lambda value: int(value) <= session, Status.PROBLEM)
    most = _of_brokers(facts, "group.max.session.timeout.ms", "1800000", lambda value: int(value) >= session, Status.PROBLEM)
    return _broker_finding(facts, "session timeouts", "workers cannot join otherwise", least + most, f"brokers allow {session / 1000:g} s")


def auto_create(facts: Facts) -> Finding:
    defects = _of_brokers(facts, "auto.create.topics.enable", "false", lambda value: value == "false", Status.WARNING)
    return _broker_finding(facts, "topics made by accident", "a deleted topic comes back with wrong settings", defects, "off")


def clock(facts: Facts) -> Finding:
    """Only what reading can tell: the broker's clock is not before the append time of the newest frame."""
    check, why = "clock", "stores and writers go by this machine's time"
    topic = facts.topics.get(facts.space.frames_topic)
    if facts.newest_frame is None or topic is None or topic.config.get("message.timestamp.type") != "LogAppendTime":
        return Finding(check, Status.SKIPPED, "no frame whose append time tells the broker's time; nothing is written to learn it", why)
    ahead = facts.newest_frame - facts.now
    if ahead > CLOCKS_APART:
        found = f"this machine is {_text(ahead)} or more behind the broker"
        return Finding(check, Status.WARNING, found, why, ("timedatectl set-ntp true",))
    if -ahead > CLOCKS_APART:
        found = f"the newest frame is {_text(-ahead)} old, too old to tell; nothing is written to learn more"
        return Finding(check, Status.SKIPPED, found, why)
    return Finding(
        check, Status.OK, f"not behind the broker's newest frame, and at most {_text(max(0.0, -ahead))} ahead of the broker", why
    )


def fold_behind(facts: Facts) -> Finding:
    return _behind(facts, "fold", f"crossrep fold {facts.space.name} --name ANOTHER")


def infer_behind(facts: Facts) -> Finding:
    return _behind(facts, "infer", f"crossrep infer {facts.space.name} --model DIR --name ANOTHER")


def frame_behind(facts: Facts) -> Finding:
    return _behind(facts, "frame", f"crossrep frame {facts.space.name} --name ANOTHER")


def fold_workers(facts: Facts) -> Finding:
    return _workers(facts, "fold", "folded", f"crossrep fold {facts.space.name} --name NAME", unused=None)


def infer_workers(facts: Facts) -> Finding:
    frame = facts.groups["frame"]
    elsewhere = facts.newest_frame is not None or frame.members or frame.used
    unused = "not used: frames come from elsewhere" if elsewhere else None
    return _workers(facts, "infer", "inferred", f"crossrep infer {facts.space.name} --model DIR --name NAME", unused)


def frame_workers(facts: Facts) -> Finding:
    unused = f"not used: {facts.space.inference_topic} was never read"
    return _workers(facts, "frame", "framed", f"crossrep frame {facts.space.name} --name NAME", unused)


CHECKS: tuple[Callable[[Facts], Finding], ...] = (
    topics_fit,
    replication,
    min_insync_replicas,
    replicas_now,
    unclean_election,
    as_planned,
    retention,
    fold_behind,
    infer_behind,
    frame_behind,
    compaction,
    segments,
    message_sizes,
    transactions,
    expiry,
    sessions,
    auto_create,
    clock,
    fold_workers,
    infer_workers,
    frame_workers,
)


def examine(facts: Facts) -> list[Finding]:
    """What every check says, in their order."""
    return [check(facts) for check in CHECKS]


def reassignment(facts: Facts) -> dict[str, Any]:
    """Replicas for kafka-reassign-partitions.sh: those there are and more, up to three, on the next brokers. Racks are not known."""
    brokers = sorted(facts.brokers)
    partitions = []
    for name, topic in facts.topics.items():
        for number, replicas in topic.partitions.items():
            others = [id for id in brokers[number % len(brokers) :] + brokers[: number % len(brokers)] if id not in replicas.all]
            more = others[: max(0, REPLICAS - len(replicas.all))]
            if more:
                partitions.append({"topic": name, "partition": number, "replicas": [*replicas.all, *more]})
    return {"version": 1, "partitions": partitions}


_COLOURS = {Status.OK: "green", Status.WARNING: "yellow", Status.PROBLEM: "red", Status.SKIPPED: "dim"}


def table(findings: list[Finding]) -> Table:
    """Findings as people read them; the commands that mend are printed apart, for a table would break them."""
    rows = Table("check", "", "found", "why it matters", box=None)
    for finding in findings:
        rows.add_row(finding.check, f"[{_COLOURS[finding.status]}]{finding.status}[/]", finding.found.replace("[", "\\["), finding.why)
    return rows


def _finding(check: str, why: str, defects: list[Defect], good: str) -> Finding:
    if not defects:
        return Finding(check, Status.OK, good, why)
    status = Status.PROBLEM if any(defect.status is Status.PROBLEM for defect in defects) else Status.WARNING
    found = "\n".join(dict.fromkeys(defect.found for defect in defects))
    return Finding(check, status, found, why, tuple(dict.fromkeys(defect.fix for defect in defects)))


def _broker_finding(facts: Facts, check: str, why: str, defects: list[Defect], good: str) -> Finding:
    if facts.unreadable is not None:
        return Finding(check, Status.SKIPPED, facts.unreadable, why)
    return _finding(check, why, defects, good)


def _of_brokers(facts: Facts, setting: str, wanted: str, holds: Callable[[str], bool], status: Status) -> list[Defect]:
    """A defect if the setting does not hold on every broker that tells it."""
    wrong = {id: settings[setting] for id, settings in facts.brokers.items() if setting in settings and not holds(settings[setting].value)}
    if not wrong:
        return []
    values = ", ".join(dict.fromkeys(found.value for found in wrong.values()))
    fix = f"{setting}={wanted} in server.properties of every broker, then restart them one by one"
    if all(found.dynamic for found in wrong.values()):
        fix = (
            f"kafka-configs.sh --bootstrap-server {facts.bootstrap} --alter --entity-type brokers --entity-default "
            f"--add-config {setting}={wanted}"
        )
    return [Defect(status, f"{setting}={values} on broker {', '.join(map(str, wrong))}", fix)]


Judge = Callable[[str, TopicFacts], Iterable[tuple[Status, str, str]]]  # what is wrong with a topic: status, found, the setting to set


def _of_topics(facts: Facts, which: Mapping[str, TopicFacts], judge: Judge) -> list[Defect]:
    """Defects, one for all topics that have the same."""
    wrong: dict[tuple[Status, str, str], list[str]] = {}
    for name, topic in which.items():
        for defect in judge(name, topic):
            wrong.setdefault(defect, []).append(name)
    return [Defect(status, f"{found}: {_names(names)}", _alter(facts, names, change)) for (status, found, change), names in wrong.items()]


def _of_planned(facts: Facts, judge: Judge) -> list[Defect]:
    return _of_topics(facts, {topic.name: found for topic, found in facts.own}, judge)


def _plan_of(facts: Facts, name: str) -> dict[str, str]:
    return next(topic.config for topic in facts.planned if topic.name == name)


def _alter(facts: Facts, names: list[str], change: str) -> str:
    command = f"kafka-configs.sh --bootstrap-server {facts.bootstrap} --alter --topic {{}} --add-config {change}"
    if len(names) == 1:
        return command.format(names[0])
    return f"for topic in {' '.join(names)}; do {command.format('$topic')}; done"


def _behind(facts: Facts, role: str, worker: str) -> Finding:
    """What a group has yet to read, against what retention will still keep of it."""
    group = facts.groups[role]
    check, why = f"retention against {role}", f"{role} refuses to go on over a gap"
    if group.unreadable is not None:
        return Finding(check, Status.SKIPPED, group.unreadable, why)
    if role != "fold" and not group.used:
        return Finding(check, Status.OK, "not used", why)
    defects = []
    late: dict[tuple[Status, str], list[tuple[float, str]]] = {}
    ages = [0.0]
    for part in group.behind:
        place = f"{part.topic}[{part.partition}]"
        # Retention may take the marker of the last transaction, which nobody reads.
        if part.first > part.position and not (part.first == part.end == part.position + 1):
            found = f"{place}: offsets {part.position} to {part.first} were deleted before they were read"
            accept = (
                f"kafka-consumer-groups.sh --bootstrap-server {facts.bootstrap} --group {group.name} --topic {part.topic}:{part.partition} "
                "--reset-offsets --to-earliest --execute"
            )
            defects.append(
                Defect(Status.PROBLEM, found, f"use a new space; or, to accept the gap, stop all {role} workers, then: {accept}")
            )
        if part.oldest is not None:
            age, kept = max(0.0, facts.now - part.oldest), _retention(facts.topics[part.topic])
            ages.append(age)
            if age >= kept / 2:
                late.setdefault((Status.PROBLEM if age >= 0.9 * kept else Status.WARNING, part.topic), []).append((age, place))
    for (status, topic), parts in late.items():
        age, place = max(parts)
        others = f" ({len(parts) - 1} more partitions are late)" if len(parts) > 1 else ""
        found = f"{place}: next to read is {_text(age)} old, retention {_text(_retention(facts.topics[topic]))}{others}"
        longer = max(int(4 * age * 1000), int(_plan_of(facts, topic).get("retention.ms", 0)))
        defects += [Defect(status, found, _alter(facts, [topic], f"retention.ms={longer}")), Defect(status, found, worker)]
    return _finding(check, why, defects, f"next to read is {_text(max(ages))} old at most" if ages[1:] else "nothing to read")


def _workers(facts: Facts, role: str, done: str, start: str, unused: str | None) -> Finding:
    """Who works. `unused` says why it may be that nobody does and never did."""
    group, check, why = facts.groups[role], f"{role} workers", f"without them nothing is {done}"
    if group.unreadable is not None:
        return Finding(check, Status.SKIPPED, group.unreadable, why)
    if not group.members:
        if unused is not None and not group.used:
            return Finding(check, Status.OK, unused, why)
        return Finding(check, Status.WARNING, f"none; {_lag(group)}", why, (start,))
    partitions = len(group.behind)
    held = ", ".join(f"{name} ({parts})" for name, parts in sorted(group.members.items()))
    found = f"{len(group.members)} for {partitions} partitions: {held}; {_lag(group)}"
    idle = len(group.members) - partitions
    if idle > 0:
        spare = sorted(name for name, parts in group.members.items() if not parts) or sorted(group.members)
        return Finding(check, Status.WARNING, f"{found}; {idle} idle", why, (f"stop {idle} of them, such as {spare[-1]}",))
    return Finding(check, Status.OK, found, why)


def _lag(group: Group) -> str:
    lags = sorted(((part.lag, f"{part.topic}[{part.partition}]") for part in group.behind if part.lag), reverse=True)
    if not lags:
        return "lag 0"
    return f"lag {sum(lag for lag, _ in lags):,}: {_names([f'{place} {lag:,}' for lag, place in lags], 6)}"


def _replicas(topic: TopicFacts) -> int:
    return min(len(replicas.all) for replicas in topic.partitions.values())


def _least_in_sync(topic: TopicFacts, replicas: int) -> int:
    """min.insync.replicas as brokers take it: never more than there are replicas."""
    return min(int(topic.config["min.insync.replicas"]), replicas)


def _retention(topic: TopicFacts) -> float:
    """Seconds."""
    kept = int(topic.config["retention.ms"])
    return float("inf") if kept < 0 else kept / 1000


def _inverted(values: Mapping[str, int]) -> dict[int, list[str]]:
    names: dict[int, list[str]] = {}
    for name, value in sorted(values.items(), key=lambda item: item[1]):
        names.setdefault(value, []).append(name)
    return names


def _names(names: list[str], most: int = 3) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def _ms(milliseconds: str) -> str:
    return _text(int(milliseconds) / 1000)


def _text(seconds: float) -> str:
    for unit, size in (("d", DAY), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}" if seconds < 1e12 else "for ever"
    return f"{seconds:.3g} s"
