"""Where workers begin when Kafka no longer has what they need: they refuse rather than guess."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient

from crossrep import kafka
from crossrep.control import groups
from crossrep.control.cuts import Cut
from crossrep.errors import StateError
from crossrep.rollout import handover
from crossrep.spec import Space, fold_group, frame_group, infer_group
from tests import cluster
from tests.cluster import Load, Workers, new_space, prove, ready, settled, wait_for


def test_a_group_without_offsets_in_a_space_with_frames_is_refused(bootstrap: str, workers: Workers, tmp_path: Path) -> None:
    space, path = new_space(bootstrap, tmp_path)
    Load(space, bootstrap).send(10)
    refused = workers.start("frame", str(path), "--name", "f", "--port", str(cluster.free_port()))
    assert refused.wait(60) == 1
    assert "has no offsets" in workers.logs()
    port = cluster.free_port()
    workers.start("frame", str(path), "--name", "f", "--port", str(port), "--start", "earliest")
    wait_for(lambda: ready(port), "ready once told where to begin")


def test_a_first_transaction_that_was_aborted_is_no_lost_progress(bootstrap: str, tmp_path: Path) -> None:
    space, _ = new_space(bootstrap, tmp_path)
    producer = kafka.transactional_producer(bootstrap, f"{space.name}.first", 10.0)
    producer.init_transactions(30)

    def lost() -> bool:
        return groups.lost(bootstrap, f"group of {space.name}", [space.inputs.impressions], space.frames_topic)

    for end, expected in ((producer.abort_transaction, False), (producer.commit_transaction, True)):
        producer.begin_transaction()
        producer.produce(space.frames_topic, b"frame", partition=1)
        producer.flush(30)
        end(30)
        assert kafka.bounds(bootstrap, space.frames_topic)[1][1] > 0
        assert lost() is expected


@pytest.mark.parametrize("deleted", ["folded", "unfolded"])
def test_frames_deleted_behind_and_before_the_progress(bootstrap: str, workers: Workers, tmp_path: Path, deleted: str) -> None:
    space, path = new_space(bootstrap, tmp_path, partitions=1)
    load = Load(space, bootstrap)
    port = cluster.free_port()
    worker = workers.fold(path, port=port)
    wait_for(lambda: ready(port), "ready")
    load.send(50)
    wait_for(lambda: settled(space, bootstrap), "folded")
    worker.terminate()
    assert worker.wait(30) == 0
    if deleted == "unfolded":
        load.send(50)
    client = kafka.consumer(bootstrap, fold_group(space))
    progress = kafka.committed(client, [TopicPartition(space.frames_topic, 0)])[0].offset
    _, end = kafka.watermarks(client, space.frames_topic, 0)
    client.close()
    admin: AdminClient = kafka.admin(bootstrap)
    upto = progress if deleted == "folded" else end
    for future in admin.delete_records([TopicPartition(space.frames_topic, 0, upto)]).values():
        future.result()
    port = cluster.free_port()
    again = workers.fold(path, port=port)
    if deleted == "folded":
        wait_for(lambda: ready(port), "it goes on: nothing unfolded is gone")
    else:
        assert again.wait(60) == 3, "refused, not skipped"
        assert "frames were deleted before they were folded" in workers.logs()


def test_frames_deleted_before_a_space_was_ever_folded(bootstrap: str, workers: Workers, tmp_path: Path) -> None:
    space, path = new_space(bootstrap, tmp_path, partitions=1)
    Load(space, bootstrap).send(200, max_rows=10)
    admin: AdminClient = kafka.admin(bootstrap)
    for future in admin.delete_records([TopicPartition(space.frames_topic, 0, 20)]).values():
        future.result()
    assert workers.fold(path).wait(60) == 3, "refused, not skipped"
    assert "the next to fold is 0: frames were deleted before they were folded" in workers.logs()


def in_a_transaction(space: Space, bootstrap: str, topic: str, messages: int) -> None:
    """Behind them lies the transaction's marker, which takes an offset of its own."""
    producer = kafka.transactional_producer(bootstrap, f"{space.name}.writer", 10.0)
    producer.init_transactions(30)
    producer.begin_transaction()
    for _ in range(messages):
        producer.produce(topic, b"a dead letter", partition=0)
    producer.commit_transaction(30)


