"""Frames: what is written is read; what is wrong is refused whole, with its reason, and with nothing else."""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import fastavro
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import crossrep
from crossrep.columnar import frames
from crossrep.columnar.aggregates import combine
from crossrep.columnar.rows import ColumnRows, Rows
from crossrep.errors import BadFrame
from crossrep.spec import Space
from tests.crossrep.columnar.wire_samples import SPACE, SPACES, TOML, one_frame, raw_rows, rows_of

IDS = st.lists(st.binary(min_size=1, max_size=64), min_size=1, max_size=30)
Frame = dict[str, Any]


def assert_same(sent: Rows, got: Rows, dtype: str) -> None:
    assert got.entity == sent.entity
    assert got.keys.tolist() == sent.keys.tolist()
    assert np.array_equal(got.times, sent.times)
    assert np.array_equal(got.counts, sent.counts)
    assert list(got.columns) == list(sent.columns)
    for name, column in sent.columns.items():
        other, here = got.columns[name], column.present
        assert np.array_equal(other.present, here)
        assert other.vectors.dtype == np.float32
        assert np.array_equal(other.vectors, column.vectors.astype(dtype).astype(np.float32))
        assert np.array_equal(other.times[here], column.times[here])
        if SPACE.entities[sent.entity].columns[name].aggregate != "latest":
            assert np.array_equal(other.weights[here], column.weights[here])


@given(
    IDS,
    st.integers(0, 2**32 - 1),
    st.sampled_from(["user", "item"]),
    st.booleans(),
    st.sampled_from(["float16", "float32"]),
    st.integers(1, 7),
)
def test_what_is_encoded_is_decoded(ids: list[bytes], seed: int, entity: str, combined: bool, dtype: str, max_rows: int) -> None:
    sent = rows_of(ids, seed, entity, combined)
    partitions = sent.keys.partitions(4)
    seen = []
    for partition, value in frames.encode(SPACES[dtype], sent, max_rows):
        got = frames.decode(SPACES[dtype], value, append_time=1.8e9)
        assert 1 <= len(got) <= max_rows
        assert (got.keys.partitions(4) == partition).all()
        start = sum(len(rows) for p, rows in seen if p == partition)
        assert_same(sent.take(np.flatnonzero(partitions == partition)[start : start + len(got)]), got, dtype)
        seen.append((partition, got))
    assert sum(len(rows) for _, rows in seen) == len(sent)
    assert len(seen) == sum(math.ceil(n / max_rows) for n in np.bincount(partitions))


def test_no_rows_give_no_frame() -> None:
    assert list(frames.encode(SPACE, rows_of([], 1))) == []


def test_columns_of_one_source_share_a_vector_block() -> None:
    """cr, fast and clicks are of one source: their vectors travel once, and frames of several columns stay small."""
    frame = frames.CODEC.decode(one_frame())
    assert {column["name"]: column["vectors"] for column in frame["columns"]} == {"cr": 0, "fast": 0, "clicks": 0, "rate": -1, "ur": 1}
    assert [block["dim"] for block in frame["vectors"]] == [4, 3]


def test_defaults_are_left_out() -> None:
    frame = frames.CODEC.decode(one_frame())
    assert frame["counts"] == b""
    assert all(column["times"] == b"" for column in frame["columns"])
    present = {column["name"]: column["present"] for column in frame["columns"]}
    assert present["cr"] == b""
    assert len(present["clicks"]) == 6


def test_no_frame_is_larger_than_a_broker_takes() -> None:
    """1 MiB is Kafka's default max.message.bytes; combined rows cannot share vectors."""
    demo = Space.parse(TOML.replace("VECTORS", "float16").replace("dim = 4", "dim = 64"))
    ids = [b"%064d" % i for i in range(20_000)] * 2
    rows = combine(demo, raw_rows(demo, "user", ids, np.random.default_rng(0)))
    assert max(len(value) for _, value in frames.encode(demo, rows)) < 1_000_000


