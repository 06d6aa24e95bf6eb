"""What other teams read with: LocalView, on a real broker."""

from __future__ import annotations

import re
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from confluent_kafka import KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource, NewTopic, ResourceType

from crossrep import CrossrepError, FrameWriter, LocalView, SpaceError, kafka
from crossrep.columnar.aggregates import Aggregates
from crossrep.columnar.records import RecordLayout
from crossrep.keys import Keys
from crossrep.spec import Space
from crossrep.views.table import RecordTable
from crossrep.writer import rows_of
from tests.alone import alone
from tests.cluster import ROOT, SPEC, new_space, wait_for

HOUR = 3600.0


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

    def replay(self, id: str, counts: list[int | None]) -> None:
        """One key's history in one transaction, and so in one run: a record with each count, None for a deletion."""
        records = self._layout.empty(len(counts))
        records["count"] = records["source_offset"] = [count or 0 for count in counts]
        history = [None if count is None else record.tobytes() for count, record in zip(counts, records)]
        self._send([(id.encode(), value) for value in history])

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


def test_a_deleted_key_leaves_no_trace_and_its_slot_is_used_again(bootstrap: str, space: Space) -> None:
    records = Records(space, bootstrap)
    records.put([f"k{i}" for i in range(1000)], 1e9)
    with LocalView("user", space.name, bootstrap) as view:
        view.wait(60)
        taken = view.memory_bytes
        for turn in range(3):  # each time as many new keys as the table has room for
            records.delete([*view.ids(), "never there"])
            wait_for(lambda: len(view) == 0, "all are gone")
            assert view.ids() == [] and view.nearest("cr", np.ones(8)) == []
            gone = view.get(["k1"])
            assert not gone.found[0] and gone.counts[0] == 0 and gone.source_offsets[0] == -1 and (gone["cr"].vectors == 0).all()
            with pytest.raises(KeyError, match="not held"):
                view.nearest("cr", "k1")
            records.put([f"t{turn}-{i}" for i in range(1000)], 1e9 + turn)
            wait_for(lambda: len(view) == 1000, "others have come")
        assert view.memory_bytes == taken and set(view.ids()) == {f"t2-{i}" for i in range(1000)}


def test_within_a_run_the_last_record_or_deletion_of_a_key_counts(bootstrap: str, space: Space) -> None:
    records = Records(space, bootstrap)
    records.replay("returns", [1, 2, None, 4])
    records.replay("leaves", [1, None, 3, None])
    records.replay("never was", [None])
    with LocalView("user", space.name, bootstrap) as view:
        view.wait(60)
        assert view.ids() == ["returns"] and view.get(["returns"]).counts[0] == 4 and view.get(["returns"]).source_offsets[0] == 4
        records.replay("returns", [None, 6])
        records.replay("leaves", [None, 5, 6])
        wait_for(lambda: view.get(["returns", "leaves"]).counts.tolist() == [6, 6], "both are back")
        records.replay("returns", [7, None])
        wait_for(lambda: view.ids() == ["leaves"], "one leaves")


# --- A topic that is no longer what it was ---


def ended(view: LocalView) -> str:
    """Why the view ended, once it has."""

    def alive() -> bool:
        try:
            return view.caught_up
        except CrossrepError:
            return False

    wait_for(lambda: not alive(), "the view ends", 15)
    questions: list[Callable[[], Any]] = [
        lambda: view.get(["a"]),
        lambda: view.ids(),
        lambda: view.nearest("cr", np.ones(8)),
        lambda: len(view),
        lambda: view.lag,
        lambda: view.staleness,
        lambda: view.stream_time,
    ]
    for question in questions:
        with pytest.raises(CrossrepError, match="new view"):
            question()
    with pytest.raises(CrossrepError) as error:
        view.wait(1)
    return str(error.value)


@pytest.mark.parametrize(("held", "anew"), [(True, False), (True, True), (False, True)])
def test_a_topic_deleted_or_created_anew_ends_its_views(bootstrap: str, space: Space, held: bool, anew: bool) -> None:
    """With nothing held the view's position exists in the new topic too, and a consumer would read on."""
    topic, admin = space.representations_topic("user"), kafka.admin(bootstrap)
    if held:
        Records(space, bootstrap).put(["a"], 1e9)
    with LocalView("user", space.name, bootstrap) as view:
        view.wait(60)
        wait_for(lambda: view.staleness < 10, "the end is seen")
        admin.delete_topics([topic])[topic].result(30)
        if anew:
            new = NewTopic(topic, space.partitions, config={"cleanup.policy": "compact"})
            wait_for(lambda: created(admin, new), "the topic can be created again")
        reason = ended(view)
        assert topic in reason and ("deleted and created anew" if anew else "was deleted. Create it again") in reason


def created(admin: AdminClient, topic: NewTopic) -> bool:
    try:
        admin.create_topics([topic])[topic.topic].result(30)
    except KafkaException:
        return False
    return True


