"""`crossrep doctor`: is the cluster set up as the guarantees assume, and are the workers keeping up?

Every check judges the facts of `streams.cluster_facts` alone and names the command that mends what it found; `CHECKS` lists them all.
A *problem* loses data, stops workers or breaks a promise, now or at the next fault. A *warning* leaves less room than it should.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Any

from rich.table import Table

from state import changelog
from streams import pipeline, rewind
from streams.cluster_facts import INTERNAL, Facts, Group, TopicFacts
from streams.topics import Topic

REPLICAS = 3
BATCH = 1 << 20  # bytes, the producers' batch.size: brokers limit batches, not records
DAY, WEEK = 86_400.0, 7 * 86_400.0  # seconds
NEVER = 2**63 - 1  # Kafka's default of max.compaction.lag.ms
CLOCKS_APART = 60.0  # seconds
SWEPT = 10.0  # seconds, Kafka's default: how often brokers abort what has timed out
ROLES = {"fold": "folded", "infer": "inferred", "frame": "framed"}  # worker -> what it does
LONGEST = max(changelog.TRANSACTION_TIMEOUT, pipeline.TRANSACTION_TIMEOUT)  # seconds


class Status(StrEnum):
    """From good to bad."""

    OK = "ok"
    SKIPPED = "skipped"  # could not be learned
    WARNING = "warning"
    PROBLEM = "problem"


OK, SKIPPED, WARNING, PROBLEM = Status


@dataclass(frozen=True)
class Remark:
    status: Status
    found: str
    fix: str = ""


@dataclass(frozen=True)
class Finding:
    """What one check says."""

    check: str
    status: Status
    found: str
    why: str
    fixes: tuple[str, ...] = ()


Remarks = Iterator[Remark]


def examine(facts: Facts) -> list[Finding]:
    """What every check says, in their order: the worst status of its remarks, and all that is not good."""
    findings = []
    for name, why, judge in CHECKS:
        remarks = list(judge(facts))
        said = [remark for remark in remarks if remark.status is not OK] or remarks
        status = max((remark.status for remark in said), key=list(Status).index)
        fixes = tuple(dict.fromkeys(remark.fix for remark in said if remark.fix))
        findings.append(Finding(name, status, "\n".join(dict.fromkeys(remark.found for remark in said)), why, fixes))
    return findings


# --- brokers' settings ---


@dataclass(frozen=True)
class Limit:
    """A broker's setting must be from `least` to `most`, or "false" where that is what it is set to; `status` if it is not."""

    status: Status
    setting: str
    to: str  # what to set it to
    least: float = 0
    most: float = float("inf")
    several: bool = False  # a cluster of one broker need not care

    def holds(self, value: str) -> bool:
        return value == "false" if self.to == "false" else self.least <= float(value) <= self.most


def beyond(facts: Facts, *limits: Limit) -> Remarks:
    """Of each setting the first limit that does not hold on every broker that tells it."""
    done: set[str] = set()
    for limit in limits:
        name = limit.setting
        wrong = {id: told[name] for id, told in facts.brokers.items() if name in told and not limit.holds(told[name].value)}
        if not wrong or name in done or (limit.several and not facts.production):
            continue
        done.add(name)
        fix = f"{name}={limit.to} in server.properties of every broker, then restart them one by one"
        if all(found.dynamic for found in wrong.values()):
            change = f"--alter --entity-type brokers --entity-default --add-config {name}={limit.to}"
            fix = f"kafka-configs.sh --bootstrap-server {facts.bootstrap} {change}"
        values = ", ".join(dict.fromkeys(found.value for found in wrong.values()))
        yield Remark(limit.status, f"{name}={values} on broker {_list(wrong)}", fix)


def brokers(facts: Facts, good: str, limits: tuple[Limit, ...]) -> Remarks:
    if facts.unreadable is not None:
        yield Remark(SKIPPED, facts.unreadable)
        return
    yield Remark(OK, good)
    yield from beyond(facts, *limits)


