"""Rewinding further than the frames topic reaches: a new space from the archive as it was then, and the events since once more."""

from __future__ import annotations

import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import pytest
from click.testing import CliRunner
from confluent_kafka import TopicPartition

import streams.cli  # noqa: F401  adds the workers' commands
from crossrep import kafka
from crossrep.cli import cli
from crossrep.columnar.records import RecordLayout
from crossrep.control.groups import offsets
from crossrep.errors import DataError, StateError
from crossrep.snapshots.store import Store
from streams import topics
from tests.cluster import Workers, new_space, prove, settled, wait_for
from tests.crossrep.snapshot_world import rows
from tests.streams.small_model import SPEC, Feed, inferred, small_dataset, start_infer
from tests.streams.test_replay import all_of, flowing, message_event, sibling, total


def test_the_state_as_it_was_and_the_events_since_again(bootstrap: str, workers: Workers, tmp_path: Path) -> None:
    space, path = new_space(bootstrap, tmp_path, SPEC)
    new, new_path = sibling(space, path, f"{space.name}-then", 2)
    topics.create(new, bootstrap)
    feed, place = Feed(space, small_dataset(), bootstrap), str(tmp_path / "archive")
    group = f"infer.{space.name}"
    for name in ("i0", "i1"):
        start_infer(workers, path, name)
    with flowing(feed):
        wait_for(lambda: total(offsets(bootstrap, group)) > 300, f"events are inferred {workers.logs()}")
        least = total(offsets(bootstrap, group))
        time.sleep(1)  # what is committed now was appended before the second that comes
        then = int(time.time())
        wait_for(lambda: time.time() > then + 2, "and some more")
        most = total(offsets(bootstrap, group))
    wait_for(lambda: inferred(space, bootstrap), f"all is inferred {workers.logs()}")

    def crossrep(*args: str) -> str:
        done = CliRunner().invoke(cli, [*args, "--bootstrap", bootstrap], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    crossrep("archive", space.name, "--to", place)
    ends = {number: end for number, (_, end) in kafka.bounds(bootstrap, space.frames_topic).items()}
    asked = [TopicPartition(space.frames_topic, number, end) for number, end in ends.items()]
    admin = kafka.admin(bootstrap)  # held: what a client that is gone was asked is never answered
    for deleted in admin.delete_records(asked).values():
        deleted.result(30)
    command = ["replay", space.name, "--into", new.name, "--archive", place, "--to", str(tmp_path / "snapshots")]
    until = ["--until", datetime.fromtimestamp(then, UTC).strftime("%Y-%m-%dT%H:%M:%S")]
    with pytest.raises(DataError, match=r"holds nothing from before 2020-01-01T00:00:00: its first frames are of 20"):
        crossrep(*command, "--until", "2020-01-01T00:00:00")
    crossrep(*command, *until)
    with pytest.raises(StateError, match="was until another time"):
        crossrep(*command)
    assert "0 rows written" in crossrep(*command, *until)

    to = offsets(bootstrap, f"infer.{new.name}")
    assert least <= total(to) <= most < feed.events, "no earlier than it must be, and no later"
    inputs = (space.inputs.impressions, space.inputs.clicks)
    before = [message for topic in inputs for message in all_of(topic, bootstrap) if message.offset() < to[topic][message.partition()]]
    store = Store(str(tmp_path / "snapshots"), new.name)
    for entity in new.entities:
        records = rows(store, store.find(), entity)
        found = {
            key.decode(): int(record["count"]) for key, record in zip(records, RecordLayout(new, entity).decode(list(records.values())))
        }
        assert found == Counter(message_event(space, message)[f"{entity}_id"] for message in before)
    start_infer(workers, new_path, "n0")
    workers.fold(new_path, "m0")
    wait_for(lambda: inferred(new, bootstrap) and settled(new, bootstrap), f"all is folded {workers.logs()}")
    prove(new, bootstrap, feed.counts)
