"""The join under SIGKILL, rebalances and bad events, on a real broker: every impression one sample, with the label its clicks give it."""

from __future__ import annotations

import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from confluent_kafka import Producer

from crossrep import kafka
from crossrep.spec import Space
from crossrep.training.samples import CODEC
from schemas import codec
from state import dead_letters, faults
from tests import cluster
from tests.cluster import Workers, new_space, wait_for
from tests.streams.small_model import nothing_open

WINDOW = 2.0  # seconds
START = 1_650_000_000_000


class Load:
    """Impressions and clicks in the past, some clicks before their impressions, some after their windows, some of nothing."""

    def __init__(self, space: Space, bootstrap: str):
        self.space, self.now = space, START
        self.labels: dict[str, int | None] = {}  # impression id -> first click within the window
        self.refused: Counter[str] = Counter()
        self._held: list[dict[str, Any]] = []  # clicks that come late
        self._random = np.random.default_rng(0)
        self._producer: Producer = kafka.producer(bootstrap, partitioner="murmur2_random")

    def send(self, impressions: int) -> None:
        for _ in range(impressions):
            number, chance = len(self.labels), self._random
            self.now += int(chance.integers(0, 40))
            shown = event(f"e{number}", f"u{chance.integers(50)}", f"i{chance.integers(30)}", self.now - int(chance.integers(0, 300)))
            kind = chance.integers(10)
            delay = {0: 0, 1: 500, 2: 1500, 3: 5000, 6: 1000}.get(int(kind))
            clicked = None if delay is None else shown["event_time"] + delay
            click = {**shown, "event_id": f"c{number}", "impression_id": shown["event_id"], "event_time": clicked}
            if kind == 1:
                self._click(click)  # it comes before its impression
            self._show(shown)
            if kind in (0, 2, 3):
                self._click(click)
            if kind == 4:
                self._click({**click, "impression_id": "never shown", "event_time": shown["event_time"]})
            if kind == 5:
                self._show(shown)
            if kind == 6:
                self._held.append(click)
            within = clicked is not None and delay is not None and delay <= WINDOW * 1000
            self.labels[shown["event_id"]] = clicked if within else None
            self.refused["impression"] += int(kind in (3, 4))
        assert self._producer.flush(30) == 0

    def garbage(self) -> None:
        """What is no event, and an event of long ago."""
        for topic, value, reason in (
            (self.space.inputs.impressions, b"no event", "schema"),
            (self.space.inputs.impressions, codec("impression").encode(event("", "u1", "i1", 10))[:-3], "undecodable"),
            (self.space.inputs.impressions, codec("impression").encode(event("", "", "i1", START)), "id"),
            (self.space.inputs.impressions, codec("impression").encode(event("old", "u1", "i1", START - 7_200_000)), "late"),
            (self.space.inputs.clicks, None, "empty"),
            (self.space.inputs.clicks, codec("click").encode(event("", "u1", "i1", 2**62)), "time"),
            (self.space.inputs.clicks, codec("click").encode(event("", "u1", "i1", START)), "impression"),
        ):
            self._producer.produce(topic, value, "u1")
            self.refused[reason] += 1
        assert self._producer.flush(30) == 0

    def age(self, seconds: float) -> None:
        """Let event time go on, in every partition, and then send the clicks that are late."""
        self.now += int(seconds * 1000)
        for user in range(50):
            shown = event(f"e{len(self.labels)}", f"u{user}", "i0", self.now)
            self._show(shown)
            self.labels[shown["event_id"]] = None
        assert self._producer.flush(30) == 0
        time.sleep(1)  # a worker that has read all that would otherwise merge them where they belong
        for click in self._held:
            self._click(click)
        self._held = []
        assert self._producer.flush(30) == 0

    def _show(self, event: dict[str, Any]) -> None:
        self._producer.produce(self.space.inputs.impressions, codec("impression").encode(event), event["user_id"])

    def _click(self, event: dict[str, Any]) -> None:
        self._producer.produce(self.space.inputs.clicks, codec("click").encode(event), event["user_id"])