ALLOWED = f"brokers allow {LONGEST:g} s, and a rewind's {rewind.TIMEOUT:g} s"
TRANSACTIONS = (
    Limit(PROBLEM, "transaction.max.timeout.ms", "900000", least=LONGEST * 1000),
    Limit(WARNING, "transaction.max.timeout.ms", "900000", least=rewind.TIMEOUT * 1000),
    # A dead worker's transaction is aborted at the first look behind its timeout.
    Limit(WARNING, "transaction.abort.timed.out.transaction.cleanup.interval.ms", "10000", most=SWEPT * 1000),
    # A producer whose transaction's marker is under way to a broker that hangs cannot begin another one for so long.
    Limit(WARNING, "request.timeout.ms", "10000", most=10_000, several=True),
)
EXPIRY = (
    Limit(PROBLEM, "offsets.retention.minutes", "10080", least=DAY / 60),
    Limit(WARNING, "offsets.retention.minutes", "10080", least=WEEK / 60),
    Limit(PROBLEM, "transactional.id.expiration.ms", "604800000", least=DAY * 1000),
    Limit(WARNING, "transactional.id.expiration.ms", "604800000", least=WEEK * 1000),
)
SESSION = pipeline.Options.session_timeout  # seconds
SESSIONS = (
    Limit(PROBLEM, "group.min.session.timeout.ms", "6000", most=SESSION * 1000),
    Limit(PROBLEM, "group.max.session.timeout.ms", "1800000", least=SESSION * 1000),
)
AUTO_CREATE = (Limit(WARNING, "auto.create.topics.enable", "false"),)


# --- topics ---

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
        yield Remark(status, f"{what}: {_list(names, 3)}", _alter(facts, names, setting))


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
            yield Remark(status, f"{number} of {REPLICAS} replicas: {_list(few, 3)}", plan)
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
        fix = f"start broker {_list(sorted(absent)) or 'in question'} again; look: {look}"
        yield Remark(status, f"{len(places)} partitions {what}: {_list(places, 3)}", fix)


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
        yield status, f"retention.ms keeps {_text(kept)} of planned {_text(wanted)}", f"retention.ms={topic.config['retention.ms']}"
    if int(found.config["retention.bytes"]) >= 0:
        yield WARNING, f"retention.bytes={found.config['retention.bytes']} may delete sooner", "retention.bytes=-1"


def compaction(facts: Facts, topic: Topic, found: TopicFacts) -> Changes:
    plan, config = topic.config, found.config
    if (key := "delete.retention.ms") in plan and int(config[key]) < int(plan[key]):
        yield PROBLEM, f"{key} is {_text(int(config[key]) / 1000)}, stores trust {_text(int(plan[key]) / 1000)}", f"{key}={plan[key]}"
    if (key := "max.compaction.lag.ms") in plan and (lag := int(config[key])) > int(plan[key]):
        never = (PROBLEM, f"{key} not set: an erased key may stay for ever", f"{key}={plan[key]}")
        longer = (WARNING, f"{key} {_text(lag / 1000)} instead of {_text(int(plan[key]) / 1000)}", f"{key}={plan[key]}")
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
        yield WARNING, f"rolled after {_text(rolled / 1000)}", f"segment.ms={min(wanted, int(WEEK * 1000))}"
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


# --- what goes on ---


def hanging(facts: Facts) -> Remarks:
    """Has a transaction on the frames topic outlived every timeout? Only somebody who looks can tell a lost one from a long one.

    How old it is, is the broker's clock against this machine's: a problem only where it is more than clocks differ.
    """
    yield Remark(OK, f"{len(facts.open)} partitions with an open transaction, none for long" if facts.open else "none open")
    for part in facts.open:
        place = f"{facts.space.frames_topic}[{part.partition}]"
        if part.since is None:
            yield Remark(SKIPPED, f"{place}: readers wait at {part.stable}; since when cannot be learned")
            continue
        age = facts.now - part.since
        if age > LONGEST + SWEPT:
            tool = f"kafka-transactions.sh --bootstrap-server {facts.bootstrap}"
            where = f"--topic {facts.space.frames_topic} --partition {part.partition}"
            yield Remark(
                PROBLEM if age > LONGEST + SWEPT + CLOCKS_APART else WARNING,
                f"{place}: readers wait at {part.stable} for {_text(age)}, transactions end after {LONGEST:g} s",
                f"look whose it is: {tool} describe-producers {where}; if that is gone: {tool} abort {where} --start-offset {part.stable}",
            )


