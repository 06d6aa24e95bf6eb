"""What other teams use: LocalView and FrameWriter, on a real broker."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from confluent_kafka import TopicPartition

from crossrep import CrossrepError, FrameWriter, LocalView, SpaceError, kafka
from crossrep.aggregates import Aggregates
from crossrep.keys import Keys
from crossrep.records import RecordLayout
from crossrep.spec import Space
from crossrep.writer import rows_of
from tests.cluster import ROOT, new_space, wait_for

HOUR = 3600.0


@pytest.fixture
def space(bootstrap: str, tmp_path: Path) -> Space:
    return new_space(bootstrap, tmp_path)[0]


def sources(n: int, value: float = 1.0) -> dict[str, np.ndarray[Any, Any]]:
    return {"cr": np.full((n, 8), value, "f4"), "ur": np.full((n, 4), value, "f4"), "ir": np.full((n, 4), value, "f4")}


class Records:
    """Writes records as a fold worker would, without one."""

    def __init__(self, space: Space, bootstrap: str, entity: str = "user"):
        self._space, self._entity, self._layout = space, entity, RecordLayout(space, entity)
        self._topic = space.representations_topic(entity)
        self._producer = kafka.transactional_producer(bootstrap, f"test.{space.name}.{entity}", 30.0)
        self._producer.init_transactions(30)

    def put(
        self, ids: list[Any], times: float, event: str = "impression", value: float = 1.0, vectors: Any = None, abort: bool = False
    ) -> None:
        given = sources(len(ids), value) if vectors is None else {**sources(len(ids)), "cr": vectors}
        rows = rows_of(self._space, self._entity, ids, event, np.full(len(ids), times), given)
        state = Aggregates(self._layout, len(ids))
        state.fold(np.arange(len(ids), dtype=np.int32), rows)
        records = state.records(np.arange(len(ids), dtype=np.int32))
        self._send([(key, record.tobytes()) for key, record in zip(rows.keys.tolist(), records)], abort)

    def delete(self, ids: list[Any]) -> None:
        self._send([(key, None) for key in Keys.of(ids).tolist()])

    def _send(self, records: list[tuple[bytes, bytes | None]], abort: bool = False) -> None:
        self._producer.begin_transaction()
        partitions = Keys.of([key for key, _ in records]).partitions(self._space.partitions).tolist()
        for (key, value), partition in zip(records, partitions):
            self._producer.produce(self._topic, value, key, partition=partition)
        if abort:
            self._producer.flush(30)
            self._producer.abort_transaction(30)
        else:
            self._producer.commit_transaction(30)


def test_look_ups(bootstrap: str, space: Space) -> None:
    records = Records(space, bootstrap)
    records.put(["a", 17, "ünï"], 1e9, "click", 2.0)
    records.put(["b"], 1e9 + 2 * HOUR)
    with LocalView("user", space.name, bootstrap) as view:
        view.wait(60)
        assert view.caught_up and view.lag == 0 and len(view) == 4
        assert sorted(view.ids()) == ["17", "a", "b", "ünï"]
        assert view.stream_time == 1e9 + 2 * HOUR
        answer = view.get(["a", "nobody", "b", 17, b"17", "17", "ünï", "ünï".encode(), "a"])
        assert answer.found.tolist() == [True, False, True, True, True, True, True, True, True]
        assert answer.counts.tolist() == [1, 0, 1, 1, 1, 1, 1, 1, 1]
        assert answer.event_times.tolist()[:3] == [1e9, -np.inf, 1e9 + 2 * HOUR]
        assert set(answer) == {"cr", "ur", "clicks"} and answer.at == view.stream_time
        # The half-life is one hour: two later, a click of weight 4 is worth 1.
        np.testing.assert_allclose(answer["cr"].weights[:4], [1.0, 0.0, 1.0, 1.0])
        np.testing.assert_allclose(view.get(["a"], at=1e9)["cr"].weights, [4.0])
        np.testing.assert_allclose(view.get(["a"], at=1e9 + HOUR)["cr"].weights, [2.0])
        np.testing.assert_allclose(view.get(["a"], at=0.0)["cr"].weights, [4.0])  # an older clock leaves it whole
        assert (answer["cr"].vectors[[0, 3, 4]] == 2).all() and (answer["cr"].vectors[1] == 0).all()
        assert answer["cr"].vectors.shape == (9, 8) and answer["clicks"].vectors.shape == (9, 0)
        assert np.isnan(answer["ur"].weights).all()
        assert answer["ur"].times[1] == -np.inf and answer["ur"].times[0] == 1e9
        # b was never clicked.
        assert answer["clicks"].weights[2] == 0 and answer["clicks"].times[2] == -np.inf
        assert len(view.get([]).found) == 0
        for wrong in ("", "x" * 65):
            with pytest.raises(ValueError, match="1 to 64"):
                view.get(["a", wrong])
        answer["cr"].vectors[:] = 7  # an answer is the caller's own
        assert (view.get(["a"])["cr"].vectors == 2).all()


def test_an_empty_space(bootstrap: str, space: Space) -> None:
    with LocalView("item", space.name, bootstrap) as view:
        view.wait(60)
        assert len(view) == 0 and view.ids() == [] and view.stream_time == -np.inf
        answer = view.get(["a"])
        assert not answer.found[0] and answer["cr"].weights[0] == 0 and (answer["cr"].vectors == 0).all()
        assert view.nearest("cr", np.ones(8)) == []


def test_a_view_keeps_following_and_grows_and_forgets(bootstrap: str, space: Space) -> None:
    records = Records(space, bootstrap)
    records.put(["a"], 1e9)
    with LocalView("user", space.name, bootstrap) as view:
        view.wait(60)
        records.put(["b"], 1e9 + 5, value=3.0)
        wait_for(lambda: bool(view.get(["b"]).found[0]), "b arrives")
        records.put(["never"], 2e9, abort=True)
        many = [f"k{i}" for i in range(5000)]
        for start in range(0, 5000, 1250):
            records.put(many[start : start + 1250], 1e9 + 10, value=float(start))
        wait_for(lambda: len(view) == 5002, "all arrive")
        assert not view.get(["never"]).found[0] and view.stream_time == 1e9 + 10
        answer = view.get(["a", "b", *many])
        assert answer.found.all()
        assert answer["ur"].vectors[:, 0].tolist() == [1.0, 3.0, *(float(i // 1250 * 1250) for i in range(5000))]
        records.put(["a"], 1e9 + 20, value=9.0)
        wait_for(lambda: float(view.get(["a"])["ur"].vectors[0, 0]) == 9.0, "a changes")
        records.delete(["b", *many[:3000], "never there"])
        wait_for(lambda: len(view) == 2001, "they are forgotten")
        assert not view.get(["b", *many[:3000]]).found.any() and view.get(["a", *many[3000:]]).found.all()
        assert set(view.ids()) == {"a", *many[3000:]}
        records.put(["b", "c"], 1e9 + 30, value=4.0)
        wait_for(lambda: len(view) == 2003, "they come back")
        again = view.get(["b", "c", "a", many[-1], many[0]])
        assert again["ur"].vectors[:, 0].tolist() == [4.0, 4.0, 9.0, 3750.0, 0.0]
        wait_for(lambda: view.lag == 0, "the end is seen")
    with LocalView("user", space.name, bootstrap) as fresh:  # and one that starts now sees the same
        fresh.wait(60)
        assert len(fresh) == 2003 and fresh.get(["b"])["ur"].vectors[0, 0] == 4.0


def test_nearest(bootstrap: str, space: Space) -> None:
    vectors = np.zeros((5, 8), "f4")
    vectors[0, 0], vectors[1, :2], vectors[2, 1], vectors[3, 0] = 1, (3, 1), 5, -2  # the last one is all zero
    Records(space, bootstrap).put(["east", "about east", "north", "west", "nowhere"], 1e9, vectors=vectors)
    with LocalView("user", space.name, bootstrap) as view:
        view.wait(60)
        found = view.nearest("cr", "east")
        assert found[0][0] == "about east" and found[-1][0] == "west"
        np.testing.assert_allclose(sorted(cosine for _, cosine in found), [-1, 0, 0, 3 / np.sqrt(10)], rtol=1e-6)
        assert [name for name, _ in view.nearest("cr", vectors[2] * 9, 2)] == ["north", "about east"]
        assert len(view.nearest("cr", "east", 1)) == 1 and view.nearest("cr", b"east", 1)[0][0] == "about east"
        for column, to, message in (("cr", "nobody", "not held"), ("clicks", "east", "no vectors"), ("typo", "east", "no vectors")):
            with pytest.raises(KeyError, match=message):
                view.nearest(column, to)


def test_what_does_not_exist_is_named(bootstrap: str, space: Space) -> None:
    with pytest.raises(SpaceError, match=rf"no space 'nowhere'.*{space.name}"):
        LocalView("user", "nowhere", bootstrap)
    with pytest.raises(SpaceError, match="no entity 'advertiser'; it has user, item"):
        LocalView("advertiser", space.name, bootstrap)
    with pytest.raises(SpaceError, match="no space 'nowhere'"):
        FrameWriter("nowhere", "w", bootstrap)


def test_a_record_that_is_not_one_fails_the_view_loudly(bootstrap: str, space: Space) -> None:
    Records(space, bootstrap).put(["a"], 1e9)
    with LocalView("user", space.name, bootstrap) as view:
        view.wait(60)
        producer = kafka.producer(bootstrap)
        producer.produce(space.representations_topic("user"), b"garbage", "b", partition=0)
        assert producer.flush(30) == 0

        def failed() -> bool:
            try:
                return not view.caught_up
            except CrossrepError as error:
                return space.representations_topic("user") in str(error)

        wait_for(failed, "the view says that it has failed")
        with pytest.raises(CrossrepError):
            view.wait(1)


# --- FrameWriter ---


def frames_seen(space: Space, bootstrap: str) -> int:
    """Committed frames."""
    client = kafka.consumer(bootstrap, config=kafka.ENDS)
    try:
        client.assign([TopicPartition(space.frames_topic, number, 0) for number in range(space.partitions)])
        left, seen = set(range(space.partitions)), 0
        while left:
            for message in client.consume(100, 0.1):
                if kafka.is_end(message):
                    left.discard(message.partition())
                else:
                    assert message.error() is None
                    seen += 1
        return seen
    finally:
        client.close()


def test_nothing_is_visible_before_the_commit(bootstrap: str, space: Space) -> None:
    with FrameWriter(space.name, "w", bootstrap) as writer:
        writer.write("user", ["a"], "click", [1e9], sources(1))
        assert frames_seen(space, bootstrap) == 0
        writer.commit()
        assert frames_seen(space, bootstrap) == 1
        writer.commit()  # nothing more to write
        writer.write("user", ["b"], "click", [1e9], sources(1))
    assert frames_seen(space, bootstrap) == 1  # what was not committed is dropped


def test_bad_arguments_write_nothing(bootstrap: str, space: Space) -> None:
    good: dict[str, Any] = {"entity": "user", "ids": ["a", "b"], "event": "click", "times": [1e9, 1e9], "sources": sources(2)}
    nan, huge = sources(2), sources(2)
    nan["cr"][1, 3], huge["cr"][0, 0] = np.nan, 1e6
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"entity": "advertiser"}, "no entity 'advertiser'"),
        ({"ids": ["a"]}, "1 ids"),
        ({"ids": ["a", ""]}, "1 to 64"),
        ({"ids": ["a", "x" * 65]}, "1 to 64"),
        ({"event": "purchase"}, r"'purchase' is not in the space's \[weights\]"),
        ({"event": ["click", "purchase"]}, "purchase"),
        ({"event": ["click"]}, "shape"),
        ({"times": [1e9]}, "shape"),
        ({"times": [1e9, np.nan]}, "times"),
        ({"times": [1e9, -1]}, "times"),
        ({"times": [1e9, np.inf]}, "times"),
        ({"sources": nan}, "finite"),
        ({"sources": huge}, "finite in float16"),
        ({"sources": {"cr": np.ones((2, 8))}}, "needs source 'ur'"),
        ({"sources": {**sources(2), "cr": np.ones((2, 9))}}, r"needs source 'cr' of shape \(2, 8\)"),
        ({"sources": {**sources(2), "cr": np.ones((3, 8))}}, "needs source 'cr'"),
        *(({"weights": [1.0, w]}, "weights must be") for w in (0.0, -1.0, np.nan, np.inf, 1e60)),
        ({"weights": [1.0]}, "weights must be"),
    ]
    with FrameWriter(space.name, "w", bootstrap) as writer:
        for changed, message in wrong:
            with pytest.raises(ValueError, match=message):
                writer.write(**{**good, **changed})
        writer.commit()
        assert frames_seen(space, bootstrap) == 0
        writer.write(**good)
        writer.commit()
        assert frames_seen(space, bootstrap) > 0


def test_a_second_writer_of_the_same_name_fences_the_first(bootstrap: str, space: Space) -> None:
    first = FrameWriter(space.name, "twin", bootstrap)
    first.write("user", ["a"], "click", [1e9], sources(1))
    second = FrameWriter(space.name, "twin", bootstrap)
    with pytest.raises(CrossrepError, match="nothing was written"):
        first.commit()
    second.write("user", ["b"], "click", [1e9], sources(1))
    second.commit()
    other = FrameWriter(space.name, "another", bootstrap)
    other.write("user", ["c"], "click", [1e9], sources(1))
    other.commit()
    second.write("user", ["d"], "click", [1e9], sources(1))
    second.commit()
    with pytest.raises(CrossrepError):
        first.commit()
    assert frames_seen(space, bootstrap) == 3


def test_readers_import_nothing_heavy() -> None:
    heavy = ("torch", "faust", "mode", "rocksdict", "aiokafka", "pyarrow", "state", "models", "streams")
    code = f"import sys, crossrep, crossrep.cli; found = [m for m in {heavy} if m in sys.modules]; assert not found, found"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)
