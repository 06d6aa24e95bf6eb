"""`crossrep verify`: what is right is found right while everything flows, and what is planted is found."""

from __future__ import annotations

import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from confluent_kafka import TopicPartition
from rocksdict import Options, Rdict

import streams.cli  # noqa: F401  adds the workers' commands
from crossrep import kafka
from crossrep.cli import cli
from crossrep.columnar import forget, frames
from crossrep.columnar.forget import Forget
from crossrep.columnar.records import RecordLayout
from crossrep.errors import CrossrepError
from crossrep.keys import Keys
from crossrep.spec import Space
from crossrep.writer import rows_of
from streams.proof import crosschecks
from streams.proof.readout import chosen, look
from streams.proof.verify import Verdict, unfolded, verify
from tests.cluster import SPEC, Load, Workers, new_space, prove, settled, wait_for
from tests.streams import small_model

EXPIRING = SPEC.replace("[entities.user.columns.cr]", '[entities.user]\nexpire_after = "2h"\n[entities.user.columns.cr]')


@contextmanager
def flowing(send: Callable[[], None]) -> Iterator[None]:
    """Load from another thread until the block ends."""
    over = threading.Event()

    def run() -> None:
        while not over.is_set():
            send()
            time.sleep(0.02)

    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(run)
        try:
            yield
        finally:
            over.set()
            sending.result()


def plant(space: Space, bootstrap: str, entity: str, key: bytes, value: bytes | None, partition: int | None = None) -> None:
    """Write a record as only the fold workers may."""
    producer = kafka.producer(bootstrap)
    home = forget.partition_of(space, key) if partition is None else partition
    producer.produce(space.representations_topic(entity), value, key, partition=home)
    assert producer.flush(30) == 0


def record_of(space: Space, bootstrap: str, entity: str, key: bytes) -> bytes:
    records = look(space, bootstrap).records[entity]
    return bytes(records.values[records.keys.index((forget.partition_of(space, key), key))].tobytes())


def changed(space: Space, entity: str, record: bytes, **fields: float) -> bytes:
    """A record with something added to some of its fields."""
    new = np.frombuffer(record, RecordLayout(space, entity).dtype).copy()
    for name, value in fields.items():
        new[name] += value
    return new.tobytes()


def right(verdicts: list[Verdict]) -> bool:
    assert [verdict.examples for verdict in verdicts if verdict.differences or verdict.examples] == []
    return True