def event(id: str, user: str, item: str, time: int) -> dict[str, Any]:
    return {"event_id": id, "user_id": user, "item_id": item, "event_time": time, "scenario": "feed", "branch": "content"}


def start(workers: Workers, path: Path, name: str, fault: str | None = None, port: int | None = None) -> Any:
    more = ["--port", str(port or cluster.free_port()), "--session-timeout", "3", "--window", f"{WINDOW:g}s", "--lateness", "1h"]
    return workers.start("samples", str(path), "--name", name, *more, fault=fault)


def written(space: Space, bootstrap: str) -> dict[str, list[dict[str, Any]]]:
    """Every committed sample record, by sample id, in the topic's order."""
    found: dict[str, list[dict[str, Any]]] = {}
    for message in kafka.messages(bootstrap, space.samples_topic, kafka.bounds(bootstrap, space.samples_topic)):
        sample = CODEC.decode(message.value())
        assert message.key().decode() == sample["user_id"]
        found.setdefault(sample["sample_id"], []).append(sample)
    return found


def letters(space: Space, bootstrap: str) -> Counter[str]:
    """The reasons of all dead letters; none may be there twice."""
    messages = kafka.messages(bootstrap, space.dead_letters_topic, kafka.bounds(bootstrap, space.dead_letters_topic))
    found = [dead_letters.CODEC.decode(message.value()) for message in messages]
    places = Counter((letter["topic"], letter["partition"], letter["offset"]) for letter in found)
    assert not found or max(places.values()) == 1, "the same letter twice"
    return Counter(letter["reason"] for letter in found)


def prove(space: Space, bootstrap: str, load: Load) -> None:
    found = written(space, bootstrap)
    for records in found.values():
        labels = [record["clicked_at"] for record in records]
        assert len(set(labels)) == len(labels), f"a sample was written twice: {records}"
        assert labels[0] is None or len(labels) == 1 or labels == sorted(labels, reverse=True)
    last = [records[-1] for records in found.values()]
    assert len(last) == len(load.labels)
    assert {sample["impression_id"]: sample["clicked_at"] for sample in last} == load.labels
    assert all(sample["label"] == (sample["clicked_at"] is not None) for sample in last)
    assert sum(len(records) > 1 for records in found.values()) > 0, "no label was corrected"


def test_killed_at_every_fault_point_stopped_and_given_garbage(bootstrap: str, workers: Workers, tmp_path: Path) -> None:
    space, path = new_space(bootstrap, tmp_path)
    load = Load(space, bootstrap)
    points = [point for point in faults.POINTS if point.startswith("samples.")]
    for four in (points[::2], points[1::2]):
        victims = [start(workers, path, f"w{i}", f"{p}:{1 if p in points[-2:] else 30}") for i, p in enumerate(four)]
        deadline = time.monotonic() + 60
        while any(victim.poll() is None for victim in victims):
            load.send(40)
            time.sleep(0.05)
            assert time.monotonic() < deadline, f"one of {four} was never passed\n{workers.logs()}"
        assert all(victim.returncode == -signal.SIGKILL for victim in victims), f"{four}\n{workers.logs()}"
    port = cluster.free_port()
    zombie = start(workers, path, "w0")
    start(workers, path, "w1", port=port)
    wait_for(lambda: cluster.ready(port), "the second has its partitions")
    load.send(100)
    zombie.send_signal(signal.SIGSTOP)  # with events in memory, perhaps within a transaction; the other takes over
    load.send(300)
    load.age(10)
    try:
        wait_for(lambda: len(written(space, bootstrap)) == len(load.labels), "all written")
        zombie.send_signal(signal.SIGCONT)
        load.send(100)
        load.garbage()
        load.age(10)
        load.age(7200)  # clicks that nobody has met are dead letters
        wait_for(lambda: len(written(space, bootstrap)) == len(load.labels), "all written again")
        wait_for(lambda: letters(space, bootstrap) == load.refused and nothing_open(space.samples_topic, bootstrap), "all letters")
    except AssertionError as error:
        raise AssertionError(f"{error}\n{letters(space, bootstrap)} {load.refused}\n{workers.logs()}") from None
    prove(space, bootstrap, load)
