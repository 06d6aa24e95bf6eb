"""Topics derived from a space: created once, checked before any worker starts, and every misfit named with what to do."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from click.testing import CliRunner
from confluent_kafka import KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, ConfigResource, NewPartitions, NewTopic, ResourceType

from crossrep import CrossrepError, LocalView, SpaceError, TopicError, kafka
from crossrep.cli import cli
from crossrep.control import spaces
from crossrep.spec import Space
from streams import topics
from tests.cluster import SPEC, Load, Workers, alter, free_port, new_space, prove, ready, settled, wait_for
from tests.streams.small_model import small_model


def described(bootstrap: str) -> set[str]:
    admin = kafka.admin(bootstrap)
    return set(admin.list_topics(timeout=30).topics)


def delete(bootstrap: str, name: str) -> None:
    admin = kafka.admin(bootstrap)
    for future in admin.delete_topics([name], operation_timeout=30).values():
        future.result(30)
    wait_for(lambda: name not in described(bootstrap), f"{name} is gone")


def test_create_is_idempotent(bootstrap: str, tmp_path: Path) -> None:
    space = Space.parse(SPEC.format(name=f"once-{os.getpid()}", partitions=3))
    created = topics.create(space, bootstrap)
    expected = {topic.name for topic in topics.plan(space)}
    assert expected <= {*created} <= expected | {topic.name for topic in topics.CONTROL}
    assert {topic for topic in expected if topic.startswith("representations.")} == {
        f"representations.{entity}.{space.name}" for entity in ("user", "item")
    }
    published = topics.check(space, bootstrap)
    assert published.space.hash == space.hash and set(published.topic_ids) == {
        space.frames_topic,
        space.history_topic,
        space.representations_topic("user"),
        space.representations_topic("item"),
    }
    for _ in range(3):
        assert topics.create(space, bootstrap) == []
    assert topics.check(space, bootstrap) == published
    admin = kafka.admin(bootstrap)
    metadata = admin.list_topics(timeout=30).topics
    for topic in topics.plan(space):
        assert len(metadata[topic.name].partitions) == topic.partitions
        config = next(iter(admin.describe_configs([ConfigResource(ResourceType.TOPIC, topic.name)]).values())).result(30)
        assert {key: config[key].value for key in topic.config} == topic.config


def test_what_is_missing_is_created_again_and_inputs_of_the_platform_are_kept(bootstrap: str, tmp_path: Path) -> None:
    name = f"shared-{os.getpid()}"
    space = Space.parse(SPEC.format(name=name, partitions=2))
    admin = kafka.admin(bootstrap)
    platform = NewTopic(space.inputs.impressions, 7, 1, config={"message.timestamp.type": "LogAppendTime", "cleanup.policy": "delete"})
    for future in admin.create_topics([platform]).values():
        future.result(30)
    wait_for(lambda: space.inputs.impressions in described(bootstrap), "the platform's topic is there")
    assert space.inputs.impressions not in topics.create(space, bootstrap)
    topics.check(space, bootstrap)  # an input may have any number of partitions
    delete(bootstrap, space.inference_topic)
    with pytest.raises(TopicError, match=rf"{space.inference_topic} is missing. Create it: crossrep topics create"):
        topics.check(space, bootstrap)
    assert topics.create(space, bootstrap) == [space.inference_topic]
    topics.check(space, bootstrap)


def test_another_spec_of_the_same_name_is_refused(bootstrap: str, tmp_path: Path) -> None:
    name = f"model{os.getpid()}-v7"
    first = Space.parse(SPEC.format(name=name, partitions=2))
    topics.create(first, bootstrap)
    other = Space.parse(SPEC.format(name=name, partitions=2).replace('half_life = "1h"', 'half_life = "2h"'))
    for ask in (topics.create, topics.check):
        with pytest.raises(SpaceError, match=rf"give the new one another name, such as model{os.getpid()}-v8,"):
            ask(other, bootstrap)
    assert spaces.find(name, bootstrap).space.hash == first.hash
    slower = Space.parse(SPEC.format(name=name, partitions=2).replace('flush = "50ms"', 'flush = "1s"'))
    assert topics.create(slower, bootstrap) == []  # how often to flush is no part of what vectors mean
    with pytest.raises(SpaceError, match="no space 'never-published'"):
        topics.check(Space.parse(SPEC.format(name="never-published", partitions=2)), bootstrap)


@pytest.fixture(scope="module")
def spare(bootstrap: str, tmp_path_factory: pytest.TempPathFactory) -> Space:
    """A space whose topics tests may spoil, if they mend them."""
    return new_space(bootstrap, tmp_path_factory.mktemp("spare"), partitions=2)[0]


@pytest.mark.parametrize(
    ("topic", "key", "wrong"),
    [
        ("frames.{}", "message.timestamp.type", "CreateTime"),
        ("events.impressions.{}", "message.timestamp.type", "CreateTime"),
        ("frames.{}", "cleanup.policy", "compact"),
        ("representations.user.{}", "cleanup.policy", "delete"),
        ("representations.item.{}", "cleanup.policy", "compact,delete"),
        ("features.user.{}", "cleanup.policy", "delete"),
        ("frames.{}", "max.message.bytes", "1000000"),
    ],
)
def test_a_changed_setting_is_named(bootstrap: str, spare: Space, topic: str, key: str, wrong: str) -> None:
    name = topic.format(spare.name)
    right = next(t.config[key] for t in topics.plan(spare) if t.name == name)
    alter(bootstrap, name, key, wrong)
    for ask in (topics.check, topics.create):
        with pytest.raises(TopicError) as caught:
            ask(spare, bootstrap)
        for part in (name, f"{key}={wrong}", right, "kafka-configs.sh --alter"):
            assert part in str(caught.value)
    alter(bootstrap, name, key, right)
    topics.check(spare, bootstrap)


def test_a_wrong_number_of_partitions_is_named(bootstrap: str, tmp_path: Path) -> None:
    space, _ = new_space(bootstrap, tmp_path, partitions=2)
    topic = space.representations_topic("user")
    admin = kafka.admin(bootstrap)
    for future in admin.create_partitions([NewPartitions(topic, 3)]).values():
        future.result(30)
    wait_for(lambda: len(admin.list_topics(timeout=30).topics[topic].partitions) == 3, "partition added")
    for ask in (topics.check, topics.create):
        with pytest.raises(TopicError, match=rf"{topic} has 3 partitions, the space declares 2; keys would move"):
            ask(space, bootstrap)


def recreate(bootstrap: str, space: Space, name: str) -> None:
    topic = next(t for t in topics.plan(space) if t.name == name)
    delete(bootstrap, name)
    admin: AdminClient = kafka.admin(bootstrap)

    def created() -> bool:
        try:
            for future in admin.create_topics([NewTopic(name, topic.partitions, 1, config=topic.config)]).values():
                future.result(30)
        except KafkaException:
            return False  # still being deleted
        return True

    wait_for(created, f"{name} is created again")
    wait_for(lambda: name in described(bootstrap), f"{name} is there again")


def test_a_topic_created_anew_is_refused_until_published_again(bootstrap: str, tmp_path: Path) -> None:
    space, _ = new_space(bootstrap, tmp_path, partitions=2)
    name = space.representations_topic("item")
    recreate(bootstrap, space, name)
    with pytest.raises(TopicError, match=rf"{name} was deleted and created anew since .* crossrep topics create"):
        topics.check(space, bootstrap)
    assert topics.create(space, bootstrap) == []
    topics.check(space, bootstrap)


def test_state_whose_topics_are_gone_is_built_again_from_the_frames(bootstrap: str, workers: Workers, tmp_path: Path) -> None:
    """The worker under way ends by itself, and says how to go on; a part of the state is never mixed with new topics."""
    space, path = new_space(bootstrap, tmp_path, partitions=2)
    load, worker = Load(space, bootstrap), workers.fold(path)
    load.send(500)
    wait_for(lambda: settled(space, bootstrap), "folded")
    recreate(bootstrap, space, space.representations_topic("item"))
    assert worker.wait(30) == 3, workers.logs()
    assert "was deleted and created anew" in workers.logs()
    with pytest.raises(TopicError, match=rf"{space.representations_topic('user')} still holds old state"):
        topics.create(space, bootstrap)
    recreate(bootstrap, space, space.representations_topic("user"))

    def published() -> bool:
        try:
            topics.create(space, bootstrap)
        except TopicError as error:
            if "Stop all fold workers" not in str(error):
                raise
            return False
        return True

    wait_for(published, "the dead worker's session is over, and the space is published again")
    workers.fold(path)
    load.send(500)
    wait_for(lambda: settled(space, bootstrap), "folded from the beginning")
    prove(space, bootstrap, load.counts)


def test_frames_created_anew_under_a_running_worker(bootstrap: str, workers: Workers, tmp_path: Path) -> None:
    space, path = new_space(bootstrap, tmp_path, partitions=2)
    load, worker = Load(space, bootstrap), workers.fold(path)
    load.send(100)
    wait_for(lambda: settled(space, bootstrap), "folded")
    recreate(bootstrap, space, space.frames_topic)
    load.send(5)
    assert worker.wait(30) != 0, workers.logs()
    with pytest.raises(TopicError, match="still holds old state"):
        topics.create(space, bootstrap)


def test_frames_truncated_under_a_worker_that_is_behind(bootstrap: str, workers: Workers, tmp_path: Path) -> None:
    space, path = new_space(bootstrap, tmp_path, partitions=1)
    load, port = Load(space, bootstrap), free_port()
    worker = workers.fold(path, port=port)
    wait_for(lambda: ready(port), "ready")
    load.send(100)
    wait_for(lambda: settled(space, bootstrap), "folded")
    worker.send_signal(signal.SIGSTOP)
    for _ in range(10):  # not in one batch, which one fetch on its way could bring whole
        load.send(100)
    end = kafka.bounds(bootstrap, space.frames_topic)[0][1]
    admin = kafka.admin(bootstrap)
    for future in admin.delete_records([TopicPartition(space.frames_topic, 0, end - 2)]).values():
        future.result()
    worker.send_signal(signal.SIGCONT)
    assert worker.wait(60) in (1, 3), workers.logs()
    again = workers.fold(path)
    assert again.wait(60) == 3, workers.logs()
    assert "frames were deleted before they were folded" in workers.logs()


def refused(workers: Workers, *expected: tuple[list[str], list[str]]) -> None:
    """Each worker ends by itself, soon, with one clear message (its parts are given) and no stack."""
    started = [(len(workers.running), workers.start(*args), parts) for args, parts in expected]
    for number, process, parts in started:
        assert process.wait(90) == 1, workers.logs()
        (log,) = [path.read_text() for path in workers.folder.glob(f"{number}-*.log")]
        assert "\ncrossrep: " in f"\n{log}" and "Traceback" not in log, log
        for part in parts:
            assert part in log


def test_workers_do_not_start_against_topics_that_do_not_fit(bootstrap: str, workers: Workers, tmp_path: Path) -> None:
    space, path = new_space(bootstrap, tmp_path, partitions=2)
    other = tmp_path / "other.toml"
    other.write_text(path.read_text().replace('half_life = "1h"', 'half_life = "9h"'))
    common = ["--name", "w", "--port", str(free_port())]
    recreate(bootstrap, space, space.frames_topic)
    anew = [space.frames_topic, "created anew", "crossrep topics create"]
    refused(workers, (["fold", str(path), *common], anew), (["frame", space.name, *common], anew))
    topics.create(space, bootstrap)
    refused(
        workers,
        (["infer", str(path), "--model", str(small_model()), *common], ["cr[8]", "cr[64]"]),
        (["fold", str(other), *common], ["another spec", "another name"]),
        (["fold", "no-such-space", *common], ["no space 'no-such-space'", space.name]),
    )
    delete(bootstrap, space.representations_topic("user"))
    refused(workers, (["fold", space.name, *common], [space.representations_topic("user"), "is missing"]))


def test_a_worker_of_the_same_name_on_the_same_disk_is_refused(bootstrap: str, workers: Workers, tmp_path: Path) -> None:
    _, path = new_space(bootstrap, tmp_path, partitions=2)
    first = workers.fold(path, "twin")
    lock = tmp_path / "home" / "fold" / path.stem / "twin" / "lock"
    wait_for(lambda: lock.exists(), "the first holds its folder")
    refused(workers, (["fold", str(path), "--name", "twin", "--port", str(free_port())], ["'twin' already runs", "--name"]))
    assert first.poll() is None


def test_no_broker_is_said_so(workers: Workers, tmp_path: Path) -> None:
    path = tmp_path / "space.toml"
    path.write_text(SPEC.format(name="nobody", partitions=2))
    refused(workers, (["topics", "create", str(path), "--bootstrap", f"127.0.0.1:{free_port()}"], ["no Kafka answers"]))


def test_an_unreadable_space_does_not_hide_the_others(bootstrap: str, tmp_path: Path) -> None:
    space, _ = new_space(bootstrap, tmp_path, partitions=2)
    broken = {
        f"broken-{os.getpid()}-a": b"{ not json",
        f"broken-{os.getpid()}-b": b'{"spec": {"name": "from the future", "quantum": true}, "hash": "00", "topic_ids": {}}',
        f"broken-{os.getpid()}-c": b"{}",
        f"broken-{os.getpid()}-d": b"[]",
        f"broken-{os.getpid()}-e": b"\xff\xfe",
        b"\xff\xfe": b"a name that is not UTF-8",
    }
    producer = kafka.producer(bootstrap)
    for name, value in broken.items():
        producer.produce(spaces.SPACES_TOPIC, value, name)
    assert producer.flush(30) == 0
    try:
        assert spaces.find(space.name, bootstrap).space == space
        topics.check(space, bootstrap)
        new_space(bootstrap, tmp_path, partitions=2)
        LocalView("user", space.name, bootstrap).close()
        shown = CliRunner().invoke(cli, ["space", "list", "--bootstrap", bootstrap], catch_exceptions=False, env={"COLUMNS": "200"})
        assert shown.exit_code == 0
        for name in [space.name, *(name for name in broken if isinstance(name, str))]:
            assert name in shown.output
        for name in broken:
            if isinstance(name, str):
                with pytest.raises(CrossrepError):
                    spaces.find(name, bootstrap)
    finally:
        for name in broken:
            producer.produce(spaces.SPACES_TOPIC, None, name)
        producer.flush(30)