def clock(facts: Facts) -> Remarks:
    """Only what reading can tell: the broker's clock is not before the append time of the newest frame."""
    topic = facts.topics.get(facts.space.frames_topic)
    if facts.newest_frame is None or topic is None or topic.config.get("message.timestamp.type") != "LogAppendTime":
        yield Remark(SKIPPED, "no frame whose append time tells the broker's time; nothing is written to learn it")
        return
    ahead = facts.newest_frame - facts.now
    if ahead > CLOCKS_APART:
        yield Remark(WARNING, f"this machine is {_text(ahead)} or more behind the broker", "timedatectl set-ntp true")
    elif -ahead > CLOCKS_APART:
        yield Remark(SKIPPED, f"the newest frame is {_text(-ahead)} old, too old to tell; nothing is written to learn more")
    else:
        yield Remark(OK, f"not behind the broker's newest frame, and at most {_text(max(0.0, -ahead))} ahead of the broker")


def behind(facts: Facts, role: str) -> Remarks:
    """What a group has yet to read, against what retention will still keep of it."""
    group = facts.groups[role]
    if group.unreadable is not None or not (role == "fold" or group.used):
        yield Remark(SKIPPED, group.unreadable) if group.unreadable is not None else Remark(OK, "not used")
        return
    late: dict[tuple[Status, str], list[tuple[float, str]]] = {}
    ages = []
    for part in group.behind:
        if part.lost:
            accept = (
                f"kafka-consumer-groups.sh --bootstrap-server {facts.bootstrap} --group {group.name} --topic {part.topic}:{part.partition} "
                "--reset-offsets --to-earliest --execute"
            )
            found = f"{part.place}: offsets {part.position} to {part.first} were deleted before they were read"
            yield Remark(PROBLEM, found, f"use a new space; or, to accept the gap, stop all {role} workers, then: {accept}")
        if part.oldest is not None:
            age, kept = max(0.0, facts.now - part.oldest), facts.topics[part.topic].retention
            ages.append(age)
            if age >= kept / 2:
                late.setdefault((PROBLEM if age >= 0.9 * kept else WARNING, part.topic), []).append((age, part.place))
    for (status, topic), parts in late.items():
        age, place = max(parts)
        others = f" ({len(parts) - 1} more partitions are late)" if len(parts) > 1 else ""
        found = f"{place}: next to read is {_text(age)} old, retention {_text(facts.topics[topic].retention)}{others}"
        planned = next(planned.config for planned in facts.planned if planned.name == topic)
        longer = max(int(4 * age * 1000), int(planned.get("retention.ms", 0)))
        yield Remark(status, found, _alter(facts, [topic], f"retention.ms={longer}"))
        yield Remark(status, found, _start(facts, role, "ANOTHER"))
    yield Remark(OK, f"next to read is {_text(max(ages))} old at most" if ages else "nothing to read")


def workers(facts: Facts, role: str) -> Remarks:
    """Who works? That nobody does is good only where nobody ever did, and nobody has to."""
    group, framers = facts.groups[role], facts.groups["frame"]
    if group.unreadable is not None:
        yield Remark(SKIPPED, group.unreadable)
    elif group.members:
        partitions = len(group.behind)
        held = ", ".join(f"{name} ({parts})" for name, parts in sorted(group.members.items()))
        found = f"{len(group.members)} for {partitions} partitions: {held}; {_lag(group)}"
        yield Remark(OK, found)
        if (idle := len(group.members) - partitions) > 0:
            spare = sorted(name for name, parts in group.members.items() if not parts) or sorted(group.members)
            yield Remark(WARNING, f"{found}; {idle} idle", f"stop {idle} of them, such as {spare[-1]}")
    elif role == "frame" and not group.used:
        yield Remark(OK, f"not used: {facts.space.inference_topic} was never read")
    elif role == "infer" and not group.used and (facts.newest_frame is not None or framers.members or framers.used):
        yield Remark(OK, "not used: frames come from elsewhere")
    else:
        yield Remark(WARNING, f"none; {_lag(group)}", _start(facts, role, "NAME"))


