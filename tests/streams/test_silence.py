"""A consumer that is silent is believed if the cluster has nothing more to say, and given up if twice it has."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from confluent_kafka import Consumer, Message, TopicPartition
from confluent_kafka.admin import NewTopic

from crossrep import kafka
from crossrep.errors import CrossrepError
from streams import silence
from streams.silence import SILENCE, Place, Silence, reached
from tests.cluster import free_port

_names = itertools.count()


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(silence, "time", clock)
    return clock


@pytest.fixture
def topic(bootstrap: str) -> str:
    """Of two partitions, with ten frames each, the last ones in a transaction, whose end takes an offset of its own."""
    name = f"silence-{os.getpid()}-{next(_names)}"
    admin = kafka.admin(bootstrap)
    admin.create_topics([NewTopic(name, 2, 1)])[name].result(30)
    producer = kafka.transactional_producer(bootstrap, name, 30.0)
    producer.init_transactions(30)
    for _ in range(2):
        producer.begin_transaction()
        for number in range(10):
            producer.produce(name, b"frame", partition=number % 2)
        producer.commit_transaction(30)
    return name


@pytest.fixture
def consumer(bootstrap: str) -> Iterator[Consumer]:
    client = kafka.consumer(bootstrap, config=kafka.ENDS)
    yield client
    client.close()


def heard(consumer: Consumer, places: dict[Place, int]) -> list[Message]:
    """Everything of these partitions, their ends included."""
    consumer.assign([TopicPartition(*place, offset) for place, offset in places.items()])
    events: list[Message] = []
    while sum(map(kafka.is_end, events)) < len(places):
        event = consumer.poll(10.0)
        assert event is not None
        events.append(event)
    return events


def check(silence: Silence, clock: Clock, seconds: float = SILENCE) -> None:
    clock.now += seconds
    silence.check()


def test_silence_is_right_when_all_is_read(bootstrap: str, topic: str, consumer: Consumer, clock: Clock) -> None:
    everything = {(topic, 0): 0, (topic, 1): 0}
    listener = Silence(bootstrap)
    listener.assigned(everything)
    listener.heard(reached(heard(consumer, everything)))
    for _ in range(3):
        check(listener, clock)


def test_what_is_not_committed_cannot_be_heard(bootstrap: str, topic: str, consumer: Consumer, clock: Clock) -> None:
    producer = kafka.transactional_producer(bootstrap, f"{topic}-open", 30.0)
    producer.init_transactions(30)
    producer.begin_transaction()
    producer.produce(topic, b"not yet", partition=0)
    assert producer.flush(30) == 0
    listener = Silence(bootstrap)
    listener.assigned({(topic, 0): 0})
    listener.heard(reached(heard(consumer, {(topic, 0): 0})))
    for _ in range(3):
        check(listener, clock)
    producer.commit_transaction(30)
    check(listener, clock)
    with pytest.raises(CrossrepError, match=rf"{topic}\[0\] goes on"):
        check(listener, clock)


def test_only_a_second_suspicion_ends_it(bootstrap: str, topic: str, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    connect = kafka.consumer

    def counted(*args: Any) -> Consumer:
        asked.append(args)
        return connect(*args)

    monkeypatch.setattr(kafka, "consumer", counted)
    listener = Silence(bootstrap)
    listener.assigned({(topic, 0): 0})
    check(listener, clock, 0.9 * SILENCE)
    assert not asked
    check(listener, clock, 0.2 * SILENCE)
    check(listener, clock, 0.9 * SILENCE)
    assert len(asked) == 1
    with pytest.raises(CrossrepError, match=rf"nothing was heard for 30 s, though {topic}\[0\] goes on to 12.*Start the worker again"):
        check(listener, clock, 0.2 * SILENCE)


@pytest.mark.parametrize("word", ["frame", "end", "assignment"])
def test_a_word_in_between_clears_it(bootstrap: str, topic: str, consumer: Consumer, clock: Clock, word: str) -> None:
    events = heard(consumer, {(topic, 0): 0})
    listener = Silence(bootstrap)
    listener.assigned({(topic, 0): 0, (topic, 1): 0})
    for _ in range(3):
        check(listener, clock)
        if word == "assignment":
            listener.assigned({(topic, 0): 5})
        else:
            listener.heard(reached(events[:1] if word == "frame" else events[-1:]))
        check(listener, clock, 0.9 * SILENCE)
    check(listener, clock)
    with pytest.raises(CrossrepError, match="goes on"):
        check(listener, clock)


def test_nothing_is_a_word_that_says_nothing(bootstrap: str, topic: str, clock: Clock) -> None:
    listener = Silence(bootstrap)
    listener.assigned({(topic, 0): 0})
    check(listener, clock)
    listener.heard({})
    with pytest.raises(CrossrepError, match="goes on"):
        check(listener, clock)


def test_a_cluster_that_is_away_is_no_error(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    connect = kafka.consumer

    def impatient(*args: Any) -> Any:
        client = connect(*args)
        return SimpleNamespace(close=client.close, get_watermark_offsets=lambda place, timeout: client.get_watermark_offsets(place, 0.2))

    monkeypatch.setattr(kafka, "consumer", impatient)
    listener = Silence(f"127.0.0.1:{free_port()}")
    listener.assigned({("frames", 0): 0})
    for _ in range(3):
        check(listener, clock)


def test_what_is_added_leaves_the_others_where_they_are(bootstrap: str, topic: str, consumer: Consumer, clock: Clock) -> None:
    first, second = {(topic, 0): 0}, {(topic, 1): 0}
    listener = Silence(bootstrap)
    listener.assigned(first)
    listener.heard(reached(heard(consumer, first)))
    listener.assigned(second)
    listener.heard(reached(heard(consumer, second)))
    for _ in range(3):  # the first one has not gone back to where it began
        check(listener, clock)
    listener.assigned(first)
    listener.assigned({(topic, 1): 12})
    check(listener, clock)
    with pytest.raises(CrossrepError, match=rf"{topic}\[0\] goes on"):  # nor is it forgotten
        check(listener, clock)


def test_nothing_is_to_be_heard_of_what_is_unassigned(bootstrap: str, topic: str, clock: Clock) -> None:
    listener = Silence(bootstrap)
    listener.assigned({(topic, 0): 0, (topic, 1): 0})
    check(listener, clock)
    listener.unassigned()
    for _ in range(3):
        check(listener, clock)