def test_plain_avro_reads_a_frame() -> None:
    schema = fastavro.schema.load_schema(Path(crossrep.__file__).parent / "schemas" / "frame.1.avsc")
    sent = one_frame()
    frame = fastavro.schemaless_reader(BytesIO(sent[10:]), schema, None)
    got = frames.decode(SPACE, sent)
    ends = struct.unpack(f"<{frame['rows'] + 1}i", frame["key_offsets"])
    assert [frame["keys"][a:b] for a, b in itertools.pairwise(ends)] == got.keys.tolist()
    assert list(struct.unpack(f"<{frame['rows']}d", frame["times"])) == got.times.tolist()
    column = next(c for c in frame["columns"] if c["name"] == "ur")
    block = frame["vectors"][column["vectors"]]
    assert (block["dtype"], block["dim"]) == ("float32", 3)
    assert np.array_equal(np.frombuffer(block["values"], "<f4").reshape(-1, 3), got.columns["ur"].vectors)


# --- what encode refuses ---


@pytest.mark.parametrize(
    ("dtype", "wrong"), [("float16", 65520.0), ("float16", -7e4), ("float16", np.nan), ("float32", np.inf), ("float32", np.nan)]
)
def test_a_vector_that_does_not_fit_the_wire_is_named(dtype: str, wrong: float) -> None:
    rows = rows_of([b"a", b"b", b"c"], 1)
    vectors = rows.columns["cr"].vectors.copy()
    vectors[1, 2] = wrong
    broken = Rows(
        "user",
        rows.keys,
        rows.times,
        rows.counts,
        {**rows.columns, "cr": ColumnRows(vectors, *list(vars(rows.columns["cr"]).values())[1:])},
    )
    with pytest.raises(BadFrame, match=rf"cr of row \d is not finite in {dtype}") as caught:
        list(frames.encode(SPACES[dtype], broken))
    assert caught.value.reason == "vector"


def test_the_greatest_halves_pass() -> None:
    rows = rows_of([b"a"], 1)
    top = np.full((1, 4), 65504.0, np.float32)
    fits = Rows(
        "user", rows.keys, rows.times, rows.counts, {**rows.columns, "cr": ColumnRows(top, np.ones(1), rows.times, np.ones(1, np.bool_))}
    )
    ((_, value),) = frames.encode(SPACES["float16"], fits)
    assert (frames.decode(SPACES["float16"], value).columns["cr"].vectors == 65504.0).all()


# --- what decode refuses ---


def refused(value: bytes | None, reason: str, append_time: float = np.inf) -> str:
    with pytest.raises(BadFrame) as caught:
        frames.decode(SPACE, value, append_time)
    assert caught.value.reason == reason, caught.value
    return caught.value.detail


def broken(change: Callable[[Frame], Any], combined: bool = False) -> bytes:
    frame = frames.CODEC.decode(one_frame(combined=combined))
    change(frame)
    return frames.CODEC.encode(frame)


def column(frame: Frame, name: str) -> Frame:
    return next(c for c in frame["columns"] if c["name"] == name)


def doubles(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}d", *values)


def test_a_frame_rebuilt_unchanged_is_good() -> None:
    assert len(frames.decode(SPACE, broken(lambda frame: None))) == 6


def test_empty_and_foreign_values() -> None:
    refused(None, "empty")
    refused(b"", "empty")
    for value in (b"\x00", b"hello, world, this is json", b"\xc3\x01", one_frame()[:9], b"\xc3\x01" + bytes(8) + one_frame()[10:]):
        refused(value, "schema")
    refused(one_frame()[:10], "undecodable")
    refused(one_frame() + b"\x00", "undecodable")
    refused(one_frame() * 2, "undecodable")


