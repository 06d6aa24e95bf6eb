"""What a flush writes of one entity, in columns, and how Kafka is given it."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
from confluent_kafka import KafkaException, Producer, cimpl
from numpy.typing import NDArray

from crossrep.keys import Keys

_COPY = 2  # RD_KAFKA_MSG_F_COPY: librdkafka takes the bytes over before it returns

# rd_kafka_message_t (rdkafka.h), the same since librdkafka 0.9: part of its ABI.
_MESSAGE = np.dtype(
    {
        "names": ["error", "topic", "partition", "value", "value_size", "key", "key_size", "offset", "private"],
        "formats": ["<i4", "<u8", "<i4", "<u8", "<u8", "<u8", "<u8", "<i8", "<u8"],
        "offsets": [0, 8, 16, 24, 32, 40, 48, 56, 64],
        "itemsize": 72,
    }
)


@dataclass(frozen=True)
class Writes:
    """n keys and what becomes of each."""

    keys: Keys
    records: NDArray[np.void]  # [n], contiguous
    deleted: NDArray[np.bool_]  # [n]: a tombstone; the record does not count

    def __len__(self) -> int:
        return len(self.records)

    @classmethod
    def of(cls, keys: list[bytes], values: list[bytes], size: int) -> Writes:
        """Writes of single records of `size` bytes each; an empty one deletes."""
        blob = b"".join(value or bytes(size) for value in values)
        return cls(Keys.of(keys), np.frombuffer(blob, f"V{size}"), np.array([not value for value in values], np.bool_))

    def values(self) -> list[bytes]:
        """The records one by one, empty where the key is deleted."""
        blob, size = self.records.tobytes(), self.records.dtype.itemsize
        values = [blob[i : i + size] for i in range(0, len(blob), size)]
        for i in np.flatnonzero(self.deleted).tolist():
            values[i] = b""
        return values

    def last(self) -> tuple[bytes, bytes | None]:
        """Key and value of the last row; None: a tombstone."""
        key = self.keys.data[self.keys.offsets[-2] :].tobytes()
        return key, None if self.deleted[-1] else self.records[-1:].tobytes()


def produce(producer: Producer, topic: str, partition: int, writes: Writes, first: int, end: int) -> None:
    """Queue rows `first` to `end` with the producer, as `Producer.produce` would one by one, without delivery callbacks.

    Given to librdkafka as arrays: 0.1 µs a record and none of it under the interpreter's lock, where `Producer.produce_batch` takes 0.8 µs,
    all of it under the lock, which was a quarter of all the time that a fold worker held it.

    Raises:
        KafkaException: the producer's queue is full.
    """
    size = writes.records.dtype.itemsize
    messages = np.zeros(end - first, _MESSAGE)
    messages["value"] = np.where(writes.deleted[first:end], 0, writes.records.ctypes.data + size * np.arange(first, end))
    messages["value_size"] = np.where(writes.deleted[first:end], 0, size)
    messages["key"] = writes.keys.data.ctypes.data + writes.keys.offsets[first:end].astype(np.int64)
    messages["key_size"] = np.diff(writes.keys.offsets[first : end + 1])
    handle = _LIBRDKAFKA.rd_kafka_topic_new(_handle(producer), topic.encode(), None)
    queued = _LIBRDKAFKA.rd_kafka_produce_batch(handle, partition, _COPY, messages.ctypes.data, len(messages))
    _LIBRDKAFKA.rd_kafka_topic_destroy(handle)
    if queued != len(messages):
        raise KafkaException(f"records for {topic} did not fit the producer's queue")


def _handle(producer: Producer) -> int:
    """The rd_kafka_t of a producer: the first field of confluent_kafka's object. tests/state/test_writes.py fails should that move."""
    handle = ctypes.c_void_p.from_address(id(producer) + object.__basicsize__).value
    assert handle is not None
    return handle


def _librdkafka() -> ctypes.CDLL:
    """The library that confluent_kafka itself is linked with, wherever it lies."""
    library = ctypes.CDLL(cimpl.__file__)
    library.rd_kafka_topic_new.restype = ctypes.c_void_p
    library.rd_kafka_topic_new.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    library.rd_kafka_topic_destroy.restype = None
    library.rd_kafka_topic_destroy.argtypes = [ctypes.c_void_p]
    library.rd_kafka_produce_batch.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
    return library


_LIBRDKAFKA = _librdkafka()
