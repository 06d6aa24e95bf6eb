"""The doctor's checks of topics: does each have the settings it was planned with, and its replicas?"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from streams.operations.cluster_facts import INTERNAL, Facts, TopicFacts
from streams.operations.doctor_findings import (
    DAY,
    OK,
    PROBLEM,
    REPLICAS,
    WARNING,
    WEEK,
    Limit,
    Remark,
    Remarks,
    Status,
    beyond,
    listed,
    written,
)
from streams.topics import Topic

BATCH = 1 << 20  # bytes, the producers' batch.size: brokers limit batches, not records
NEVER = 2**63 - 1  # Kafka's default of max.compaction.lag.ms
Changes = Iterator[tuple[Status, str, str]]  # what is wrong with a topic: status, found, the setting to set


def topics(facts: Facts, good: str, judge: Callable[[Facts, Topic, TopicFacts], Changes]) -> Remarks:
    """Judge every topic there is, Kafka's own among them (they have no plan); one remark for all topics that have the same."""
    yield Remark(OK, good)
    plans = {topic.name: topic for topic in facts.planned}
    wrong: dict[tuple[Status, str, str], list[str]] = {}
    for name, found in facts.topics.items():
        for change in judge(facts, plans.get(name) or Topic(name, 0, {}, shared=True), found):
            wrong.setdefault(change, []).append(name)
    for (status, what, setting), names in wrong.items():
        yield Remark(status, f"{what}: {listed(names, 3)}", altered(facts, names, setting))


def topics_fit(facts: Facts) -> Remarks:
    yield Remark(OK, f"{len(facts.planned)} topics, published")
    if facts.misfit is not None:
        yield Remark(PROBLEM, facts.misfit, f"crossrep topics check {facts.space.name}")


def replication(facts: Facts) -> Remarks:
    yield Remark(OK, f"{REPLICAS} or more everywhere")
    status = PROBLEM if facts.production else WARNING
    plan = (
        f"crossrep doctor {facts.space.name} --bootstrap {facts.bootstrap} --reassignment replicas.json; kafka-reassign-partitions.sh "
        f"--bootstrap-server {facts.bootstrap} --reassignment-json-file replicas.json --execute"
    )
    if len(facts.brokers) < REPLICAS:
        plan = f"run {REPLICAS} brokers (there are {len(facts.brokers)}), then: {plan}"
    for number in range(REPLICAS):
        if few := [name for name, topic in facts.topics.items() if topic.replicas == number]:
            yield Remark(status, f"{number} of {REPLICAS} replicas: {listed(few, 3)}", plan)
    for name, setting in zip(INTERNAL, ("offsets.topic.replication.factor", "transaction.state.log.replication.factor"), strict=True):
        if name not in facts.topics:  # it is made at its first use, with these
            yield from beyond(facts, Limit(status, setting, str(REPLICAS), least=REPLICAS))


def min_insync_replicas(facts: Facts) -> Remarks:
    def judge(facts: Facts, topic: Topic, found: TopicFacts) -> Changes:
        replicas = found.replicas  # a single one can have no second copy: that is for `replication` to say
        least = found.least_in_sync(replicas)
        if least < 2 <= replicas:
            yield PROBLEM, f"{least} of {replicas} replicas", "min.insync.replicas=2"
        elif least == replicas >= REPLICAS:
            yield WARNING, f"{least} of {replicas} replicas: one broker down stops writing", f"min.insync.replicas={replicas - 1}"

    yield from topics(facts, "2 or more wherever there are copies", judge)
    if INTERNAL[1] not in facts.topics:
        yield from beyond(facts, Limit(PROBLEM, "transaction.state.log.min.isr", "2", least=2, several=True))


def replicas_now(facts: Facts) -> Remarks:
    yield Remark(OK, "all in sync")
    missing: dict[tuple[Status, str, str], list[str]] = {}
    absent: set[int] = set()
    for name, topic in facts.topics.items():
        for number, replicas in topic.partitions.items():
            gone = set(replicas.all) - set(replicas.in_sync)
            if replicas.leader is None:
                kind = (PROBLEM, "without a leader", "unavailable")
            elif len(replicas.in_sync) < topic.least_in_sync(len(replicas.all)):
                kind = (PROBLEM, "with fewer than min.insync.replicas in sync", "unavailable")
            elif gone:
                kind = (WARNING, "under-replicated", "under-replicated")
            else:
                continue
            absent |= gone
            missing.setdefault(kind, []).append(f"{name}[{number}]")
    for (status, what, which), places in missing.items():
        look = f"kafka-topics.sh --bootstrap-server {facts.bootstrap} --describe --{which}-partitions"
        fix = f"start broker {listed(sorted(absent)) or 'in question'} again; look: {look}"
        yield Remark(status, f"{len(places)} partitions {what}: {listed(places, 3)}", fix)


