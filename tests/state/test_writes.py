"""What a flush writes arrives in Kafka as it is, although librdkafka is given it behind confluent_kafka's back."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from confluent_kafka import KafkaException
from confluent_kafka.admin import NewTopic

from crossrep import kafka
from state import writes
from state.writes import Writes, produce

SIZE = 300


def random_writes(n: int, seed: int = 0) -> Writes:
    rng = np.random.default_rng(seed)
    keys = [b"k" * int(rng.integers(1, 60)) + b"%d" % i for i in range(n)]
    return Writes.of(keys, [b"" if rng.random() < 0.2 else rng.bytes(SIZE) for _ in range(n)], SIZE)


def test_single_records_become_columns_and_back() -> None:
    values = [b"abc", b"", b"def"]
    found = Writes.of([b"1", b"22", b"333"], values, 3)
    assert (len(found), found.keys.tolist(), found.values()) == (3, [b"1", b"22", b"333"], values)
    assert found.deleted.tolist() == [False, True, False]
    assert found.last() == (b"333", b"def")
    assert Writes.of([b"1", b"22"], [b"abc", b""], 3).last() == (b"22", None)
    assert Writes.of([], [], 3).values() == []


def test_the_handle_is_where_confluent_kafka_keeps_it() -> None:
    """If this ends the test run with a segmentation fault: confluent_kafka has another object layout now; see `writes._handle`."""
    producer = kafka.producer("127.0.0.1:1", **{"client.id": "found-it"})
    name = writes._LIBRDKAFKA.rd_kafka_name
    name.restype, name.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    assert name(writes._handle(producer)).startswith(b"found-it#producer-")


def test_rows_arrive_in_order_whole_and_once(bootstrap: str) -> None:
    topic, given = "test-writes", random_writes(5000)
    admin = kafka.admin(bootstrap)
    for future in admin.create_topics([NewTopic(topic, 2, 1)]).values():
        future.result()
    producer = kafka.producer(bootstrap)
    produce(producer, topic, 1, given, 0, 2000)
    produce(producer, topic, 1, given, 2000, 2000)
    produce(producer, topic, 1, given, 2000, 5000)
    assert producer.flush(30) == 0
    found = list(kafka.messages(bootstrap, topic, kafka.bounds(bootstrap, topic)))
    assert {message.partition() for message in found} == {1}
    assert [message.key() for message in found] == given.keys.tolist()
    assert [message.value() or b"" for message in found] == given.values()
    assert [message.value() is None for message in found] == given.deleted.tolist()


def test_a_full_queue_is_an_error() -> None:
    producer = kafka.producer("127.0.0.1:1", **{"queue.buffering.max.messages": 100})
    with pytest.raises(KafkaException, match="did not fit"):
        produce(producer, "nowhere", 0, random_writes(500), 0, 500)
    producer.purge()
