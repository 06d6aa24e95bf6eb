"""Training samples on a topic: those of the files bit by bit, each once however often the publisher is killed, and planted leaks found."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from confluent_kafka import TopicPartition
from confluent_kafka.admin import NewPartitions
from fastavro import schemaless_reader
from fastavro.schema import parse_schema

import crossrep
from crossrep import DataError, SpaceError, StateError, TopicError, TrainingBatch, kafka
from crossrep.cli import cli
from crossrep.errors import BadRecord
from crossrep.spec import Space, training_group
from crossrep.training import leaks
from crossrep.training.records import TrainingLayout
from crossrep.training.samples import CODEC
from crossrep.training.sets import names_of
from crossrep.training.sweep import unknown
from crossrep.training.topic import publish
from streams.operations import retire
from tests.cluster import ROOT, SPEC, alter, wait_for
from tests.crossrep.training.training_world import HOUR, World, made_world

# Publishes, in transactions of 50 samples or so; the process ends or stops itself at the n-th commit that holds some.
_PROGRAM = """
import os, signal
from crossrep import kafka
from crossrep.control import spaces
from crossrep.training import topic
from crossrep.archive.store import Archive
topic.TRANSACTION_BYTES = 50 * 426
seen, retried = 0, kafka.retried
def counted(call, *more):
    global seen
    if getattr(call, "__name__", "") != "commit_transaction":
        return retried(call, *more)
    seen += 1
    if seen == {nth}:
        call.__self__.flush(30)
        if {moment!r} == "after":
            retried(call, *more)
        os.kill(os.getpid(), signal.{signal})
    return retried(call, *more)