def unclean_election(facts: Facts) -> Remarks:
    setting = "unclean.leader.election.enable"
    status = PROBLEM if facts.production else WARNING

    def judge(facts: Facts, topic: Topic, found: TopicFacts) -> Changes:
        if found.config.get(setting) == "true":
            yield status, f"{setting}=true", f"{setting}=false"

    # A topic that has it from the brokers is mended there.
    yield from list(beyond(facts, Limit(status, setting, "false"))) or topics(facts, "off", judge)


ELSEWHERE = (  # planned settings that other checks judge
    *("retention.ms", "retention.bytes", "delete.retention.ms", "min.cleanable.dirty.ratio", "max.compaction.lag.ms"),
    *("segment.ms", "segment.bytes", "max.message.bytes", "min.insync.replicas"),
)


def as_planned(facts: Facts, topic: Topic, found: TopicFacts) -> Changes:
    for key, wanted in topic.config.items():
        if key not in ELSEWHERE and found.config.get(key) != wanted:
            status = PROBLEM if key in ("cleanup.policy", "message.timestamp.type") else WARNING
            yield status, f"{key}={found.config.get(key)}", f"{key}={wanted}"


def retention(facts: Facts, topic: Topic, found: TopicFacts) -> Changes:
    if "retention.ms" not in topic.config:
        return
    kept, wanted = found.retention, float(topic.config["retention.ms"]) / 1000
    if kept < wanted:
        status = PROBLEM if topic.name == facts.space.frames_topic and kept < DAY else WARNING
        yield status, f"retention.ms keeps {written(kept)} of planned {written(wanted)}", f"retention.ms={topic.config['retention.ms']}"
    if int(found.config["retention.bytes"]) >= 0:
        yield WARNING, f"retention.bytes={found.config['retention.bytes']} may delete sooner", "retention.bytes=-1"


def compaction(facts: Facts, topic: Topic, found: TopicFacts) -> Changes:
    plan, config = topic.config, found.config
    if (key := "delete.retention.ms") in plan and int(config[key]) < int(plan[key]):
        yield PROBLEM, f"{key} is {written(int(config[key]) / 1000)}, stores trust {written(int(plan[key]) / 1000)}", f"{key}={plan[key]}"
    if (key := "max.compaction.lag.ms") in plan and (lag := int(config[key])) > int(plan[key]):
        never = (PROBLEM, f"{key} not set: an erased key may stay for ever", f"{key}={plan[key]}")
        longer = (WARNING, f"{key} {written(lag / 1000)} instead of {written(int(plan[key]) / 1000)}", f"{key}={plan[key]}")
        yield never if lag == NEVER else longer
    if (key := "min.cleanable.dirty.ratio") in plan and float(config[key]) > float(plan[key]):
        yield WARNING, f"{key}={config[key]}: restores read up to that share of old records", f"{key}={plan[key]}"


def segments(facts: Facts, topic: Topic, found: TopicFacts) -> Changes:
    if topic.name in INTERNAL:
        return
    rolled, wanted = int(found.config["segment.ms"]), int(topic.config.get("segment.ms", 2 * WEEK * 1000))
    if "compact" in found.config["cleanup.policy"]:  # Kafka rolls these by the shorter of the two
        rolled = min(rolled, int(found.config["max.compaction.lag.ms"]))
    if rolled > wanted:
        yield WARNING, f"rolled after {written(rolled / 1000)}", f"segment.ms={min(wanted, int(WEEK * 1000))}"
    needed, size = max(BATCH, int(topic.config.get("max.message.bytes", 0))), int(found.config["segment.bytes"])
    if size < needed:
        yield PROBLEM, f"segment.bytes={size} refuses batches up to {needed}", f"segment.bytes={1 << 30}"


def message_sizes(facts: Facts) -> Remarks:
    own = {topic.name: int(topic.config.get("max.message.bytes", BATCH)) for topic in facts.planned if not topic.shared}
    most = max(own.values())

    def judge(facts: Facts, topic: Topic, found: TopicFacts) -> Changes:
        size = int(found.config["max.message.bytes"])  # a broker's message.max.bytes holds only where a topic has none, and is in it
        if size < own.get(topic.name, 0):
            yield PROBLEM, f"max.message.bytes={size}, needed {own[topic.name]}", f"max.message.bytes={own[topic.name]}"

    yield from topics(facts, f"up to {most >> 20} MiB", judge)
    yield from beyond(facts, Limit(WARNING, "replica.fetch.max.bytes", str(most), least=most, several=True))


def altered(facts: Facts, names: list[str], change: str) -> str:
    command = f"kafka-configs.sh --bootstrap-server {facts.bootstrap} --alter --topic {{}} --add-config {change}"
    if len(names) == 1:
        return command.format(names[0])
    return f"for topic in {' '.join(names)}; do {command.format('$topic')}; done"