def empty(bootstrap: str, topic: str) -> None:
    """As retention does it."""
    admin, (_, end) = kafka.admin(bootstrap), kafka.bounds(bootstrap, topic)[0]
    for future in admin.delete_records([TopicPartition(topic, 0, end)]).values():
        future.result(30)


@pytest.mark.parametrize("deleted", ["consumed", "unread"])
def test_messages_deleted_behind_and_before_the_next_to_consume(bootstrap: str, workers: Workers, tmp_path: Path, deleted: str) -> None:
    space, path = new_space(bootstrap, tmp_path, partitions=1)

    def frame() -> tuple[subprocess.Popen[bytes], int]:
        port = cluster.free_port()
        return workers.start("frame", str(path), "--name", "f", "--port", str(port), "--session-timeout", "3"), port

    worker, port = frame()
    in_a_transaction(space, bootstrap, space.inference_topic, 10)
    group = frame_group(space)
    wait_for(lambda: groups.offsets(bootstrap, group) == {space.inference_topic: {0: 10}}, "consumed")
    worker.terminate()
    assert worker.wait(30) == 0
    if deleted == "unread":
        in_a_transaction(space, bootstrap, space.inference_topic, 1)
    empty(bootstrap, space.inference_topic)
    again, port = frame()
    if deleted == "consumed":
        wait_for(lambda: ready(port), "it goes on: nothing unread is gone")
        in_a_transaction(space, bootstrap, space.inference_topic, 1)
        wait_for(lambda: groups.offsets(bootstrap, group) == {space.inference_topic: {0: 12}}, "and consumes what comes then")
    else:
        assert again.wait(60) == 1, "refused, not skipped"
        assert "messages were deleted before they were consumed" in workers.logs()


def test_a_replay_hands_over_where_only_a_marker_is_gone(bootstrap: str, tmp_path: Path) -> None:
    space, _ = new_space(bootstrap, tmp_path, partitions=1)
    topic = space.inputs.clicks
    in_a_transaction(space, bootstrap, topic, 10)
    empty(bootstrap, topic)
    end = kafka.bounds(bootstrap, topic)[0][1]

    def offsets(to: int) -> groups.Offsets:
        cut = Cut(id="c", groups={infer_group(space): {topic: {0: to}}}, ends={}, skipped={})
        return handover.offsets(cut, space, space, bootstrap)

    assert offsets(end - 1) == {topic: {0: end - 1}}
    with pytest.raises(StateError, match=rf"\[0\]@{end - 2}, but those before {end} were deleted"):
        offsets(end - 2)


def test_a_group_moved_back_is_refused_and_the_message_puts_it_right(bootstrap: str, workers: Workers, tmp_path: Path) -> None:
    space, path = new_space(bootstrap, tmp_path, partitions=1)
    load = Load(space, bootstrap)
    port = cluster.free_port()
    worker = workers.fold(path, port=port)
    wait_for(lambda: ready(port), "ready")
    load.send(50)
    wait_for(lambda: settled(space, bootstrap), "folded")
    worker.kill()  # static membership: the group stays occupied until the session is over
    worker.wait()
    client = kafka.consumer(bootstrap, fold_group(space))
    part = TopicPartition(space.frames_topic, 0)
    progress = kafka.committed(client, [part])[0].offset

    def moved(offset: int) -> bool:
        try:
            client.commit(offsets=[TopicPartition(space.frames_topic, 0, offset)], asynchronous=False)
        except Exception:  # the dead member still counts
            return False
        return True

    wait_for(lambda: moved(0), "the group is empty, and moved back")
    refused = workers.fold(path)
    assert refused.wait(60) == 3
    assert f"--to-offset {progress}" in workers.logs()
    wait_for(lambda: moved(progress), "the group is put right")
    client.close()
    workers.fold(path)
    load.send(50)
    wait_for(lambda: settled(space, bootstrap), "folded")
    prove(space, bootstrap, load.counts)
