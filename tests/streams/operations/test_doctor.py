"""The doctor: each check on facts alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

import streams.cli  # noqa: F401  adds the workers' commands
from crossrep import kafka
from crossrep.control.spaces import SPACES_TOPIC
from crossrep.spec import Space, fold_group
from streams import topics
from streams.inference.pipeline import Options
from streams.operations import doctor, doctor_topics
from streams.operations.cluster_facts import INTERNAL, Behind, Facts, Group, Open, Replicas, Setting, TopicFacts
from streams.operations.doctor_findings import Finding, Status
from streams.stateful import fold
from tests.cluster import SPEC

NOW = 1.7e9
SPACE = Space.parse(SPEC.format(name="s-1", partitions=2))
FRAMES, USERS, CLICKS = SPACE.frames_topic, SPACE.representations_topic("user"), SPACE.inputs.clicks
# Kafka's own defaults, save what a production cluster must change
TOPIC = {
    "cleanup.policy": "delete",
    "delete.retention.ms": "86400000",
    "max.compaction.lag.ms": str(doctor_topics.NEVER),
    "max.message.bytes": "1048588",
    "message.timestamp.type": "CreateTime",
    "min.cleanable.dirty.ratio": "0.5",
    "min.insync.replicas": "2",
    "retention.bytes": "-1",
    "retention.ms": "604800000",
    "segment.bytes": "1073741824",
    "segment.ms": "604800000",
    "unclean.leader.election.enable": "false",
}
BROKER = {
    "auto.create.topics.enable": Setting("false", False),
    "group.max.session.timeout.ms": Setting("1800000", False),
    "group.min.session.timeout.ms": Setting("6000", False),
    "offsets.retention.minutes": Setting("10080", False),
    "replica.fetch.max.bytes": Setting("8388608", False),
    "request.timeout.ms": Setting("10000", False),
    "transaction.abort.timed.out.transaction.cleanup.interval.ms": Setting("10000", False),
    "transaction.max.timeout.ms": Setting("900000", False),
    "transactional.id.expiration.ms": Setting("604800000", False),
    "unclean.leader.election.enable": Setting("false", True),
}


def healthy() -> Facts:
    """Three brokers, everything as planned, two fold workers that keep up."""
    planned = [*topics.plan(SPACE), *topics.CONTROL]
    three = Replicas((1, 2, 3), (1, 2, 3), 1)
    found = {topic.name: TopicFacts(dict.fromkeys(range(topic.partitions), three), TOPIC | topic.config) for topic in planned}
    found |= {name: TopicFacts({0: three}, TOPIC) for name in INTERNAL}
    behind = [Behind(FRAMES, n, 90, 0, 100, 10, NOW - 1) for n in range(2)]
    groups = {
        "fold": Group(fold_group(SPACE), {"w0": 1, "w1": 1}, True, behind),
        "infer": Group("infer.s-1"),
        "frame": Group("frame.s-1"),
    }
    return Facts(SPACE, "kafka:9092", planned, None, found, dict.fromkeys((1, 2, 3), BROKER), None, groups, [], NOW - 2, NOW, True)


def with_config(facts: Facts, topic: str, **config: str) -> Facts:
    changed = {key.replace("_", "."): value for key, value in config.items()}
    found = facts.topics[topic]
    return replace(facts, topics=facts.topics | {topic: replace(found, config=found.config | changed)})


def with_replicas(facts: Facts, topic: str, replicas: Replicas) -> Facts:
    found = facts.topics[topic]
    return replace(facts, topics=facts.topics | {topic: replace(found, partitions=found.partitions | {0: replicas})})


def with_broker(facts: Facts, **settings: str) -> Facts:
    changed = {key.replace("_", "."): value for key, value in settings.items()}
    second = BROKER | {key: replace(BROKER.get(key, Setting("", False)), value=value) for key, value in changed.items()}
    return replace(facts, brokers=facts.brokers | {2: second})


def with_group(facts: Facts, role: str, **changes: Any) -> Facts:
    return replace(facts, groups=facts.groups | {role: replace(facts.groups[role], **changes)})


def without(facts: Facts, *names: str) -> Facts:
    return replace(facts, topics={name: topic for name, topic in facts.topics.items() if name not in names})


def bad(facts: Facts) -> list[Finding]:
    return [finding for finding in doctor.examine(facts) if finding.status is not Status.OK]


def judged(check: str, facts: Facts) -> Finding:
    return next(finding for finding in doctor.examine(facts) if finding.check == check)


def test_a_good_cluster_has_nothing_to_mend() -> None:
    assert bad(healthy()) == []
    assert all(not finding.fixes for finding in doctor.examine(healthy()))


ONE = Replicas((1,), (1,), 1)
P, W, S = Status.PROBLEM, Status.WARNING, Status.SKIPPED
CASES: list[tuple[str, Callable[[Facts], Facts], Status, str, str]] = [
    ("topics fit", lambda f: replace(f, misfit="frames.s-1 is missing"), P, "is missing", "crossrep topics check s-1"),
    ("replication", lambda f: with_replicas(f, FRAMES, ONE), P, f"1 of 3 replicas: {FRAMES}", "kafka-reassign-partitions.sh"),
    ("replication", lambda f: with_replicas(f, INTERNAL[0], ONE), P, "__consumer_offsets", "--reassignment-json-file"),
    (
        "replication",
        lambda f: without(with_broker(f, transaction_state_log_replication_factor="1"), "__transaction_state"),
        P,
        "transaction.state.log.replication.factor=1 on broker 2",
        "transaction.state.log.replication.factor=3 in server.properties",
    ),
    ("min.insync.replicas", lambda f: with_config(f, USERS, min_insync_replicas="1"), P, "1 of 3", "--add-config min.insync.replicas=2"),
    ("min.insync.replicas", lambda f: with_config(f, USERS, min_insync_replicas="3"), W, "stops writing", "min.insync.replicas=2"),
    ("replicas now", lambda f: with_replicas(f, USERS, Replicas((1, 2, 3), (), None)), P, f"without a leader: {USERS}[0]", "1, 2, 3"),
    ("replicas now", lambda f: with_replicas(f, USERS, Replicas((1, 2, 3), (1,), 1)), P, "fewer than min.insync", "start broker 2, 3"),
    ("replicas now", lambda f: with_replicas(f, USERS, Replicas((1, 2, 3), (1, 3), 1)), W, "under-replicated", "start broker 2"),
    (
        "unclean leader election",
        lambda f: with_config(f, CLICKS, unclean_leader_election_enable="true"),
        P,
        CLICKS,
        f"--topic {CLICKS} --add-config unclean.leader.election.enable=false",
    ),
    (
        "unclean leader election",
        lambda f: with_broker(f, unclean_leader_election_enable="true"),
        P,
        "on broker 2",
        "--entity-type brokers --entity-default --add-config unclean.leader.election.enable=false",
    ),
    ("topics' settings", lambda f: with_config(f, FRAMES, cleanup_policy="compact"), P, "cleanup.policy=compact", "cleanup.policy=delete"),
    (
        "topics' settings",
        lambda f: with_config(f, CLICKS, message_timestamp_type="CreateTime"),
        P,
        f"message.timestamp.type=CreateTime: {CLICKS}",
        "message.timestamp.type=LogAppendTime",
    ),
    ("topics' settings", lambda f: with_config(f, SPACES_TOPIC, cleanup_policy="delete"), P, SPACES_TOPIC, "cleanup.policy=compact"),
    ("retention", lambda f: with_config(f, FRAMES, retention_ms="3600000"), P, "keeps 60 min of planned 7 d", "retention.ms=604800000"),
    ("retention", lambda f: with_config(f, FRAMES, retention_ms="172800000"), W, "keeps 2 d of planned 7 d", "retention.ms=604800000"),
    ("retention", lambda f: with_config(f, CLICKS, retention_bytes="1000"), W, "retention.bytes=1000", "retention.bytes=-1"),
    (
        "compaction",
        lambda f: with_config(f, USERS, delete_retention_ms="60000"),
        P,
        "delete.retention.ms is 60 s",
        f"delete.retention.ms={topics.TOMBSTONES_KEPT * 1000}",
    ),
    (
        "compaction",
        lambda f: with_config(f, USERS, max_compaction_lag_ms=str(doctor_topics.NEVER)),
        P,
        "not set",
        "max.compaction.lag.ms=86400000",
    ),
    ("compaction", lambda f: with_config(f, USERS, max_compaction_lag_ms="864000000"), W, "10 d instead of", "max.compaction.lag.ms="),
    ("compaction", lambda f: with_config(f, USERS, min_cleanable_dirty_ratio="0.9"), W, "0.9", "min.cleanable.dirty.ratio=0.3"),
    ("segments", lambda f: with_config(f, FRAMES, segment_ms=str(doctor_topics.NEVER)), W, "rolled after", "segment.ms=604800000"),
    ("segments", lambda f: with_config(f, FRAMES, segment_bytes="1048576"), P, "refuses batches up to 8388608", "segment.bytes="),
    ("message sizes", lambda f: with_config(f, FRAMES, max_message_bytes="1048588"), P, "needed 8388608", "max.message.bytes=8388608"),
    ("message sizes", lambda f: with_config(f, USERS, max_message_bytes="500000"), P, USERS, "max.message.bytes=1048576"),
    ("message sizes", lambda f: with_broker(f, replica_fetch_max_bytes="1048576"), W, "on broker 2", "in server.properties"),
    ("transaction timeouts", lambda f: with_broker(f, transaction_max_timeout_ms="9999"), P, "=9999", "transaction.max.timeout.ms=900000"),
    (
        "transaction timeouts",
        lambda f: with_broker(f, transaction_max_timeout_ms="60000"),
        W,
        "=60000",
        "transaction.max.timeout.ms=900000",
    ),
    (
        "transaction timeouts",
        lambda f: with_broker(f, transaction_abort_timed_out_transaction_cleanup_interval_ms="60000"),
        W,
        "=60000",
        "cleanup.interval.ms=10000 in server.properties",
    ),
    ("transaction timeouts", lambda f: with_broker(f, request_timeout_ms="30000"), W, "=30000 on broker 2", "request.timeout.ms=10000"),
    (
        "hanging transactions",
        lambda f: replace(f, open=[Open(0, 50, NOW - 1), Open(1, 60, NOW - 3600)]),
        P,
        f"{FRAMES}[1]: readers wait at 60 for 60 min",
        f"kafka-transactions.sh --bootstrap-server kafka:9092 abort --topic {FRAMES} --partition 1 --start-offset 60",
    ),
    ("hanging transactions", lambda f: replace(f, open=[Open(1, 60, NOW - 30)]), W, "for 30 s", "abort --topic"),
    ("hanging transactions", lambda f: replace(f, open=[Open(1, 60, None)]), S, "readers wait at 60; since when", ""),
    ("expiry", lambda f: with_broker(f, offsets_retention_minutes="60"), P, "=60 on broker 2", "offsets.retention.minutes=10080"),
    ("expiry", lambda f: with_broker(f, offsets_retention_minutes="1440"), W, "=1440 on broker 2", "offsets.retention.minutes=10080"),
    ("expiry", lambda f: with_broker(f, transactional_id_expiration_ms="90000000"), W, "=90000000", "expiration.ms=604800000"),
    ("session timeouts", lambda f: with_broker(f, group_min_session_timeout_ms="30000"), P, "min.session", "timeout.ms=6000"),
    ("session timeouts", lambda f: with_broker(f, group_max_session_timeout_ms="9000"), P, "max.session", "timeout.ms=1800000"),
    (
        "topics made by accident",
        lambda f: with_broker(f, auto_create_topics_enable="true"),
        W,
        "=true",
        "enable=false in server.properties",
    ),
    ("clock", lambda f: replace(f, newest_frame=NOW + 3600), W, "60 min or more behind", "timedatectl"),
    ("clock", lambda f: replace(f, newest_frame=NOW - 3600), S, "too old to tell", ""),
    ("fold workers", lambda f: with_group(f, "fold", members={}), W, f"none; lag 20: {FRAMES}[1] 10", "crossrep fold s-1"),
    (
        "fold workers",
        lambda f: with_group(f, "fold", members={"a": 1, "b": 0, "c": 1}),
        W,
        "3 for 2 partitions",
        "stop 1 of them, such as b",
    ),
    ("infer workers", lambda f: with_group(f, "infer", used=True), W, "none; lag 0", "crossrep infer s-1 --model DIR"),
    ("frame workers", lambda f: with_group(f, "frame", used=True), W, "none; lag 0", "crossrep frame s-1"),
]


@pytest.mark.parametrize(("check", "spoil", "status", "found", "fix"), CASES, ids=[f"{case[0]}-{case[3]}" for case in CASES])
def test_what_is_wrong_is_found_and_its_fix_named(
    check: str, spoil: Callable[[Facts], Facts], status: Status, found: str, fix: str
) -> None:
    (finding,) = bad(spoil(healthy()))
    assert (finding.check, finding.status) == (check, status)
    assert found in finding.found and fix in "\n".join(finding.fixes) and bool(finding.fixes) is bool(fix)


def late(seconds: float, **changes: Any) -> Facts:
    part = replace(Behind(FRAMES, 1, 90, 0, 100, 10, NOW - seconds), **changes)
    return with_group(healthy(), "fold", behind=[healthy().groups["fold"].behind[0], part])


def test_what_is_behind_is_held_against_retention() -> None:
    week = 7 * 86_400
    for share, status in ((0.49, Status.OK), (0.51, Status.WARNING), (0.89, Status.WARNING), (0.91, Status.PROBLEM), (2, Status.PROBLEM)):
        finding = judged("retention against fold", late(share * week))
        assert finding.status is status
        if status is not Status.OK:
            assert f"{FRAMES}[1]" in finding.found and "retention 7 d" in finding.found
            more, worker = finding.fixes
            assert int(more.rpartition("=")[2]) / 1000 >= 2 * share * week and worker == "crossrep fold s-1 --name ANOTHER"
    assert judged("retention against fold", with_config(late(9 * week), FRAMES, retention_ms="-1")).status is Status.OK


def test_what_retention_has_taken_unread_is_a_problem_but_for_the_last_marker() -> None:
    gone = judged("retention against fold", late(1, position=40, first=60))
    assert gone.status is Status.PROBLEM and f"{FRAMES}[1]: offsets 40 to 60 were deleted" in gone.found
    assert f"kafka-consumer-groups.sh --bootstrap-server kafka:9092 --group fold.s-1 --topic {FRAMES}:1 --reset-offsets" in gone.fixes[0]
    assert judged("retention against fold", late(1, position=99, first=100, lag=0, oldest=None)).status is Status.OK
    assert judged("retention against fold", late(1, position=98, first=99, lag=0, oldest=None)).status is Status.PROBLEM


def test_infer_is_measured_on_its_events_and_only_where_it_is_used() -> None:
    behind = [Behind(CLICKS, 0, 1, 0, 9, 8, NOW - 6.5 * 86_400)]
    assert judged("retention against infer", with_group(healthy(), "infer", behind=behind)).status is Status.OK
    used = with_group(healthy(), "infer", behind=behind, used=True, members={"i0": 2})
    finding = judged("retention against infer", used)
    assert finding.status is Status.PROBLEM and f"{CLICKS}[0]" in finding.found and "crossrep infer" in finding.fixes[1]
    assert judged("infer workers", used).status is Status.OK  # its one partition is of two topics' four
    nothing_yet = replace(healthy(), newest_frame=None)
    assert judged("infer workers", nothing_yet).status is Status.WARNING  # nobody ever wrote a frame
    assert judged("clock", nothing_yet).status is Status.SKIPPED


def test_one_broker_is_a_developers_unless_said_otherwise() -> None:
    facts = replace(healthy(), brokers={1: BROKER}, production=False)
    facts = replace(
        facts, topics={name: TopicFacts({0: ONE}, topic.config | {"min.insync.replicas": "1"}) for name, topic in facts.topics.items()}
    )
    (finding,) = bad(facts)
    assert (finding.check, finding.status) == ("replication", Status.WARNING) and "run 3 brokers" in finding.fixes[0]
    (finding,) = bad(replace(facts, production=True))
    assert (finding.check, finding.status) == ("replication", Status.PROBLEM)


def test_the_same_defect_of_several_topics_is_said_once() -> None:
    items = SPACE.representations_topic("item")
    facts = with_config(with_config(healthy(), USERS, min_cleanable_dirty_ratio="0.9"), items, min_cleanable_dirty_ratio="0.9")
    (finding,) = bad(facts)
    assert len(finding.fixes) == 1 and finding.found.count("0.9") == 1
    assert finding.fixes[0] == (
        f"for topic in {USERS} {items}; do kafka-configs.sh --bootstrap-server kafka:9092 --alter "
        "--topic $topic --add-config min.cleanable.dirty.ratio=0.3; done"
    )


def test_brokers_that_keep_their_settings_to_themselves_are_skipped() -> None:
    facts = replace(healthy(), brokers={1: {}, 2: {}, 3: {}}, unreadable="the brokers' settings cannot be read: not authorized")
    findings = bad(facts)
    assert {finding.status for finding in findings} == {Status.SKIPPED}
    assert {f.check for f in findings} == {"transaction timeouts", "expiry", "session timeouts", "topics made by accident"}


def test_groups_whose_coordinator_is_away_are_skipped() -> None:
    facts = with_group(healthy(), "fold", unreadable="group fold.s-1 cannot be read: no coordinator", members={}, used=False, behind=[])
    assert {(finding.check, finding.status) for finding in bad(facts)} == {("retention against fold", S), ("fold workers", S)}


def test_every_topic_of_the_plan_is_covered() -> None:
    for topic in healthy().planned:
        for key, wanted in topic.config.items():
            wrong = {"cleanup.policy": "compact,delete", "message.timestamp.type": "CreateTime"}.get(key)
            if wrong is None:
                rises = key in ("min.cleanable.dirty.ratio", "max.compaction.lag.ms", "segment.ms")
                wrong = str(float(wanted) + 0.2) if "." in wanted else str(int(wanted) * 20 if rises else int(wanted) // 20)
            facts = healthy()
            found = facts.topics[topic.name]
            facts = replace(facts, topics=facts.topics | {topic.name: replace(found, config=found.config | {key: wrong})})
            assert any(topic.name in finding.found for finding in bad(facts)), f"{topic.name}: {key}={wrong} is not found"


def test_a_missing_topic_is_left_to_one_check() -> None:
    facts = replace(without(healthy(), FRAMES), misfit=f"{FRAMES} is missing", newest_frame=None)
    facts = with_group(facts, "fold", behind=[])
    assert {finding.check for finding in bad(facts) if finding.status is Status.PROBLEM} == {"topics fit"}


def test_the_reassignment_adds_replicas_and_moves_none() -> None:
    facts = with_replicas(with_replicas(healthy(), FRAMES, Replicas((2,), (2,), 2)), USERS, Replicas((3, 1), (3,), 3))
    plan = doctor.reassignment(facts)
    assert plan["version"] == 1
    added = {(part["topic"], part["partition"]): part["replicas"] for part in plan["partitions"]}
    assert set(added) == {(FRAMES, 0), (USERS, 0)}
    assert added[USERS, 0] == [3, 1, 2]
    assert added[FRAMES, 0][0] == 2 and sorted(added[FRAMES, 0]) == [1, 2, 3]


def test_the_values_it_repeats_are_those_in_use() -> None:
    assert kafka._PRODUCER["batch.size"] == doctor_topics.BATCH
    assert fold.FoldOptions.session_timeout == Options.session_timeout