def test_another_spec_is_named() -> None:
    changed = Space.parse(TOML.replace("VECTORS", "float32").replace('"3d"', '"4d"'))
    with pytest.raises(BadFrame, match=f"{SPACE.hash.hex()}.*{changed.hash.hex()}") as caught:
        frames.decode(changed, one_frame())
    assert caught.value.reason == "spec"


def test_unknown_entity() -> None:
    assert "'shop'" in refused(broken(lambda f: f.update(entity="shop")), "entity")
    refused(broken(lambda f: f.update(entity="")), "entity")


@pytest.mark.parametrize("rows", [0, -1, 5, 7, 65536, 65537, 2**31 - 1, -(2**31)])
def test_wrong_number_of_rows(rows: int) -> None:
    refused(broken(lambda f: f.update(rows=rows)), "length")


@pytest.mark.parametrize("name", ["times", "counts", "key_offsets"])
def test_buffers_of_a_wrong_length(name: str) -> None:
    refused(broken(lambda f: f.update({name: bytes(47)})), "length")
    refused(broken(lambda f: f.update({name: bytes(16)})), "length")
    if name != "counts":
        refused(broken(lambda f: f.update({name: b""})), "length")


@pytest.mark.parametrize("name", ["present", "weights", "times"])
def test_buffers_of_a_column_of_a_wrong_length(name: str) -> None:
    assert name in refused(broken(lambda f: column(f, "clicks").update({name: bytes(5)})), "length")
    refused(broken(lambda f: column(f, "clicks").update({name: bytes(49)})), "length")


def test_columns_must_be_the_specs() -> None:
    refused(broken(lambda f: f["columns"].pop()), "length")
    refused(broken(lambda f: f["columns"].clear()), "length")
    refused(broken(lambda f: f["columns"].append(f["columns"][0])), "length")
    refused(broken(lambda f: f["columns"].append({**f["columns"][0], "name": "more"})), "length")
    refused(broken(lambda f: column(f, "cr").update(name="CR")), "length")


def test_columns_may_come_in_any_order() -> None:
    got = frames.decode(SPACE, broken(lambda f: f["columns"].reverse()))
    assert list(got.columns) == list(SPACE.entities["user"].columns)
    assert_same(frames.decode(SPACE, one_frame()), got, "float32")


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_vector_that_is_not_finite_is_named(wrong: float, dtype: str) -> None:
    def change(frame: Frame) -> None:
        values = np.frombuffer(frame["vectors"][-1]["values"], np.float32).astype(dtype)
        values[3 * 3 + 1] = wrong
        frame["vectors"][-1].update(values=values.tobytes(), dtype=dtype)

    assert "row 3" in refused(broken(change), "vector")


@pytest.mark.parametrize("wrong", [0.0, -0.0, -1.0, np.nan, np.inf, -np.inf, 1e200, 1.01e100])
def test_wrong_weights(wrong: float) -> None:
    assert "cr.weights of row 4" in refused(broken(lambda f: column(f, "cr").update(weights=doubles(1, 2, 3, 4, wrong, 6))), "weight")


@pytest.mark.parametrize("weight", [1e100, 1e-300, 5e-324])
def test_extreme_weights_that_are_right(weight: float) -> None:
    got = frames.decode(SPACE, broken(lambda f: column(f, "cr").update(weights=doubles(*[weight] * 6))))
    assert (got.columns["cr"].weights == weight).all()


NOW = 1.75e9


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf, -1.0, -5e-324, NOW + 300.001, 1e300])
def test_wrong_times(wrong: float) -> None:
    times = doubles(1e9, 1e9, wrong, 1e9, 1e9, 1e9)
    assert "times of row 2" in refused(broken(lambda f: f.update(times=times)), "time", NOW)
    assert "cr.times of row 2" in refused(broken(lambda f: column(f, "cr").update(times=times)), "time", NOW)


def test_times_that_are_just_right() -> None:
    times = doubles(0.0, 5e-324, NOW, NOW + 300, 1e9, 1e9)
    assert frames.decode(SPACE, broken(lambda f: f.update(times=times)), NOW).times[3] == NOW + 300