def test_a_topic_cut_off_beyond_the_position_ends_its_views(bootstrap: str, space: Space) -> None:
    topic, admin = space.representations_topic("user"), kafka.admin(bootstrap)
    policy = ConfigEntry("cleanup.policy", "delete", incremental_operation=AlterConfigOpType.SET)
    for done in admin.incremental_alter_configs([ConfigResource(ResourceType.TOPIC, topic, incremental_configs=[policy])]).values():
        done.result(30)  # records of a compacted topic cannot be cut off
    value = RecordLayout(space, "user").empty(1).tobytes()
    # Nobody reads past an open transaction: the view waits in front of it, while the topic grows.
    writer = kafka.transactional_producer(bootstrap, f"open.{space.name}", 60.0)
    writer.init_transactions(30)
    writer.begin_transaction()
    writer.produce(topic, value, "a", partition=0)
    assert writer.flush(30) == 0
    with LocalView("user", space.name, bootstrap) as view:
        view.wait(60)
        others = kafka.producer(bootstrap)
        for i in range(10):
            others.produce(topic, value, f"k{i}", partition=0)
        assert others.flush(30) == 0
        place = TopicPartition(topic, 0, 8)
        admin.delete_records([place])[place].result(30)
        reason = ended(view)
        assert "offset 0 of partition 0" in reason and "no longer in the topic" in reason


# --- Memory ---


@pytest.mark.parametrize("in_place", [True, False])
def test_a_view_takes_no_more_than_max_bytes(bootstrap: str, space: Space, in_place: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crossrep.views.table._IN_PLACE", in_place)  # False: as it is without mremap
    records = Records(space, bootstrap)
    most = 700_000
    with LocalView("user", space.name, bootstrap, max_bytes=most) as view:
        held, taken, reason = 0, 0, ""
        while not reason:
            assert (view.get([f"k{i}" for i in range(held)]).counts == 1).all()  # nothing is lost as it grows
            held, taken = held + 100, view.memory_bytes
            assert taken <= most
            records.put([f"k{i}" for i in range(held - 100, held)], 1e9)
            try:
                wait_for(lambda held=held: len(view) == held, "all are here")  # type: ignore[misc]
            except CrossrepError as error:
                reason = str(error)
        assert 1900 < held < 2200  # it did not give up early: what ends it is that the index of 2,048 slots has to double
        said = re.search(r"no memory for ([\d,]+) user keys .*: ([\d,]+) are held, in ([\d,]+) bytes; ([\d,]+) would be needed", reason)
        assert said and "max_bytes is 700,000" in reason and "fewer or shorter columns" in reason, reason
        keys, kept, inside, needed = (int(number.replace(",", "")) for number in said.groups())
        assert held - 100 <= kept < keys <= held and taken <= inside <= most < needed


def test_the_stated_memory_is_what_is_taken() -> None:
    """The peak is stated before anything is allocated; here it is compared with what numpy then really takes."""
    alone(takes_what_is_stated)


def takes_what_is_stated() -> None:
    table = RecordTable(Space.parse(SPEC.format(name="memory", partitions=1)), "user")
    table.make_room(60_000)
    small, stated = table.memory_bytes, table.bytes_for(70_000)
    records = table.records.nbytes  # a mapping: not traced
    tracemalloc.start()
    table.make_room(70_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 0.9 * (stated - small) < peak < 1.1 * (stated - small)
    assert table.records.nbytes > records and table.memory_bytes <= stated
    assert table.memory_bytes < 70_000 * (1.125 * table.layout.size + 172)


def test_a_reader_that_is_refused_memory_says_so(bootstrap: str, tmp_path: Path) -> None:
    """It holds 32 MB, and may have 2 more; the table grows in steps of 4."""
    wide = SPEC.replace('source = "ur"\ndim = 4', 'source = "ur"\ndim = 4000')
    space, _ = new_space(bootstrap, tmp_path, wide)
    topic, value, producer = space.representations_topic("user"), RecordLayout(space, "user").empty(1).tobytes(), kafka.producer(bootstrap)

    def send(start: int, end: int) -> None:
        for i in range(start, end):
            producer.produce(topic, value, f"k{i}")
        assert producer.flush(30) == 0

    send(0, 2000)
    reader = f"""
import resource, time
import crossrep
view = crossrep.LocalView("user", {space.name!r}, {bootstrap!r})
view.wait(60)
while view.staleness > 10:  # every thread has its memory
    time.sleep(0.05)
limit = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + (2 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
print(len(view), flush=True)
try:
    while True:
        view.get(["k1"])
        time.sleep(0.01)
except crossrep.CrossrepError as error:
    print(error)
"""
    command, silent = [sys.executable, "-c", reader], subprocess.DEVNULL
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=silent, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "2000\n"
            for start in range(2000, 4000, 10):  # little by little, so that nothing else asks for much
                send(start, start + 10)
                if process.poll() is not None:
                    break
            said = process.communicate(timeout=30)[0]
        finally:
            process.kill()
    assert re.search(r"no memory for 2,\d+ user keys .*: 2,\d+ are held, in [\d,]+ bytes; [\d,]+ would be needed, .*cannot have", said), (
        said
    )
