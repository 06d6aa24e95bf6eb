"""A bad message costs itself alone: it lands in the dead letters as it was, with where it stood and why, and all around it counts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from confluent_kafka import Producer, TopicPartition

from crossrep import LocalView, kafka
from crossrep.columnar import frames
from crossrep.columnar.aggregates import Aggregates
from crossrep.columnar.records import RecordLayout
from crossrep.keys import KeyIndex, Keys
from crossrep.spec import Space
from crossrep.writer import rows_of
from schemas import codec
from state import dead_letters
from tests.cluster import Workers, new_space, prove, settled, wait_for
from tests.streams.bad_samples import DAY, NOW, event, sample
from tests.streams.small_model import SPEC, consumed, inferred, nothing_open, small_dataset, start_infer


class Sent:
    """Produces messages one by one and remembers where each bad one stands and what is expected of it."""

    def __init__(self, bootstrap: str):
        self._producer: Producer = kafka.producer(bootstrap, partitioner="murmur2_random")
        self.bad: dict[tuple[str, int, int], tuple[bytes | None, bytes | None, str]] = {}

    def good(self, topic: str, key: bytes | str | None, value: bytes | None, partition: int = -1) -> None:
        self._send(topic, key, value, partition)

    def refused(self, reason: str, topic: str, key: bytes | None, value: bytes | None, partition: int = -1) -> None:
        self.bad[self._send(topic, key, value, partition)] = (key, value, reason)

    def _send(self, topic: str, key: bytes | str | None, value: bytes | None, partition: int) -> tuple[str, int, int]:
        place: list[tuple[str, int, int]] = []

        def delivered(error: Any, message: Any) -> None:
            assert error is None, error
            place.append((message.topic(), message.partition(), message.offset()))

        self._producer.produce(topic, value, key, partition=partition, on_delivery=delivered)
        assert self._producer.flush(30) == 0
        return place[0]


def letters(space: Space, bootstrap: str) -> dict[tuple[str, int, int], tuple[bytes | None, bytes | None, str]]:
    """The committed dead letters; none may be there twice."""
    client = kafka.consumer(bootstrap, config=kafka.ENDS)
    found: dict[tuple[str, int, int], tuple[bytes | None, bytes | None, str]] = {}
    try:
        client.assign([TopicPartition(space.dead_letters_topic, 0, 0)])
        while True:
            for message in client.consume(100, 0.1):
                if kafka.is_end(message):
                    return found
                assert message.error() is None
                letter = dead_letters.CODEC.decode(message.value())
                assert letter["detail"]
                place = (letter["topic"], letter["partition"], letter["offset"])
                assert place not in found, "the same letter twice"
                found[place] = (letter["key"], letter["value"], letter["reason"])
    finally:
        client.close()


def features(kind: str, id: str, values: dict[str, Any]) -> bytes:
    return codec(f"{kind}_features").encode({f"{kind}_id": id, "values": values})


def test_events(bootstrap: str, workers: Workers, tmp_path: Path) -> None:
    space, path = new_space(bootstrap, tmp_path, SPEC)
    impressions, clicks = space.inputs.impressions, space.inputs.clicks
    sent = Sent(bootstrap)
    dataset = small_dataset()
    known = {name: column[0] for name, column in dataset.user_features.items()}
    for user, values in {
        "nan": dict.fromkeys(known, float("nan")),
        "null": dict.fromkeys(known),
        "none": {},
        "strange": {**dict.fromkeys(known, 1e300), "segment": "\x00" * 1000, "no such feature": 1},
        "kept": known,
    }.items():
        sent.good(space.inputs.user_features, user, features("user", user, values))
    for value in (b"", b"\xff\xfe garbage", features("item", "kept", {}), features("user", "x" * 65, {}), features("user", "", {})):
        sent.good(space.inputs.user_features, "kept", value)  # cannot be read: what was known before stays
    sent.good(space.inputs.user_features, b"", b"no feature record")
    start_infer(workers, path)
    workers.fold(path)

    bad: list[tuple[str, str, bytes | None]] = [
        ("schema", impressions, b"\x00\x01 not avro at all"),
        ("undecodable", impressions, event()[:-3]),
        ("undecodable", impressions, event() + b"more"),
        ("undecodable", impressions, event()[:10] + b"\xff" * 40),
        ("empty", impressions, b""),
        ("empty", impressions, None),
        ("empty", clicks, b""),
        ("schema", impressions, event("click")),
        ("schema", clicks, event("impression")),
        ("schema", clicks, features("user", "u1", {})),
        ("id", impressions, event(user_id="")),
        ("id", impressions, event(item_id="")),
        ("id", impressions, event(user_id="x" * 65)),
        ("id", impressions, event(item_id="ü" * 33)),  # 66 bytes
        ("id", clicks, event("click", item_id="")),
        ("id", impressions, event(scenario="s" * 65)),
        ("time", impressions, event(event_time=-1)),
        ("time", impressions, event(event_time=int((time.time() + 420) * 1000))),
        ("time", impressions, event(event_time=2**63 - 1)),
        ("time", clicks, event("click", event_time=-(2**63))),
    ]
    good = [("u1", impressions, event()), ("u1", clicks, event("click"))]
    for user in ("nan", "null", "none", "strange", "kept", "never heard of"):
        good.append((user, impressions, event(user_id=user, item_id="unknown item")))
    good += [
        ("u2", impressions, event(user_id="u2", event_id="twice")),
        ("u2", impressions, event(user_id="u2", event_id="twice")),
        ("u3", impressions, event(user_id="u3", event_time=0)),  # very late, and still good
        ("u3", impressions, event(user_id="u3")),
        ("u3", clicks, event("click", user_id="u3", event_time=int((time.time() + 200) * 1000))),  # a producer's clock may be off a little
        ("ü" * 32, impressions, event(user_id="ü" * 32, item_id="y" * 64, scenario="s" * 64)),
        ("u4", impressions, event(user_id="u4", scenario="")),
    ]
    for at in range(max(len(bad), len(good))):
        if at < len(bad):
            reason, topic, value = bad[at]
            sent.refused(reason, topic, [b"u1", None, b"", b"\xff\x00"][at % 4], value)
        if at < len(good):
            sent.good(good[at][1], good[at][0], good[at][2])
    wait_for(lambda: inferred(space, bootstrap), "events inferred")
    wait_for(lambda: settled(space, bootstrap), "frames folded")
    assert letters(space, bootstrap) == sent.bad
    prove(space, bootstrap, dict.fromkeys(space.entities, len(good)))
    with LocalView("user", space.name, bootstrap) as view:
        view.wait(60)
        answer = view.get(["u1", "u2", "u3", "nan", "null", "none", "strange", "kept", "never heard of", "u4"])
        assert answer.counts.tolist() == [2, 2, 3, 1, 1, 1, 1, 1, 1, 1]
        assert all(np.isfinite(answer[name].vectors).all() for name in answer)
        # All features unknown, however that is said, give one and the same vector.
        ur = view.get(["nan", "null", "none", "never heard of", "kept"])["ur"].vectors
        assert (ur[1:4] == ur[0]).all() and not np.array_equal(ur[4], ur[0])


def spoilt(space: Space, change: Callable[[dict[str, Any]], None]) -> bytes:
    """A good frame of three users of partition 0, changed behind the writer's back."""
    ids = [i for i in range(100) if Keys.of([i]).partitions(space.partitions)[0] == 0][:3]
    frame = frames.CODEC.decode(frame_of(space, "user", ids))
    change(frame)
    return frames.CODEC.encode(frame)


