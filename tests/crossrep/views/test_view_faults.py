"""A reader whose broker is stopped, killed and paused: it answers with what it has, says how old that is, and goes on where it was."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from confluent_kafka import Consumer, KafkaError, TopicPartition

from crossrep import CrossrepError, LocalView, kafka
from crossrep.columnar.records import RecordLayout
from crossrep.control import spaces
from crossrep.keys import Keys
from crossrep.spec import Space
from crossrep.views.follow import CLOSE_TIMEOUT, LOST, PASSING, Follower
from streams import broker
from tests.cluster import new_space, wait_for

IDS = [f"k{i}" for i in range(300)]


@pytest.fixture(scope="module")
def kafka_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A broker of this module's own, which its tests may stop, kill and pause."""
    folder = tmp_path_factory.mktemp("own-kafka")
    broker.up(folder, progress=False)
    yield folder
    broker.down(folder, kill=True)


@contextlib.contextmanager
def paused(running: broker.Broker) -> Iterator[None]:
    os.kill(running.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(running.pid, signal.SIGCONT)


class Stream(threading.Thread):
    """Writes numbered records of IDS without end; what the broker does not take at once is sent again until it does."""

    def __init__(self, space: Space, bootstrap: str):
        super().__init__(daemon=True)
        self.topic, self.partitions = space.representations_topic("user"), Keys.of(IDS).partitions(space.partitions).tolist()
        self.sent: list[list[int]] = [[] for _ in range(space.partitions)]  # per partition, in order
        self._layout, self._producer = RecordLayout(space, "user"), kafka.producer(bootstrap)
        self._stopped = threading.Event()

    def run(self) -> None:
        record, number = self._layout.empty(1), 0
        while not self._stopped.wait(0.02):
            for _ in range(10):
                key = number * 7 % len(IDS)
                record["source_offset"] = record["count"] = number
                record["event_time"] = 1e9 + number
                self._producer.produce(self.topic, record.tobytes(), IDS[key], partition=self.partitions[key])
                self.sent[self.partitions[key]].append(number)
                number += 1
            self._producer.poll(0)

    def stop(self) -> None:
        self._stopped.set()
        self.join(10)
        assert self._producer.flush(60) == 0


class Watcher(threading.Thread):
    """Asks a view again and again, and notes what a reader must never see."""

    def __init__(self, view: LocalView):
        super().__init__(daemon=True)
        self.view, self.wrong, self.slowest = view, "", 0.0
        self._stopped = threading.Event()

    def run(self) -> None:
        newest = np.full(len(IDS), -1)
        while not self._stopped.wait(0.01) and not self.wrong:
            asked = time.monotonic()
            try:
                answer = self.view.get(IDS)
            except CrossrepError as error:
                self.wrong = str(error)
                return
            self.slowest = max(self.slowest, time.monotonic() - asked)
            back = np.flatnonzero(answer.source_offsets < newest)
            if len(back) or (answer.counts != np.maximum(answer.source_offsets, 0)).any():
                self.wrong = f"{IDS[back[0]] if len(back) else 'a record'} went back, or is a mixture"
            newest = answer.source_offsets

    def stop(self) -> None:
        self._stopped.set()
        self.join(10)


def took(started: float) -> float:
    return time.monotonic() - started


def test_a_view_outlives_its_broker_and_goes_on_where_it_was(kafka_folder: Path, tmp_path: Path) -> None:
    running = broker.up(kafka_folder, progress=False)
    space, _ = new_space(running.bootstrap, tmp_path)
    layout, topic = RecordLayout(space, "user"), space.representations_topic("user")
    applied: list[list[int]] = [[] for _ in range(space.partitions)]
    partition = dict(zip((id.encode() for id in IDS), Keys.of(IDS).partitions(space.partitions).tolist()))

    def note(keys: list[bytes], values: list[bytes | None]) -> None:
        numbers = layout.decode([value for value in values if value is not None])["source_offset"].astype(int).tolist()
        applied[partition[keys[0]]] += numbers

    stream = Stream(space, running.bootstrap)
    follower = Follower(topic, note, running.bootstrap)
    with LocalView("user", space.name, running.bootstrap) as view:
        watcher = Watcher(view)
        stream.start()
        watcher.start()
        view.wait(30)

        def fresh(what: str) -> None:
            newest = int(view.get(IDS).counts.max())
            wait_for(lambda: view.staleness < 3 and int(view.get(IDS).counts.max()) > newest, what, 30)

        def away(seconds: float) -> None:
            """The view says for how long it has not heard, and shows what it has."""
            wait_for(lambda: view.staleness > seconds, "the view knows that it is stale", seconds + 10)
            assert len(view) == len(IDS) and view.get(IDS).found.all() and view.caught_up

        wait_for(lambda: len(view) == len(IDS), "all keys are there")
        fresh("fresh at first")
        broker.down(kafka_folder)
        away(4)
        broker.up(kafka_folder, progress=False)
        fresh("fresh after a stop")
        broker.down(kafka_folder, kill=True)
        running = broker.up(kafka_folder, progress=False)
        fresh("fresh after a crash")
        with paused(running):
            started = time.monotonic()
            with pytest.raises(CrossrepError, match=r"no Kafka answers|fell silent"):
                LocalView("user", space.name, running.bootstrap)
            assert took(started) < 30
            away(14)
            assert took(started) >= 13
        fresh("fresh after a pause")

        stream.stop()
        ended = time.monotonic()
        wait_for(lambda: max(view.staleness, follower.staleness) < took(ended), "all that was written is said to be here", 30)
        assert view.lag == follower.lag == 0
        watcher.stop()
        assert not watcher.wrong and watcher.slowest < 5, (watcher.wrong, watcher.slowest)
        assert applied == stream.sent  # nothing twice, nothing left out, in order
        assert follower.records == view._live.follower.records == sum(map(len, stream.sent))
        with LocalView("user", space.name, running.bootstrap) as anew:
            anew.wait(30)
            one, two = view.get(IDS), anew.get(IDS)
            assert one.found.all() and (one.source_offsets == two.source_offsets).all() and (one.counts == two.counts).all()
            assert view.stream_time == anew.stream_time
    follower.close()


def test_nothing_waits_longer_than_it_was_told(kafka_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running = broker.up(kafka_folder, progress=False)
    space, _ = new_space(running.bootstrap, tmp_path)
    topic = space.representations_topic("user")
    views = [LocalView("user", space.name, running.bootstrap) for _ in range(2)]
    for view in views:
        view.wait(30)

    def closes_at_once(what: LocalView | Follower) -> None:
        started = time.monotonic()
        what.close()
        assert took(started) < CLOSE_TIMEOUT + 0.5

    def waits_as_told() -> None:
        follower, started = Follower(topic, lambda keys, values: None, running.bootstrap), time.monotonic()
        with pytest.raises(TimeoutError, match="the cluster has not said where the topic ends"):
            follower.wait(1)
        assert 1 <= took(started) < 2
        assert follower.staleness == float("inf") and follower.lag == 0
        closes_at_once(follower)

    # It falls silent at the worst moment: whoever reads the spaces has asked everything, and waits for the records.
    class Silent(Consumer):
        def assign(self, partitions: list[TopicPartition]) -> None:
            os.kill(running.pid, signal.SIGSTOP)
            super().assign(partitions)

    monkeypatch.setattr(kafka, "Consumer", Silent)
    monkeypatch.setattr(spaces, "READ_WITHIN", 6.0)
    try:
        started = time.monotonic()
        with pytest.raises(CrossrepError, match=r"does not hand out topic spaces within 6 s.*fell silent"):
            spaces.read_all(running.bootstrap)
        assert 6 <= took(started) < 9
        monkeypatch.setattr(kafka, "Consumer", Consumer)
        closes_at_once(views[0])
        waits_as_told()
    finally:
        os.kill(running.pid, signal.SIGCONT)

    broker.down(kafka_folder, kill=True)
    started = time.monotonic()
    with pytest.raises(CrossrepError, match="no Kafka answers"):
        LocalView("user", space.name, running.bootstrap)
    assert took(started) < 6
    closes_at_once(views[1])
    waits_as_told()


def test_a_consumer_that_falls_silent_is_replaced(kafka_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As librdkafka's may when its broker restarts. Here the first one is paused behind the view's back."""
    running = broker.up(kafka_folder, progress=False)
    space, _ = new_space(running.bootstrap, tmp_path)
    consumers: list[Recorded] = []

    class Recorded(Consumer):
        def assign(self, partitions: list[TopicPartition]) -> None:
            super().assign(partitions)
            if partitions[0].topic != spaces.SPACES_TOPIC:
                consumers.append(self)

    stream = Stream(space, running.bootstrap)
    stream.start()
    monkeypatch.setattr("crossrep.views.follow.STALLED_AFTER", 3.0)
    monkeypatch.setattr(kafka, "Consumer", Recorded)
    with LocalView("user", space.name, running.bootstrap) as view:
        wait_for(lambda: len(consumers) == 1 and len(view) == len(IDS) and view.staleness < 10, "it follows")
        consumers[0].pause(consumers[0].assignment())
        wait_for(lambda: view.staleness > 2.5, "nothing comes")
        assert len(consumers) == 1
        wait_for(lambda: len(consumers) == 2 and view.staleness < 2.5, "another consumer follows", 15)
        stream.stop()
        ended = time.monotonic()
        wait_for(lambda: view.staleness < took(ended), "all that was written is said to be here", 30)
        assert view._live.follower.records == sum(map(len, stream.sent)) and len(consumers) == 2


def test_what_passes_is_not_taken_for_the_end() -> None:
    """What a fetch may meet while brokers come and go; the real ones above rarely show it."""
    passing = {"_TRANSPORT", "_ALL_BROKERS_DOWN", "_TIMED_OUT", "NOT_LEADER_FOR_PARTITION", "LEADER_NOT_AVAILABLE", "REQUEST_TIMED_OUT"}
    assert {getattr(KafkaError, name) for name in passing} <= PASSING
    ending = {"TOPIC_AUTHORIZATION_FAILED", "_BAD_MSG", "MSG_SIZE_TOO_LARGE", "_FATAL", "_AUTO_OFFSET_RESET", "UNKNOWN"}
    assert not {getattr(KafkaError, name) for name in ending} & PASSING and not LOST & PASSING