def test_while_frames_are_written_folded_and_refused_and_workers_die(bootstrap: str, workers: Workers, tmp_path: Path) -> None:
    space, path = new_space(bootstrap, tmp_path)
    load, producer = Load(space, bootstrap), kafka.producer(bootstrap)
    right(verify(space, bootstrap, as_is=True))  # nothing there yet
    doomed = workers.fold(path, fault="commit.offsets:20")  # it leaves a transaction open

    def send() -> None:
        load.send(100)
        producer.produce(space.frames_topic, b"poison", partition=load.counts["user"] // 100 % 4)
        assert producer.flush(30) == 0

    with flowing(send):
        wait_for(lambda: doomed.poll() is not None, "the worker is killed")
        assert doomed.returncode == -signal.SIGKILL, workers.logs()
        workers.fold(path)
        events = 0
        for _ in range(3):
            verdicts = verify(space, bootstrap)
            assert right(verdicts) and verdicts[0].events > events
            events = verdicts[0].events
            assert verdicts[0].since == events
    prove(space, bootstrap, load.counts)


def test_what_is_planted_is_found_and_named(bootstrap: str, workers: Workers, tmp_path: Path) -> None:
    space, path = new_space(bootstrap, tmp_path)
    load = Load(space, bootstrap)
    workers.fold(path)
    load.send(2000)
    wait_for(lambda: settled(space, bootstrap), "folded")
    prove(space, bootstrap, load.counts)
    keys = [b"%d" % i for i in range(7)]
    users = look(space, bootstrap).records["user"]
    good = {key: users.values[users.keys.index((forget.partition_of(space, key), key))].tobytes() for key in keys}
    flaws: list[tuple[dict[str, float], str]] = [
        ({"count": 1}, "count "),
        ({"cr": 1e-3}, "cr is off by"),
        ({"cr": float("nan")}, "cr is off by"),
        ({"cr_weight": 1e-3, "ur_time": -1.0, "event_time": 1.0}, "cr weight"),
        ({"source_offset": 1000}, "but the next to fold is"),
    ]
    for key, (flaw, _) in zip(keys, flaws):
        plant(space, bootstrap, "user", key, changed(space, "user", good[key], **flaw))
    user, item = verify(space, bootstrap)
    right([item])
    assert (user.differences, user.wrong_counts, len(user.examples)) == (5, 1, 5) and user.worst_vector == np.inf
    said = {example.split()[1].encode(): example for example in user.examples}
    for key, (_, expected) in zip(keys, flaws):
        assert expected in said[key], said
    assert "ur newest" in said[keys[3]] and "newest event" in said[keys[3]]
    count = int(np.frombuffer(good[keys[0]], RecordLayout(space, "user").dtype)["count"][0])
    assert said[keys[0]] == f"user 0 (partition {forget.partition_of(space, keys[0])}): count {count + 1}, by the frames {count}"
    inside = chosen(Keys.of(keys[:5]), 0.5)
    assert 0 < inside.sum() < 5
    assert verify(space, bootstrap, share=0.5)[0].differences == inside.sum()

    for key in keys:
        plant(space, bootstrap, "user", key, good[key])
    plant(space, bootstrap, "user", keys[5], None)
    plant(space, bootstrap, "user", b"nobody", good[keys[0]])
    home = forget.partition_of(space, keys[6])
    plant(space, bootstrap, "user", keys[6], good[keys[6]], (home + 1) % space.partitions)
    user, item = verify(space, bootstrap)
    assert (user.differences, user.wrong_counts) == (3, 3)
    said = {example.split()[1].encode(): example for example in user.examples}
    assert "it is missing; by the frames it counts" in said[keys[5]]
    assert "it must not exist" in said[b"nobody"]
    assert f"(partition {(home + 1) % space.partitions}): it must not exist" in said[keys[6]]
    asked = CliRunner().invoke(cli, ["verify", str(path), "--sample", "100%", "--bootstrap", bootstrap])
    assert asked.exit_code == 1 and "user nobody" in asked.output and "differences found: 3" in asked.output
    with pytest.raises(CrossrepError, match="written by others than crossrep infer"):
        crosschecks.events(space, bootstrap)


def test_live_where_the_first_frames_are_gone(bootstrap: str, workers: Workers, tmp_path: Path) -> None:
    space, path = new_space(bootstrap, tmp_path)
    load = Load(space, bootstrap)
    workers.fold(path)
    load.send(3000)
    wait_for(lambda: settled(space, bootstrap), "folded")
    ends = kafka.bounds(bootstrap, space.frames_topic)
    parts = [TopicPartition(space.frames_topic, number, end) for number, (_, end) in ends.items()]
    admin = kafka.admin(bootstrap)  # its futures never end once it is gone
    for future in admin.delete_records(parts).values():
        future.result()
    with pytest.raises(CrossrepError, match="--live 60s"):
        verify(space, bootstrap)
    asked = CliRunner().invoke(cli, ["verify", str(path), "--sample", "50%", "--live", "100ms", "--bootstrap", bootstrap])
    assert asked.exit_code == 0, f"nothing came, and nothing differs: {asked.output}"
    quiet = b"150"  # the load below has keys under 100
    with flowing(lambda: load.send(100, keys=100)):
        wait_for(lambda: not unfolded(space, bootstrap, ends), "it flows")
        for share in (1.0, 0.5):
            verdicts = verify(space, bootstrap, live=1.0, share=share)
            assert right(verdicts) and all(0 < verdict.since < verdict.events for verdict in verdicts)
        record = record_of(space, bootstrap, "user", quiet)
        with ThreadPoolExecutor(1) as pool:
            verifying = pool.submit(verify, space, bootstrap, live=2.0)
            time.sleep(1.2)
            plant(space, bootstrap, "user", quiet, changed(space, "user", record, count=1))
            user, item = verifying.result()
    assert (user.differences, item.differences) == (1, 0) and "user 150" in user.examples[0]


def test_keys_that_expire_or_are_forgotten(bootstrap: str, workers: Workers, tmp_path: Path) -> None:
    space, path = new_space(bootstrap, tmp_path, EXPIRING)
    load, producer, random = Load(space, bootstrap), kafka.producer(bootstrap), np.random.default_rng(1)
    workers.fold(path, "w0", "--slots", "64")

    def send() -> None:
        load.send(20)  # hours of event time, some of it late
        for entity in space.entities:
            key = str(random.zipf(1.3) % 200).encode()
            order = forget.encode(space, Forget(entity, key))
            producer.produce(space.frames_topic, order, partition=forget.partition_of(space, key))
        assert producer.flush(30) == 0

    with flowing(send):
        for live in (0.0, 0.5, 0.0, 1.0):
            right(verify(space, bootstrap, live=live))
    wait_for(lambda: settled(space, bootstrap), "folded")
    verdicts = verify(space, bootstrap)
    assert right(verdicts) and verdicts[0].events < verdicts[1].events < load.counts["item"]

    def write(ids: list[str], times: list[float]) -> None:
        sources = {name: np.ones((len(ids), dim), np.float32) for name, dim in space.sources.items()}
        for partition, frame in frames.encode(space, rows_of(space, "user", ids, "click", times, sources)):
            producer.produce(space.frames_topic, frame, partition=partition)
        assert producer.flush(30) == 0
        wait_for(lambda: settled(space, bootstrap), "folded")

    future = load._time + 1e6
    a, b = [f"of-one-{i}" for i in range(100) if forget.partition_of(space, b"of-one-%d" % i) == 0][:2]
    write([a, b], [future, future])
    old = record_of(space, bootstrap, "user", a.encode())
    write([b], [future + 3 * 3600])  # `a` has expired
    wait_for(lambda: (forget.partition_of(space, a.encode()), a.encode()) not in look(space, bootstrap).records["user"].keys, "a is swept")
    right(verify(space, bootstrap))
    plant(space, bootstrap, "user", a.encode(), old)  # as if it had not been swept yet
    right(verify(space, bootstrap))
    plant(space, bootstrap, "user", a.encode(), changed(space, "user", old, count=1))
    assert verify(space, bootstrap)[0].differences == 1
    plant(space, bootstrap, "user", a.encode(), None)
    plant(space, bootstrap, "user", b.encode(), None)  # not expired
    user = verify(space, bootstrap)[0]
    assert user.differences == 1 and b in user.examples[0] and "missing" in user.examples[0]
    with pytest.raises(CrossrepError, match="users expire"):
        crosschecks.events(space, bootstrap)


def test_stores_against_the_changelog(bootstrap: str, workers: Workers, tmp_path: Path) -> None:
    space, path = new_space(bootstrap, tmp_path)
    load = Load(space, bootstrap)
    worker = workers.fold(path)
    load.send(1000)
    wait_for(lambda: settled(space, bootstrap), "folded")
    folder = tmp_path / "home" / "fold" / space.name / "w0"
    with flowing(lambda: load.send(100)):
        for _ in range(3):
            checks = crosschecks.stores(space, bootstrap, folder)
            assert [check.examples for check in checks if check.differences] == []
            assert len(checks) == space.partitions
    load.send(100)
    worker.terminate()
    assert worker.wait(30) == 0, workers.logs()
    assert sum(check.keys for check in crosschecks.stores(space, bootstrap, folder)) == sum(
        len(r.keys) for r in look(space, bootstrap).records.values()
    )
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    places = look(space, bootstrap).records["user"].keys
    number, key = places[0]
    others = [other for partition, other in places if partition == number][1:]
    db = Rdict(str(copy / f"partition-{number}"), Options(raw_mode=True))
    value = bytearray(db[b"\x00" + key])
    value[40] ^= 1
    db[b"\x00" + key] = bytes(value)
    del db[b"\x00" + others[0]]
    db[b"\x00somebody"] = bytes(value)
    db.flush()
    db.close()
    checks = {check.what: check for check in crosschecks.stores(space, bootstrap, copy)}
    wrong = checks.pop(f"partition-{number}")
    assert sum(check.differences for check in checks.values()) == 0 and wrong.differences == 3
    said = "\n".join(wrong.examples)
    assert f"user {key.decode()} (partition {number}): 1 of " in said and "bytes differ, the first at 40" in said
    assert f"user {others[0].decode()} (partition {number}): it is missing in the store" in said
    assert f"user somebody (partition {number}): the changelog does not have it" in said
    (table,) = sorted((copy / f"partition-{number}").glob("*.sst"), key=lambda file: file.stat().st_size)[-1:]
    damaged = bytearray(table.read_bytes())
    damaged[50] ^= 1
    table.write_bytes(damaged)
    checks = {check.what: check for check in crosschecks.stores(space, bootstrap, copy)}
    assert "cannot be read whole: Corruption" in checks[f"partition-{number}"].examples[0]
    asked = CliRunner().invoke(cli, ["verify", str(path), "--stores", str(copy), "--bootstrap", bootstrap])
    assert asked.exit_code == 1 and "cannot be read whole" in asked.output
    with pytest.raises(CrossrepError, match="holds no partition-N"):
        crosschecks.stores(space, bootstrap, tmp_path)


def test_counts_against_the_events(bootstrap: str, workers: Workers, tmp_path: Path) -> None:
    space, path = new_space(bootstrap, tmp_path, small_model.SPEC)
    feed = small_model.Feed(space, small_model.small_dataset(1000), bootstrap)
    workers.fold(path)
    infer = small_model.start_infer(workers, path)
    producer = kafka.producer(bootstrap)
    feed.send(300)
    producer.produce(space.inputs.clicks, b"poison")
    producer.flush()
    feed.send(300)
    wait_for(lambda: small_model.inferred(space, bootstrap) and settled(space, bootstrap), "inferred and folded")
    checks = crosschecks.events(space, bootstrap)
    assert [check.examples for check in checks if check.differences] == []
    assert [check.note for check in checks] == [f"{feed.events:,} events"] * 2
    half = crosschecks.events(space, bootstrap, 0.5)
    assert all(check.differences == 0 and check.keys < whole.keys for check, whole in zip(half, checks))
    key = look(space, bootstrap).records["user"].keys[0][1]
    record = record_of(space, bootstrap, "user", key)
    plant(space, bootstrap, "user", key, changed(space, "user", record, count=2))
    user, item = crosschecks.events(space, bootstrap)
    assert (user.differences, item.differences) == (1, 0) and f"user {key.decode()} " in user.examples[0]
    plant(space, bootstrap, "user", key, None)
    user, item = crosschecks.events(space, bootstrap)
    assert user.differences == 1 and "it is missing" in user.examples[0]
    asked = CliRunner().invoke(cli, ["verify", str(path), "--events", "--bootstrap", bootstrap])
    assert asked.exit_code == 1 and "user: counts with events" in asked.output
    infer.terminate()
    assert infer.wait(30) == 0
    feed.send(10)
    with pytest.raises(CrossrepError, match="events are not inferred yet"):
        crosschecks.events(space, bootstrap)
