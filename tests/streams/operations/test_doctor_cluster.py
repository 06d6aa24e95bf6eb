"""The doctor on a real broker: a good space, spoiled topics, working and missing workers, no broker."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from confluent_kafka import TopicPartition

import streams.cli  # noqa: F401  adds the workers' commands
from crossrep import kafka
from crossrep.cli import cli
from streams.operations import doctor
from streams.operations.cluster_facts import gather
from streams.operations.doctor_findings import Status
from tests.cluster import SPEC, Load, Workers, alter, free_port, new_space, ready, settled, wait_for
from tests.streams.operations.test_doctor import judged


@pytest.fixture(scope="module", autouse=True)
def lost(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Workers, str]]:
    """A doctor whose cluster does not exist. It gives up after ten seconds, in which the other tests run."""
    folder = tmp_path_factory.mktemp("lost")
    path, nobody = folder / "space.toml", f"127.0.0.1:{free_port()}"
    path.write_text(SPEC.format(name="nobody", partitions=2))
    started = Workers(folder)
    started.start("doctor", str(path), "--bootstrap", nobody)
    yield started, nobody
    started.kill_all()


def invoke(*args: str) -> Result:
    return CliRunner().invoke(cli, ["doctor", *args], env={"COLUMNS": "200"})


def test_a_good_space_gives_no_problem(bootstrap: str, tmp_path: Path) -> None:
    space, _ = new_space(bootstrap, tmp_path, partitions=2)
    findings = {finding.check: finding for finding in doctor.examine(gather(space, bootstrap))}
    assert all(finding.status is not Status.PROBLEM for finding in findings.values()), findings
    assert findings["topics fit"].status is Status.OK and findings["compaction"].status is Status.OK
    assert findings["fold workers"].status is Status.WARNING and findings["clock"].status is Status.SKIPPED
    shown = invoke(space.name, "--bootstrap", bootstrap)
    assert shown.exit_code == 0, shown.output
    assert f"\n  crossrep fold {space.name} --name NAME\n" in shown.output
    assert invoke(space.name, "--bootstrap", bootstrap, "--strict").exit_code == 1
    written = tmp_path / "replicas.json"
    assert invoke(space.name, "--bootstrap", bootstrap, "--production", "--reassignment", str(written)).exit_code == 1
    assert json.loads(written.read_text())["version"] == 1


def test_spoiled_topics_are_found_and_their_fixes_named(bootstrap: str, tmp_path: Path) -> None:
    space, _ = new_space(bootstrap, tmp_path, partitions=2)
    users = space.representations_topic("user")
    alter(bootstrap, space.frames_topic, "retention.ms", "60000")
    alter(bootstrap, users, "cleanup.policy", "compact,delete")
    alter(bootstrap, space.inputs.clicks, "retention.bytes", "123456789")
    shown = invoke(space.name, "--bootstrap", bootstrap)
    assert shown.exit_code == 1
    for topic, change in (
        (space.frames_topic, "retention.ms=604800000"),
        (users, "cleanup.policy=compact"),
        (space.inputs.clicks, "retention.bytes=-1"),
    ):
        assert f"\n  kafka-configs.sh --bootstrap-server {bootstrap} --alter --topic {topic} --add-config {change}\n" in shown.output
    findings = {finding.check: finding for finding in doctor.examine(gather(space, bootstrap))}
    assert findings["topics fit"].status is Status.PROBLEM and "cleanup.policy=compact,delete" in findings["topics fit"].found
    assert findings["topics' settings"].status is findings["retention"].status is Status.PROBLEM
    admin = kafka.admin(bootstrap)
    for future in admin.delete_topics([space.frames_topic], operation_timeout=30).values():
        future.result(30)
    wait_for(lambda: space.frames_topic not in admin.list_topics(timeout=30).topics, "the frames topic is gone")
    findings = {finding.check: finding for finding in doctor.examine(gather(space, bootstrap))}
    assert f"{space.frames_topic} is missing" in findings["topics fit"].found


def test_workers_and_their_lag_are_seen(bootstrap: str, workers: Workers, tmp_path: Path) -> None:
    space, path = new_space(bootstrap, tmp_path, partitions=2)
    before = gather(space, bootstrap)
    assert before.newest_frame is None and not before.groups["fold"].members
    Load(space, bootstrap).send(300)
    unfolded = gather(space, bootstrap)
    group = unfolded.groups["fold"]
    assert [part.position for part in group.behind] == [0, 0] and all(part.lag > 0 for part in group.behind)
    assert all(part.oldest is not None and 0 <= unfolded.now - part.oldest < 60 for part in group.behind)
    assert unfolded.newest_frame is not None and judged("clock", unfolded).status is Status.OK
    assert judged("infer workers", unfolded).status is Status.OK  # the frames came from elsewhere
    port = free_port()
    workers.fold(path, "w0", port=port)
    wait_for(lambda: ready(port) and settled(space, bootstrap), "all is folded")
    group = gather(space, bootstrap).groups["fold"]
    assert group.members == {"w0": 2} and group.used
    assert [(part.lag, part.oldest) for part in group.behind] == [(0, None)] * 2


def test_a_transaction_that_nobody_ends_is_seen(bootstrap: str, tmp_path: Path) -> None:
    space, _ = new_space(bootstrap, tmp_path, partitions=2)
    producer = kafka.transactional_producer(bootstrap, f"nobody.{space.name}", 60.0)
    producer.init_transactions(30)
    for committed in (True, False):  # partition 1: a committed frame at 0, its marker at 1, an open one at 2
        producer.begin_transaction()
        producer.produce(space.frames_topic, b"frame", partition=1)
        assert producer.flush(30) == 0
        if committed:
            producer.commit_transaction(30)
    facts = gather(space, bootstrap)
    (part,) = facts.open
    assert (part.partition, part.stable) == (1, 2) and part.since is not None and -1 < facts.now - part.since < 60
    for age, status in ((1, Status.OK), (25, Status.WARNING), (3600, Status.PROBLEM)):
        assert judged("hanging transactions", replace(facts, now=part.since + age)).status is status
    producer.abort_transaction(30)
    wait_for(lambda: not gather(space, bootstrap).open, "the transaction has ended")


def test_offsets_that_infer_committed_are_its_lag(bootstrap: str, tmp_path: Path) -> None:
    space, _ = new_space(bootstrap, tmp_path, partitions=2)
    producer = kafka.producer(bootstrap)
    for n in range(5):
        producer.produce(space.inputs.clicks, b"%d" % n, partition=1)
    assert producer.flush(30) == 0
    client = kafka.consumer(bootstrap, f"infer.{space.name}")
    client.commit(offsets=[TopicPartition(space.inputs.clicks, 1, 2)], asynchronous=False)
    client.close()
    group = gather(space, bootstrap).groups["infer"]
    assert group.used and not group.members
    assert {(part.topic, part.partition): part.lag for part in group.behind if part.lag} == {(space.inputs.clicks, 1): 3}
    finding = judged("infer workers", gather(space, bootstrap))
    assert finding.status is Status.WARNING and f"lag 3: {space.inputs.clicks}[1] 3" in finding.found


def test_no_broker_is_one_clear_error(lost: tuple[Workers, str]) -> None:
    workers, nobody = lost
    assert workers.running[0].wait(60) == 1
    (log,) = workers.folder.glob("*-doctor.log")
    assert log.read_text().startswith(f"crossrep: no Kafka answers at {nobody}") and len(log.read_text().splitlines()) == 1
