"""The load: two writers at once, as unkind as real ones, and the truth of what Kafka acknowledged.

Half of it is events for `crossrep infer`, half is frames as another team's model writes them. Half of all events are of one user and of one
item, a tenth is late by up to days, some stretches run backwards in time, some moments burst, and now and then a message is poison.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossrep import kafka
from crossrep.columnar import frames
from crossrep.columnar.rows import Rows
from crossrep.spec import Space
from crossrep.writer import rows_of
from models.datasets import Dataset
from schemas import codec

TICK = 0.1  # seconds between two sendings
TICK_TIME = 60.0  # seconds of event time in one sending
DAY = 86_400.0
UNACKNOWLEDGED = 20_000  # messages the producer may hold while the brokers are away; no more are made then
Place = tuple[str, int, int]  # topic, partition, offset


class Load(threading.Thread):
    """Sends until stopped. The content of the n-th sending depends on the seed alone.

    Args:
        rate: events a second, each of which counts for its user and for its item.
    """

    def __init__(self, space: Space, dataset: Dataset, bootstrap: str, rate: float, seed: int):
        super().__init__(name="load", daemon=True)
        self.counts = dict.fromkeys(space.entities, 0)  # acknowledged and valid, per entity: the truth
        self.late = 0  # sent so far
        self.poison: set[Place] = set()  # acknowledged
        self.problems: list[str] = []  # what makes the truth unknown
        self._space, self._dataset, self._rate = space, dataset, rate
        self._random = np.random.default_rng(seed)
        # Never given up: whether a message that timed out was written, nobody could say.
        self._producer = kafka.producer(bootstrap, partitioner="murmur2_random", **{"message.timeout.ms": 0})
        self._time = 1.7e9
        self._backwards = 0  # sendings left of a stretch that runs backwards
        self._sent = 0
        self._going, self._idle, self._ended = threading.Event(), threading.Event(), threading.Event()

    # --- control, from other threads ---

    def resume(self) -> None:
        self._idle.clear()
        self._going.set()

    def pause(self, timeout: float) -> None:
        """Stop sending and wait until all is acknowledged, which raises AssertionError after `timeout` seconds."""
        self._going.clear()
        assert self._idle.wait(timeout), f"{len(self._producer)} messages were not acknowledged within {timeout:.0f} s"

    def stop(self) -> None:
        self._ended.set()
        self._going.set()
        if self.is_alive():
            self.join(10)

    # --- the thread ---

    def run(self) -> None:
        try:
            while not self._ended.is_set():
                if not self._going.is_set():
                    if self._producer.flush(0.5) == 0:
                        self._idle.set()
                        self._going.wait()
                elif len(self._producer) > UNACKNOWLEDGED:
                    self._producer.poll(TICK)
                else:
                    started = time.monotonic()
                    self._send()
                    self._producer.poll(0)
                    self._ended.wait(max(0.0, started + TICK - time.monotonic()))
        except Exception as error:
            self.problems.append(f"the load ended: {error!r}")

    def _send(self) -> None:
        random = self._random
        n = max(2, int(self._rate * TICK * random.exponential() * (10 if random.random() < 0.02 else 1)))
        times = self._times(n)
        users, items = self._of(self._dataset.user_ids, n), self._of(self._dataset.item_ids, n)
        clicks = random.random(n) < 0.3
        half = n // 2
        self._send_events(users[:half], items[:half], times[:half], clicks[:half])
        self._send_frames({"user": users[half:], "item": items[half:]}, times[half:], np.where(clicks[half:], "click", "impression"))

    def _times(self, n: int) -> NDArray[np.float64]:
        """Event times of one sending, in seconds since 1970."""
        random = self._random
        if self._backwards:
            self._backwards -= 1
            self._time -= TICK_TIME
        else:
            self._time += TICK_TIME
            if random.random() < 0.01:
                self._backwards = 30
                self._time += 2 * 30 * TICK_TIME  # and so ahead again behind the stretch
        times = np.sort(self._time + random.uniform(0, TICK_TIME, n))
        if self._backwards:
            times = times[::-1].copy()
        late = random.random(n) < 0.1
        self.late += int(late.sum())
        times[late] -= np.minimum(random.exponential(DAY, int(late.sum())), 5 * DAY)
        return np.round(times, 3)

    def _of(self, ids: Any, n: int) -> list[str]:
        """n ids, half of them the first one."""
        chosen = self._random.integers(1, len(ids), n)
        chosen[self._random.random(n) < 0.5] = 0
        return [ids[i] for i in chosen]

    def _send_events(self, users: list[str], items: list[str], times: NDArray[np.float64], clicks: NDArray[np.bool_]) -> None:
        inputs = self._space.inputs
        for user, item, moment, click in zip(users, items, (times * 1000).astype(int).tolist(), clicks.tolist()):
            self._sent += 1
            event = {"event_id": f"c{self._sent}", "user_id": user, "item_id": item, "event_time": moment, "scenario": "feed"}
            event["branch"] = "ad" if self._sent % 7 == 0 else "content"
            if click:
                self._produce(inputs.clicks, codec("click").encode({**event, "impression_id": "i"}), user, self._counted(*self.counts))
            else:
                self._produce(inputs.impressions, codec("impression").encode(event), user, self._counted(*self.counts))
        if len(users) and self._random.random() < 0.05:
            value = _poison_event(int(self._random.integers(4)), event)
            self._produce(inputs.impressions, value, users[0], self._poisoned)

    def _send_frames(self, ids: dict[str, list[str]], times: NDArray[np.float64], events: NDArray[np.str_]) -> None:
        n = len(times)
        sources = {name: self._random.normal(0.3, 1.0, (n, dim)).astype(np.float32) for name, dim in self._space.sources.items()}
        for entity in self._space.entities:
            rows = rows_of(self._space, entity, ids[entity], events, times, sources)
            for partition, frame, count in _frames(self._space, rows):
                self._produce(self._space.frames_topic, frame, None, self._counted(entity, rows=count), partition)
        if self._random.random() < 0.05:
            value = _poison_frame(int(self._random.integers(6)), frame)
            # To the next partition: one of the kinds is a good frame whose keys belong to another partition.
            self._produce(self._space.frames_topic, value, None, self._poisoned, (partition + 1) % self._space.partitions)

    def _produce(self, topic: str, value: bytes | None, key: str | None, told: Callable[[Any], None], partition: int = -1) -> None:
        def delivered(error: Any, message: Any) -> None:
            if error is None:
                told(message)
            else:
                self.problems.append(f"a message for {topic} was refused, so the truth is unknown: {error.str()}")

        self._producer.produce(topic, value, key, partition=partition, on_delivery=delivered)

    def _counted(self, *entities: str, rows: int = 1) -> Callable[[Any], None]:
        def told(message: Any) -> None:
            for entity in entities:
                self.counts[entity] += rows

        return told

    def _poisoned(self, message: Any) -> None:
        self.poison.add((message.topic(), message.partition(), message.offset()))


def _frames(space: Space, rows: Rows) -> list[tuple[int, bytes, int]]:
    """Partition, frame and number of rows."""
    return [(partition, frame, frames.CODEC.decode(frame)["rows"]) for partition, frame in frames.encode(space, rows, max_rows=256)]


def _poison_event(kind: int, good: dict[str, Any]) -> bytes | None:
    encode = codec("impression").encode
    if kind == 0:
        return b"not an event"
    if kind == 1:
        return encode(good)[:-3]
    if kind == 2:
        return encode({**good, "event_time": int((time.time() + 30 * DAY) * 1000)})
    return encode({**good, "item_id": ""})


def _poison_frame(kind: int, good: bytes) -> bytes | None:
    frame = frames.CODEC.decode(good)
    if kind == 0:
        return b"not a frame"
    if kind == 1:
        return good[: len(good) // 2]
    if kind == 2:
        return good  # in another partition than its keys
    if kind == 3:
        return frames.CODEC.encode({**frame, "space_hash": bytes(len(frame["space_hash"]))})
    if kind == 4:
        return frames.CODEC.encode({**frame, "times": np.full(frame["rows"], time.time() + 30 * DAY).tobytes()})
    vectors = [{**block, "values": b"\xff" * len(block["values"])} for block in frame["vectors"]]  # NaN
    return frames.CODEC.encode({**frame, "vectors": vectors})