kafka.retried = counted
space = spaces.find({space!r}, {bootstrap!r}).space
topic.publish(space, {bootstrap!r}, Archive({archive!r}, {space!r}))
"""


@pytest.fixture(scope="module")
def world(bootstrap: str, tmp_path_factory: pytest.TempPathFactory) -> World:
    """All of it is archived."""
    made = made_world(bootstrap, tmp_path_factory.mktemp("topic"))
    made.archive_up_to(600)
    return made


def started(world: World, nth: int, moment: str, name: str) -> subprocess.Popen[bytes]:
    text = _PROGRAM.format(
        nth=nth, moment=moment, signal=name, space=world.space.name, bootstrap=world.bootstrap, archive=world.archive.url
    )
    return subprocess.Popen([sys.executable, "-c", text], cwd=ROOT, stderr=subprocess.PIPE)


def records(world: World, topic: str) -> dict[int, list[tuple[bytes, dict[str, Any]]]]:
    """Key and sample of every committed record, by partition, in order."""
    found: dict[int, list[tuple[bytes, dict[str, Any]]]] = {0: [], 1: []}
    layout = TrainingLayout(world.space)
    for message in kafka.messages(world.bootstrap, topic, kafka.bounds(world.bootstrap, topic)):
        value = message.value() if topic == world.space.samples_topic else CODEC.header + message.value()[layout.size :]
        found[message.partition()].append((message.key(), CODEC.decode(value)))
    return found


def last_words(batches: Iterator[TrainingBatch]) -> dict[str, dict[str, Any]]:
    """By sample id, everything that a batch says of it."""
    found = {}
    for batch in batches:
        for i, id in enumerate(batch.sample_ids):
            found[id] = {name: getattr(batch, name)[i] for name in ("user_ids", "item_ids", "event_times", "labels", "clicked_at")}
            for entity, known in batch.known.items():
                about = {"found": known.found[i], "count": known.counts[i], "event_time": known.event_times[i]}
                found[id] |= {f"{entity}_{name}": value for name, value in about.items()}
                for column, values in known.items():
                    found[id][entity, column] = values.vectors[i], values.weights[i], values.known[i]
    return found


def test_killed_stopped_and_taken_over_each_sample_is_there_once_as_in_the_files(bootstrap: str, tmp_path: Path) -> None:
    world = made_world(bootstrap, tmp_path)
    everything = records(world, world.space.samples_topic)
    assert sum(map(len, everything.values())) == 686
    for nth, moment in ((1, "before"), (2, "after")):
        with started(world, nth, moment, "SIGKILL") as killed:
            assert killed.wait(60) == -signal.SIGKILL, killed.stderr and killed.stderr.read()
    with started(world, 2, "before", "SIGSTOP") as zombie:
        wait_for(lambda: "T" in Path(f"/proc/{zombie.pid}/stat").read_text().rpartition(")")[2].split()[0], "it has stopped itself")
        added = publish(world.space, world.bootstrap, world.archive)  # takes over
        zombie.send_signal(signal.SIGCONT)
        assert zombie.wait(60) == 1 and zombie.stderr and b"If no other run has taken over" in zombie.stderr.read()
    first = records(world, world.space.training_topic)
    for number, expected in everything.items():  # up to the first that the archive does not know, corrections of others behind it too
        ready = next(i for i, (_, sample) in enumerate(expected) if int(sample["sample_id"][2:]) >= 500)
        assert first[number] == expected[:ready]
    there = sum(map(len, first.values()))
    assert 0 < added.samples < there - 100 and added.waiting == 686 - there
    world.archive_up_to(600)
    added = publish(world.space, world.bootstrap, world.archive)
    assert (added.samples, added.waiting) == (686 - there, 0)
    assert publish(world.space, world.bootstrap, world.archive).samples == 0
    assert records(world, world.space.training_topic) == everything
    made = world.make()
    names, found = names_of(world.space), last_words(crossrep.training_samples(world.space.name, world.bootstrap))
    rows = world.read(made).to_pylist()
    assert len(rows) == len(found) == 600 and made.clicked == sum(int(said["labels"]) for said in found.values())
    for row in rows:
        said = found[row["sample_id"]]
        assert (said["user_ids"], said["item_ids"], said["labels"]) == (row["user_id"], row["item_id"], row["label"])
        assert said["event_times"] == row["event_time"].timestamp()
        assert row["clicked_at"].timestamp() == said["clicked_at"] if row["clicked_at"] else np.isnan(said["clicked_at"])
        for entity, declared in world.space.entities.items():
            assert (said[f"{entity}_found"], said[f"{entity}_count"]) == (row[f"{entity}_found"], row[f"{entity}_count"])
            newest = row[f"{entity}_event_time"]
            assert said[f"{entity}_event_time"] == (newest.timestamp() if newest else -np.inf)
            for column, spec in declared.columns.items():
                vector, weight, present = said[entity, column]
                name = names[entity, column]
                if spec.dim:
                    assert vector.dtype == np.float32 and vector.tolist() == (row[name] or [0.0] * spec.dim) and present == bool(row[name])
                if spec.half_life is not None:
                    assert weight == row[f"{name}_weight"]
    assert leaks.check_topic(world.space, world.bootstrap, world.archive) == (686, [])
    checked, _ = leaks.check_topic(world.space, world.bootstrap, world.archive, rows=100)
    assert checked == 100


def test_batches_positions_partitions_and_what_comes_later(world: World) -> None:
    publish(world.space, world.bootstrap, world.archive)

    def read(**options: Any) -> list[TrainingBatch]:
        return list(crossrep.training_samples(world.space.name, world.bootstrap, **options))

    (whole,) = read()
    batches = read(batch_size=100)
    assert [len(batch) for batch in batches[:-1]] == [100] * (len(batches) - 1) and sum(map(len, batches)) == len(whole)
    rest = read(start=batches[2].positions)
    assert batches[0].sample_ids + batches[1].sample_ids + batches[2].sample_ids + rest[0].sample_ids == whole.sample_ids
    halves = [read(partitions=[number])[0] for number in (0, 1)]
    assert sorted(halves[0].sample_ids + halves[1].sample_ids) == sorted(whole.sample_ids)
    assert not set(halves[0].user_ids) & set(halves[1].user_ids)
    assert not read(start=whole.positions)
    user = whole.known["user"]
    assert [id.decode() for id in user.ids.tolist()] == whole.user_ids and user.space == world.space.name
    assert user["cr"].vectors.shape == (len(whole), 8) and np.array_equal(user.at, whole.event_times)
    following = crossrep.training_samples(world.space.name, world.bootstrap, start=whole.positions, follow=True)
    sample = {"sample_id": "0-9", "impression_id": "e9", "user_id": "u1", "item_id": "new", "event_time": 1_660_000_000_000, "label": 0}
    producer = kafka.producer(world.bootstrap, partitioner="murmur2_random")
    producer.produce(world.space.samples_topic, CODEC.encode(sample), "u1")
    assert producer.flush(30) == 0 and publish(world.space, world.bootstrap, world.archive).samples == 1
    (later,) = [next(following)]
    assert later.item_ids == ["new"] and later.known["user"].found.all() and not later.known["item"].found.any()
    assert later.known["item"].counts[0] == 0 and not later.known["item"]["cr"].known[0] and later.known["item"]["cr"].weights[0] == 0
    for options, error, what in (
        ({"partitions": [2]}, SpaceError, "partitions 0 to 1, not 2"),
        ({"start": {0: 10_000}}, DataError, r"\[0\] holds the offsets from 0 up to .* not 10000"),
        ({"batch_size": 0}, ValueError, "at least 1"),
    ):
        with pytest.raises(error, match=what):
            read(**options)


def test_any_avro_reader_can_read_one_and_what_is_no_training_sample_is_refused(world: World) -> None:
    publish(world.space, world.bootstrap, world.archive)
    layout = TrainingLayout(world.space)
    topic = world.space.training_topic
    *_, message = kafka.messages(world.bootstrap, topic, {0: kafka.bounds(world.bootstrap, topic)[0]})
    batch = layout.decode([message.value()], {})
    datum: Any = schemaless_reader(BytesIO(message.value()[10:]), parse_schema(layout.schema()), None)
    assert datum["sample"]["sample_id"] == batch.sample_ids[0] and datum["known_before"] == batch.known_before[0] == batch.event_times[0]
    user, known = datum["known"]["user"], batch.known["user"]
    assert (user["count"], user["event_time"], user["source_offset"]) == (known.counts[0], known.event_times[0], known.source_offsets[0])
    assert user["cr"] == known["cr"].vectors[0].tobytes() and user["cr_time"] == known["cr"].times[0]
    assert user["cr_weight"] * 2 ** (-(batch.event_times[0] - user["cr_time"]) / HOUR) == pytest.approx(known["cr"].weights[0], rel=1e-12)
    for value, reason in ((message.value()[:50], "length"), (b"\xc3\x01" + b"x" * 400, "schema"), (message.value() + b"x", "undecodable")):
        with pytest.raises(BadRecord) as refused:
            layout.decode([value], {})
        assert refused.value.reason == reason


def test_entities_by_any_field_of_the_sample_and_samples_that_have_no_such_key() -> None:
    columns = '[entities.{0}.columns.cr]\nsource = "cr"\ndim = 8\naggregate = "decayed_mean"\nhalf_life = "1h"\n'
    more = '[entities.scene]\nkey = "scenario"\n' + columns.format("scene") + '[entities.shop]\nkey = "shop"\n' + columns.format("shop")
    space = Space.parse(SPEC.format(name="scenes", partitions=2) + more)
    layout = TrainingLayout(space)
    assert list(layout.entities) == ["user", "item", "scene"]  # a sample has no shop
    about = {"sample_id": "0-1", "impression_id": "e", "user_id": "ü", "item_id": "i", "event_time": 1000, "label": 0}
    samples = [CODEC.encode({**about, "scenario": scenario}) for scenario in ("", "feed", "")]
    nothing = {entity: unknown(space.entities[entity], 3) for entity in layout.entities}
    values = layout.encode(samples, np.ones(3), nothing, dict.fromkeys(layout.entities, np.full(3, 7)))
    batch = layout.decode(values, {})
    assert batch.known["scene"].ids.tolist() == [b"", b"feed", b""] and batch.known["user"].ids.tolist() == ["ü".encode()] * 3
    assert batch.known["scene"].source_offsets.tolist() == [7] * 3 and not batch.known["scene"]["cr"].known.any()


def test_planted_leaks_are_found(bootstrap: str, tmp_path: Path) -> None:
    """Attached as of a millisecond after the impression, so that each knows its own; then all of them again as of an hour after it."""
    world = made_world(bootstrap, tmp_path, 60)
    ready = publish(world.space, bootstrap, world.archive, delay=-0.001).samples
    check_all_know_the_future(world, ready)
    forget_progress(world)
    assert publish(world.space, bootstrap, world.archive, delay=-float(HOUR), start="earliest").samples == ready
    check_all_know_the_future(world, 2 * ready)
    done = CliRunner().invoke(cli, ["leaks", world.space.name, "--topic", "--archive", world.archive.url, "--bootstrap", bootstrap])
    assert done.exit_code == 1 and f"{2 * ready} samples of topic {world.space.training_topic} checked" in done.output
    retired = retire.retire(world.space.name, bootstrap, [])
    assert world.space.training_topic in retired.topics and training_group(world.space) in retired.groups


def check_all_know_the_future(world: World, samples: int) -> None:
    checked, findings = leaks.check_topic(world.space, world.bootstrap, world.archive)
    ids = [id for batch in crossrep.training_samples(world.space.name, world.bootstrap) for id in batch.sample_ids]
    assert checked == samples == len(ids) > 40
    assert {(found.sample_id, found.entity) for found in findings if found.future} == {(id, e) for id in ids for e in ("user", "item")}
    assert any("events are attached" in found.problem for found in findings) and any("not before" in found.problem for found in findings)


def forget_progress(world: World) -> None:
    group = training_group(world.space)
    admin = kafka.admin(world.bootstrap)
    admin.delete_consumer_groups([group])[group].result(30)


def test_what_cannot_go_on_is_refused_and_says_how_to(bootstrap: str, tmp_path: Path) -> None:
    world = made_world(bootstrap, tmp_path, 60)
    space, admin = world.space, kafka.admin(bootstrap)
    command = ["training-set", space.name, "--archive", world.archive.url, "--bootstrap", bootstrap]

    def told(error: type[Exception], what: str, **options: Any) -> None:
        with pytest.raises(error, match=what):
            publish(space, bootstrap, world.archive, **options)

    for options, what in ((["--topic", "--since", "2022-01-01"], "--since is for files"), (["--follow"], "--follow needs --topic")):
        done = CliRunner().invoke(cli, [*command, *options])
        assert done.exit_code == 2 and what in done.output
    alter(bootstrap, space.training_topic, "cleanup.policy", "compact")
    wait_for(lambda: "compaction would leave one sample" in _refusal(world), "the broker knows its policy")
    alter(bootstrap, space.training_topic, "cleanup.policy", "delete")
    wait_for(lambda: not _refusal(world), "the broker knows its policy")
    there = sum(map(len, records(world, space.training_topic).values()))
    done = CliRunner().invoke(cli, [*command, "--topic"])
    assert done.exit_code == 0 and f"0 samples to {space.training_topic}" in done.output and "samples wait" in done.output

    forget_progress(world)
    told(StateError, "--start latest goes on")
    assert publish(space, bootstrap, world.archive, start="earliest").samples == there  # again, under the same ids
    ends = kafka.bounds(bootstrap, space.samples_topic)
    admin.delete_records([TopicPartition(space.samples_topic, number, end) for number, (_, end) in ends.items()])
    wait_for(lambda: all(first for first, _ in kafka.bounds(bootstrap, space.samples_topic).values()), "samples are gone")
    told(StateError, "deleted before they were published")
    assert publish(space, bootstrap, world.archive, accept_gap=True).samples == 0
    *_, last = crossrep.training_samples(space.name, bootstrap)
    ends = kafka.bounds(bootstrap, space.training_topic)
    admin.delete_records([TopicPartition(space.training_topic, number, end) for number, (_, end) in ends.items()])
    wait_for(lambda: all(first for first, _ in kafka.bounds(bootstrap, space.training_topic).values()), "training samples are gone")
    assert not list(crossrep.training_samples(space.name, bootstrap, start=last.positions))  # nothing but markers went unread
    with pytest.raises(DataError, match="deleted by retention before they were read"):
        crossrep.training_samples(space.name, bootstrap, start={**last.positions, 1: last.positions[1] - 1})
    admin.create_partitions([NewPartitions(space.training_topic, 3)])[space.training_topic].result(30)
    wait_for(lambda: "has 3 partitions" in _refusal(world), "the broker knows its partitions")
    admin.delete_topics([space.training_topic])[space.training_topic].result(30)
    wait_for(lambda: "is missing" in _refusal(world), "the topic is gone")


def _refusal(world: World) -> str:
    try:
        publish(world.space, world.bootstrap, world.archive)
        return ""
    except TopicError as error:
        return str(error)
