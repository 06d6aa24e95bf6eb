"""`crossrep doctor`: is the cluster set up as the guarantees assume, and are the workers keeping up?

Every check judges the facts of `cluster_facts.py` alone and names the command that mends what it found; `CHECKS` lists them all.
A *problem* loses data, stops workers or breaks a promise, now or at the next fault. A *warning* leaves less room than it should.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from rich.table import Table

from state import changelog
from streams.inference import pipeline
from streams.operations import rewind
from streams.operations.cluster_facts import Facts, Group
from streams.operations.doctor_findings import (
    DAY,
    OK,
    PROBLEM,
    REPLICAS,
    SKIPPED,
    WARNING,
    WEEK,
    Finding,
    Limit,
    Remark,
    Remarks,
    Status,
    beyond,
    listed,
    written,
)
from streams.operations.doctor_topics import (
    altered,
    as_planned,
    compaction,
    message_sizes,
    min_insync_replicas,
    replicas_now,
    replication,
    retention,
    segments,
    topics,
    topics_fit,
    unclean_election,
)

CLOCKS_APART = 60.0  # seconds
SWEPT = 10.0  # seconds, Kafka's default: how often brokers abort what has timed out
ROLES = {"fold": "folded", "infer": "inferred", "frame": "framed"}  # worker -> what it does
LONGEST = max(changelog.TRANSACTION_TIMEOUT, pipeline.TRANSACTION_TIMEOUT)  # seconds


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
                f"{place}: readers wait at {part.stable} for {written(age)}, transactions end after {LONGEST:g} s",
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
        yield Remark(WARNING, f"this machine is {written(ahead)} or more behind the broker", "timedatectl set-ntp true")
    elif -ahead > CLOCKS_APART:
        yield Remark(SKIPPED, f"the newest frame is {written(-ahead)} old, too old to tell; nothing is written to learn more")
    else:
        yield Remark(OK, f"not behind the broker's newest frame, and at most {written(max(0.0, -ahead))} ahead of the broker")


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
        found = f"{place}: next to read is {written(age)} old, retention {written(facts.topics[topic].retention)}{others}"
        planned = next(planned.config for planned in facts.planned if planned.name == topic)
        longer = max(int(4 * age * 1000), int(planned.get("retention.ms", 0)))
        yield Remark(status, found, altered(facts, [topic], f"retention.ms={longer}"))
        yield Remark(status, found, _start(facts, role, "ANOTHER"))
    yield Remark(OK, f"next to read is {written(max(ages))} old at most" if ages else "nothing to read")


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


def _start(facts: Facts, role: str, name: str) -> str:
    return f"crossrep {role} {facts.space.name} {'--model DIR ' if role == 'infer' else ''}--name {name}"


def _lag(group: Group) -> str:
    lags = sorted(((part.lag, part.place) for part in group.behind if part.lag), reverse=True)
    if not lags:
        return "lag 0"
    return f"lag {sum(lag for lag, _ in lags):,}: {listed([f'{place} {lag:,}' for lag, place in lags], 6)}"
