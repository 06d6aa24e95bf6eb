"""Keys in columns: Kafka's partitions, and the index against a dict."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from crossrep.keys import MISSING, KeyIndex, Keys

IDS = st.lists(st.binary(min_size=1, max_size=64), max_size=50)

# The vectors of org.apache.kafka.common.utils.UtilsTest.testMurmur2.
KAFKA_VECTORS = {
    "21": -973932308,
    "foobar": -790332482,
    "a-little-bit-long-string": -985981536,
    "a-little-bit-longer-string": -1486304829,
    "lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8": -58897971,
    "abc": 479470107,
}


def murmur2(key: bytes) -> int:
    """Kafka's murmur2 as an unsigned int, written from the published algorithm, independent of crossrep."""
    m, h = 0x5BD1E995, 0x9747B28C ^ len(key)
    whole = len(key) - len(key) % 4
    for i in range(0, whole, 4):
        k = int.from_bytes(key[i : i + 4], "little") * m & 0xFFFFFFFF
        k = (k ^ k >> 24) * m & 0xFFFFFFFF
        h = (h * m & 0xFFFFFFFF) ^ k
    if tail := key[whole:]:
        h = (h ^ int.from_bytes(tail, "little")) * m & 0xFFFFFFFF
    h = (h ^ h >> 13) * m & 0xFFFFFFFF
    return h ^ h >> 15


@pytest.mark.parametrize(("key", "hashed"), KAFKA_VECTORS.items())
def test_partitions_equal_kafkas_published_vectors(key: str, hashed: int) -> None:
    assert murmur2(key.encode()) == hashed & 0xFFFFFFFF
    for count in (1, 2, 3, 4, 7, 1024, 2**31 - 1):
        assert Keys.of([key]).partitions(count).tolist() == [(hashed & 0x7FFFFFFF) % count]


@given(IDS, st.integers(1, 1024))
def test_partitions_equal_an_independent_murmur2(ids: list[bytes], count: int) -> None:
    assert Keys.of(ids).partitions(count).tolist() == [(murmur2(i) & 0x7FFFFFFF) % count for i in ids]


def test_partitions_of_every_length() -> None:
    ids = [bytes(range(255, 255 - n, -1)) for n in range(1, 65)]
    assert Keys.of(ids).partitions(2**31 - 1).tolist() == [(murmur2(i) & 0x7FFFFFFF) % (2**31 - 1) for i in ids]


@given(IDS)
def test_keys_come_back_as_they_went_in(ids: list[bytes]) -> None:
    keys = Keys.of(ids)
    assert len(keys) == len(ids)
    assert keys.tolist() == ids


def test_keys_of_strings_integers_and_bytes() -> None:
    assert Keys.of(["ü", 17, b"\xff\x00", -1]).tolist() == ["ü".encode(), b"17", b"\xff\x00", b"-1"]
    assert Keys.of([]).tolist() == []


@pytest.mark.parametrize(
    ("ids", "said"),
    [(["a", ""], r"'' at 1 has 0 bytes"), (["x" * 65], "at 0 has 65"), (["a", "ü" * 33, ""], "at 1 has 66"), ([b""], "0 bytes")],
)
def test_ids_of_a_wrong_length_are_named(ids: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Keys.of(ids)


@given(st.lists(st.binary(min_size=1, max_size=64), min_size=1, max_size=20), st.data())
def test_take_gives_the_rows_in_that_order(ids: list[bytes], data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.integers(0, len(ids) - 1), max_size=40))
    taken = Keys.of(ids).take(np.array(rows, np.int64))
    assert taken.tolist() == [ids[row] for row in rows]
    assert taken.partitions(5).tolist() == Keys.of(ids).partitions(5)[rows].tolist()


# 64-byte keys that differ only at an end, short ones, and ones that are prefixes of others.
POOL = (
    [b"%d" % i for i in range(60)]
    + [b"a" * 63 + bytes([i]) for i in range(20)]
    + [bytes([i]) + b"b" * 63 for i in range(20)]
    + [b"c" * i for i in range(1, 64)]
)
BATCH = st.lists(st.sampled_from(POOL), max_size=24)


class IndexMachine(RuleBasedStateMachine):
    """KeyIndex against a dict. Small tables and mostly full, so that runs of colliding entries form, wrap and are shifted back."""

    @initialize(capacity=st.sampled_from([1, 8, 9, 16, 31]))
    def start(self, capacity: int) -> None:
        self.index = KeyIndex(capacity)
        self.model: dict[bytes, int] = {}

    @rule(batch=BATCH)
    def insert(self, batch: list[bytes]) -> None:
        fresh = list(dict.fromkeys(key for key in batch if key not in self.model))
        allowed = set(fresh[: self.index.capacity - self.index.size])
        batch = [key for key in batch if key in self.model or key in allowed]
        slots = self.index.find(Keys.of(batch))
        new = self.index.insert(Keys.of(batch), slots)
        assert [batch[row] for row in new] == [key for key in fresh if key in allowed]
        for key, slot in zip(batch, slots.tolist()):
            assert 0 <= slot < self.index.capacity
            assert self.model.setdefault(key, slot) == slot

    @rule(batch=BATCH)
    def insert_without_find(self, batch: list[bytes]) -> None:
        """Slots all MISSING, though some keys are known: they keep their slots."""
        fresh = list(dict.fromkeys(key for key in batch if key not in self.model))
        allowed = set(fresh[: self.index.capacity - self.index.size])
        batch = [key for key in batch if key in self.model or key in allowed]
        slots = np.full(len(batch), MISSING, np.int32)
        self.index.insert(Keys.of(batch), slots)
        for key, slot in zip(batch, slots.tolist()):
            assert self.model.setdefault(key, slot) == slot

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        gone = data.draw(st.lists(st.sampled_from(sorted(self.model)), unique=True))
        self.index.remove(np.array([self.model.pop(key) for key in gone], np.int32))

    @precondition(lambda self: self.index.capacity < 200)
    @rule(more=st.integers(0, 40))
    def grow(self, more: int) -> None:
        self.index.grow(self.index.capacity + more)

    @invariant()
    def agrees_with_the_dict(self) -> None:
        if not hasattr(self, "index"):
            return
        assert self.index.find(Keys.of(POOL)).tolist() == [self.model.get(key, MISSING) for key in POOL]
        assert self.index.size == len(self.model) == len(set(self.model.values()))
        slots = self.index.slots()
        assert slots.tolist() == sorted(self.model.values())
        assert self.index.keys(slots).tolist() == sorted(self.model, key=self.model.__getitem__)


TestIndex = IndexMachine.TestCase
TestIndex.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_a_full_index_survives_churn() -> None:
    """At most half the table is used; here always exactly that, with many removals, against a dict."""
    rng = np.random.default_rng(1)
    index, model = KeyIndex(1024), {}
    names = [b"%d" % i for i in range(4000)]
    for _ in range(60):
        absent = [name for name in names if name not in model]
        batch = [absent[i] for i in rng.permutation(len(absent))[: 1024 - len(model)]]
        slots = np.full(len(batch), MISSING, np.int32)
        assert len(index.insert(Keys.of(batch), slots)) == len(batch)
        model.update(zip(batch, slots.tolist()))
        assert index.size == 1024
        assert index.find(Keys.of(names)).tolist() == [model.get(name, MISSING) for name in names]
        gone = [list(model)[i] for i in rng.permutation(len(model))[: rng.integers(1, 900)]]
        index.remove(np.array([model.pop(name) for name in gone], np.int32))
        assert index.find(Keys.of(names)).tolist() == [model.get(name, MISSING) for name in names]