@pytest.mark.parametrize("wrong", [0, -1, 2**40 + 1, -(2**63), 2**63 - 1])
def test_wrong_counts(wrong: int) -> None:
    refused(broken(lambda f: f.update(counts=struct.pack("<6q", 1, 1, wrong, 1, 1, 1))), "count")


def offsets(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}i", *values)


@pytest.mark.parametrize(
    ("keys", "ends"),
    [
        (b"abcdef", (0, 1, 2, 3, 2, 5, 6)),  # fall
        (b"abcde", (0, 1, 2, 2, 3, 4, 5)),  # an empty key
        (b"abcdefg", (1, 2, 3, 4, 5, 6, 7)),  # do not start at 0
        (b"abcdef", (-1, 1, 2, 3, 4, 5, 6)),
        (b"abcdefg", (0, 1, 2, 3, 4, 5, 6)),  # bytes left over
        (b"abcde", (0, 1, 2, 3, 4, 5, 6)),  # beyond the bytes
        (b"x" * 70, (0, 65, 66, 67, 68, 69, 70)),  # too long
        (b"abcdef", (0, 2**31 - 1, -(2**31), 3, 4, 5, 6)),  # differences overflow
        (b"abcdef", (0, 1, 2**31 - 1, 2, 4, 5, 6)),
        (b"", (0, 0, 0, 0, 0, 0, 0)),
    ],
)
def test_wrong_keys(keys: bytes, ends: tuple[int, ...]) -> None:
    refused(broken(lambda f: f.update(keys=keys, key_offsets=offsets(*ends))), "key")


def test_keys_of_the_greatest_length_pass() -> None:
    keys = b"".join(bytes([i]) * 64 for i in range(6))
    got = frames.decode(SPACE, broken(lambda f: f.update(keys=keys, key_offsets=offsets(*range(0, 385, 64)))))
    assert got.keys.tolist() == [bytes([i]) * 64 for i in range(6)]


@pytest.mark.parametrize("index", [-1, -2, 4, 2**31 - 1, -(2**31)])
def test_a_vector_index_must_be_in_range(index: int) -> None:
    assert "cr.vectors" in refused(broken(lambda f: column(f, "cr").update(vectors=index)), "length")


def test_a_vector_block_must_have_the_columns_dim() -> None:
    refused(broken(lambda f: column(f, "cr").update(vectors=column(f, "ur")["vectors"])), "length")
    for dim in (0, -4, 3, 5, 4097, 2**31 - 1):
        refused(broken(lambda f, dim=dim: f["vectors"][0].update(dim=dim)), "length")
    refused(broken(lambda f: f["vectors"][0].update(dtype="float16")), "length")
    refused(broken(lambda f: f["vectors"][0].update(values=b"")), "length")
    refused(broken(lambda f: f["vectors"].clear()), "length")


def test_absent_rows_may_hold_anything_but_wrong_vectors() -> None:
    def change(frame: Frame) -> None:
        nan = doubles(*[np.nan] * 3, 1.0, 1.0, 1.0)
        column(frame, "cr").update(present=bytes([0, 0, 0, 1, 1, 1]), weights=nan, times=nan)

    got = frames.decode(SPACE, broken(change))
    assert got.columns["cr"].present.tolist() == [False] * 3 + [True] * 3


def test_a_reader_with_the_column_in_another_type_still_reads() -> None:
    """The type of vectors is the block's own word: float16 blocks pass in a float32 space as long as the hash is right."""

    def change(frame: Frame) -> None:
        for block in frame["vectors"]:
            block.update(dtype="float16", values=np.frombuffer(block["values"], np.float32).astype(np.float16).tobytes())

    got, sent = frames.decode(SPACE, broken(change)), frames.decode(SPACE, one_frame())
    assert np.array_equal(got.columns["ur"].vectors, sent.columns["ur"].vectors.astype(np.float16).astype(np.float32))