CHECKS: tuple[tuple[str, str, Callable[[Facts], Remarks]], ...] = (  # name, why it matters, judge
    ("topics fit", "workers do not start otherwise", topics_fit),
    ("replication", "one lost disk must lose nothing", replication),
    ("min.insync.replicas", "what is acknowledged must be on two disks", min_insync_replicas),
    ("replicas now", "the next fault stops or loses writes", replicas_now),
    ("unclean leader election", "it discards acknowledged records", unclean_election),
    ("topics' settings", "a wrong one deletes state or history", partial(topics, good="as planned", judge=as_planned)),
    ("retention", "what is deleted before it is read is lost", partial(topics, good="as planned, no limit of bytes", judge=retention)),
    *((f"retention against {role}", f"{role} refuses to go on over a gap", partial(behind, role=role)) for role in ROLES),
    ("compaction", "a store must see every deletion, and an erased key must go", partial(topics, good="as planned", judge=compaction)),
    ("segments", "the active one is neither compacted nor deleted", partial(topics, good="rolled within two weeks", judge=segments)),
    ("message sizes", "a commit that is too large fails for ever", message_sizes),
    ("transaction timeouts", "a dead worker's transaction stalls readers", partial(brokers, good=ALLOWED, limits=TRANSACTIONS)),
    ("hanging transactions", "every reader waits until it ends", hanging),
    ("expiry", "workers that were down must find their place", partial(brokers, good="offsets and ids last a week or more", limits=EXPIRY)),
    ("session timeouts", "workers cannot join otherwise", partial(brokers, good=f"brokers allow {SESSION:g} s", limits=SESSIONS)),
    ("topics made by accident", "a deleted topic comes back with wrong settings", partial(brokers, good="off", limits=AUTO_CREATE)),
    ("clock", "stores and writers go by this machine's time", clock),
    *((f"{role} workers", f"without them nothing is {done}", partial(workers, role=role)) for role, done in ROLES.items()),
)


def reassignment(facts: Facts) -> dict[str, Any]:
    """Replicas for kafka-reassign-partitions.sh: those there are and more, up to three, on the next brokers. Racks are not known."""
    ids = sorted(facts.brokers)
    partitions = []
    for name, topic in facts.topics.items():
        for number, replicas in topic.partitions.items():
            turn = number % len(ids)
            more = [id for id in ids[turn:] + ids[:turn] if id not in replicas.all][: max(0, REPLICAS - len(replicas.all))]
            if more:
                partitions.append({"topic": name, "partition": number, "replicas": [*replicas.all, *more]})
    return {"version": 1, "partitions": partitions}


def table(findings: list[Finding]) -> Table:
    """Findings as people read them; the commands that mend are printed apart, for a table would break them."""
    colours = {OK: "green", WARNING: "yellow", PROBLEM: "red", SKIPPED: "dim"}
    rows = Table("check", "", "found", "why it matters", box=None)
    for finding in findings:
        rows.add_row(finding.check, f"[{colours[finding.status]}]{finding.status}[/]", finding.found.replace("[", "\\["), finding.why)
    return rows


def _alter(facts: Facts, names: list[str], change: str) -> str:
    command = f"kafka-configs.sh --bootstrap-server {facts.bootstrap} --alter --topic {{}} --add-config {change}"
    if len(names) == 1:
        return command.format(names[0])
    return f"for topic in {' '.join(names)}; do {command.format('$topic')}; done"


def _start(facts: Facts, role: str, name: str) -> str:
    return f"crossrep {role} {facts.space.name} {'--model DIR ' if role == 'infer' else ''}--name {name}"


def _lag(group: Group) -> str:
    lags = sorted(((part.lag, part.place) for part in group.behind if part.lag), reverse=True)
    if not lags:
        return "lag 0"
    return f"lag {sum(lag for lag, _ in lags):,}: {_list([f'{place} {lag:,}' for lag, place in lags], 6)}"


def _list(things: Collection[object], most: int = 100) -> str:
    more = len(things) - most
    return ", ".join(str(thing) for thing in [*things][:most]) + (f" and {more} more" if more > 0 else "")


def _text(seconds: float) -> str:
    for unit, size in (("d", DAY), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}" if seconds < 1e12 else "for ever"
    return f"{seconds:.3g} s"