def frame_of(space: Space, entity: str, ids: Sequence[int | str], at: float = NOW - DAY) -> bytes:
    random = np.random.default_rng(len(ids))
    sources = {name: random.normal(size=(len(ids), dim)).astype(np.float32) for name, dim in space.sources.items()}
    encoded = list(frames.encode(space, rows_of(space, entity, ids, "impression", np.full(len(ids), at), sources)))
    assert len(encoded) == 1, "ids of one partition, please"
    return encoded[0][1]


def set_array(name: str, row: int, value: float, column: int | None = None) -> Callable[[dict[str, Any]], None]:
    """Change one number of an array of the frame, or of one of its columns."""

    def change(frame: dict[str, Any]) -> None:
        place = frame if column is None else frame["columns"][column]
        array = np.frombuffer(place[name], "<f8").copy() if place[name] else np.ones(frame["rows"])
        array[row] = value
        place[name] = array.tobytes()

    return change


def set_vector(value: float) -> Callable[[dict[str, Any]], None]:
    def change(frame: dict[str, Any]) -> None:
        block = frame["vectors"][0]
        values = np.frombuffer(block["values"], block["dtype"]).copy()
        values[5] = value
        block["values"] = values.tobytes()

    return change


def replace(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda frame: frame.update({name: value})


def test_frames(bootstrap: str, workers: Workers, tmp_path: Path) -> None:
    space, path = new_space(bootstrap, tmp_path)
    other, _ = new_space(bootstrap, tmp_path, partitions=2)
    topic, good_ids = space.frames_topic, [i for i in range(400) if Keys.of([i]).partitions(space.partitions)[0] == 0]
    foreign = next(i for i in range(100) if Keys.of([i]).partitions(space.partitions)[0] == 1)
    sent, taken = Sent(bootstrap), []
    good = spoilt(space, lambda frame: None)
    bad: list[tuple[str, bytes | None]] = [
        ("schema", b"garbage"),
        ("empty", None),
        ("empty", b""),
        ("undecodable", good[:-5]),
        ("undecodable", good + b"x"),
        ("undecodable", good[:10] + b"\xff" * 100),
        ("spec", frame_of(other, "user", good_ids[:1])),
        ("entity", spoilt(space, replace("entity", "advertiser"))),
        ("length", spoilt(space, replace("rows", 2))),
        ("length", spoilt(space, replace("rows", 0))),
        ("length", spoilt(space, replace("rows", -1))),
        ("length", spoilt(space, lambda frame: frame["columns"].pop())),
        ("length", spoilt(space, lambda frame: frame["columns"].append(frame["columns"][0]))),
        ("length", spoilt(space, lambda frame: frame["columns"][0].update(vectors=7))),
        ("length", spoilt(space, lambda frame: frame["columns"][0].update(vectors=frame["columns"][1]["vectors"]))),
        ("length", spoilt(space, lambda frame: frame["columns"][0].update(weights=b"12345678"))),
        ("length", spoilt(space, lambda frame: frame["columns"][0].update(present=b"\x01"))),
        ("key", spoilt(space, replace("keys", b"1"))),
        ("key", spoilt(space, replace("key_offsets", np.array([0, 3, 1, 6], "<i4").tobytes()))),
        ("count", spoilt(space, replace("counts", np.array([1, 0, 1], "<i8").tobytes()))),
        ("count", spoilt(space, replace("counts", np.array([1, 2**62, 1], "<i8").tobytes()))),
        ("time", spoilt(space, set_array("times", 1, float("nan")))),
        ("time", spoilt(space, set_array("times", 1, -1.0))),
        ("time", spoilt(space, set_array("times", 1, float("inf")))),
        ("time", spoilt(space, set_array("times", 1, time.time() + DAY))),
        ("time", spoilt(space, set_array("times", 1, time.time() + DAY, column=0))),
        *(("vector", spoilt(space, set_vector(value))) for value in (float("nan"), float("inf"), -float("inf"))),
        *(
            ("weight", spoilt(space, set_array("weights", 2, value, column=0)))
            for value in (0.0, -1.0, float("inf"), float("nan"), 1e300, -float("inf"))
        ),
        ("partition", frame_of(space, "user", [foreign])),
    ]
    workers.fold(path)
    for number, (reason, value) in enumerate(bad):
        sent.refused(reason, topic, [None, b"", b"key"][number % 3], value, partition=0)
        ids = [good_ids[(number * 7 + n) % len(good_ids)] for n in range(5)]
        # Late ones and equal times among them.
        frame = frame_of(space, "user", ids, NOW - DAY + (number % 5) * 3600 * (-1) ** number)
        for _ in range(1 + number % 2):  # the same bytes twice are twice as many events
            sent.good(topic, None, frame, partition=0)
            taken.append(frames.decode(space, frame))
    wait_for(lambda: settled(space, bootstrap), "frames folded")
    assert letters(space, bootstrap) == sent.bad
    with LocalView("user", space.name, bootstrap) as view:
        view.wait(60)
        state = Aggregates(RecordLayout(space, "user"), 1000)
        index = KeyIndex(1000)
        for rows in taken:
            slots = index.find(rows.keys)
            index.insert(rows.keys, slots)
            state.fold(slots, rows)
        answer = view.get(index.keys(index.slots()).tolist(), at=0.0)
        slots = index.slots()
        assert answer.found.all() and len(view) == index.size
        assert answer.counts.tolist() == state.count[slots].tolist() and int(answer.counts.sum()) == sum(map(len, taken))
        for name, column in state.columns.items():
            expected = column.rows(slots)
            np.testing.assert_allclose(answer[name].vectors, expected.vectors, rtol=1e-5, atol=1e-7)
            assert np.array_equal(answer[name].times[expected.present], expected.times[expected.present])
        np.testing.assert_allclose(answer["cr"].weights, state.columns["cr"].weight[slots])
    prove(space, bootstrap, {"user": sum(map(len, taken)), "item": 0})  # and `crossrep verify` refuses what the workers refuse


def test_samples_through_crossrep_frame(bootstrap: str, workers: Workers, tmp_path: Path) -> None:
    space, path = new_space(bootstrap, tmp_path)
    topic, sent = space.inference_topic, Sent(bootstrap)
    workers.start("frame", str(path), "--name", "f", "--port", "0", "--session-timeout", "3")
    workers.fold(path)
    nan, huge = np.full(8, np.nan, "<f4").tobytes(), np.full(8, 1e6, "<f4").tobytes()
    ur, cr, ir = bytes(16), bytes(32), bytes(16)
    bad: list[tuple[str, bytes | None]] = [
        ("schema", b"garbage, long enough for a header"),
        ("schema", event()),
        ("empty", b""),
        ("empty", None),
        ("undecodable", sample(space)[:-1]),
        ("event", sample(space, event="purchase")),
        ("time", sample(space, event_time=-1)),
        ("time", sample(space, event_time=int((time.time() + 420) * 1000))),
        *(("weight", sample(space, weight=w)) for w in (0.0, -1.0, float("nan"), float("inf"), 1e60)),
        ("entity", sample(space, keys={})),
        ("entity", sample(space, keys={"user": "u", "advertiser": "a"})),
        ("id", sample(space, keys={"user": "", "item": "i"})),
        ("id", sample(space, keys={"user": "u", "item": "x" * 65})),
        ("vector", sample(space, vectors={})),
        ("vector", sample(space, vectors={"ur": ur, "cr": cr, "ir": ir[:-1]})),
        ("vector", sample(space, vectors={"ur": ur, "cr": cr + cr, "ir": ir})),
        ("vector", sample(space, vectors={"ur": ur, "cr": nan, "ir": ir})),
        ("vector", sample(space, vectors={"ur": ur, "cr": huge, "ir": ir})),  # beyond float16
        # A source no entity of the sample needs, of a wrong length: it must not shift the others' rows.
        ("vector", sample(space, keys={"user": "u"}, vectors={"ur": ur, "cr": cr, "ir": ir[:-4]})),
    ]
    good = [
        (1, 1, sample(space)),
        (1, 1, sample(space, event="impression", weight=2.5)),
        (1, 0, sample(space, keys={"user": "only"}, vectors={"ur": ur, "cr": cr})),
        (0, 1, sample(space, keys={"item": "only"}, vectors={"ir": ir, "cr": cr})),
        (1, 1, sample(space, vectors={"ur": ur, "cr": cr, "ir": ir, "unheard of": b"123"})),
    ]
    for number, (reason, value) in enumerate(bad):
        sent.refused(reason, topic, b"k", value)
        sent.good(topic, b"k", good[number % len(good)][2])
    wait_for(lambda: consumed([topic], f"frame.{space.name}", bootstrap), "samples framed")
    wait_for(lambda: nothing_open(space.frames_topic, bootstrap) and settled(space, bootstrap), "frames folded")
    assert letters(space, bootstrap) == sent.bad
    taken = [good[number % len(good)] for number in range(len(bad))]
    prove(space, bootstrap, {"user": sum(user for user, _, _ in taken), "item": sum(item for _, item, _ in taken)})
