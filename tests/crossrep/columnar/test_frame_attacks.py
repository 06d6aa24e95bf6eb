"""Frames from who means harm: any bytes at all cost the frame alone, and no memory."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crossrep.columnar import frames
from crossrep.errors import BadFrame
from tests.alone import alone
from tests.crossrep.columnar.wire_samples import SPACE, SPACES, one_frame


def survives(value: bytes, append_time: float = 1.8e9) -> bool:
    """Either BadFrame, or rows that pass every check, written here once more."""
    try:
        rows = frames.decode(SPACE, value, append_time)
    except BadFrame as error:
        assert error.reason in {"empty", "schema", "undecodable", "spec", "entity", "length", "key", "time", "weight", "count", "vector"}  # noqa: PT017
        return False
    n = len(rows)
    assert len(rows.keys) == len(rows.counts) == n > 0
    assert all(1 <= len(key) <= 64 for key in rows.keys.tolist())
    assert b"".join(rows.keys.tolist()) == rows.keys.data.tobytes()
    assert all(0 <= time <= append_time + 300 for time in rows.times.tolist())
    assert all(1 <= count <= 2**40 for count in rows.counts.tolist())
    declared = SPACE.entities[rows.entity].columns
    assert list(rows.columns) == list(declared)
    for name, part in rows.columns.items():
        assert part.vectors.shape == (n, declared[name].dim)
        assert part.vectors.dtype == np.float32
        assert all(map(math.isfinite, part.vectors.ravel().tolist()))
        assert len(part.weights) == len(part.times) == len(part.present) == n
        for here, weight, time in zip(part.present.tolist(), part.weights.tolist(), part.times.tolist()):
            assert not here or (0 < weight <= 1e100 and 0 <= time <= append_time + 300)
    return True


@pytest.mark.parametrize("combined", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_truncated_anywhere_is_a_bad_frame(dtype: str, combined: bool) -> None:
    value = one_frame(combined=combined, dtype=dtype)
    for length in range(len(value)):
        with pytest.raises(BadFrame):
            frames.decode(SPACES[dtype], value[:length])


def test_every_single_byte_changed() -> None:
    value = one_frame(combined=True)
    for place in range(len(value)):
        for byte in (0x00, 0x01, 0x7F, 0x80, 0xFF, value[place] ^ 1, value[place] ^ 0x80):
            survives(value[:place] + bytes([byte]) + value[place + 1 :])


LONGS = [
    b"\xff\xff\xff\xff\x0f",
    b"\xfe\xff\xff\xff\x0f",
    b"\xff" * 9 + b"\x01",
    b"\xfe" + b"\xff" * 8 + b"\x01",
    b"\xff" * 20,
    b"\x80" * 12 + b"\x01",
    b"\x01",
    b"\x80\x80\x40",
]


def test_random_damage_costs_the_frame_alone() -> None:
    alone(survive_random_damage)


def survive_random_damage() -> None:
    """Flips, cuts, doublings and enormous lengths in random places; and none makes the decoder allocate more than the frame could need."""
    rng = np.random.default_rng(11)
    good = [one_frame(seed, combined=combined) for seed in range(3) for combined in (False, True)]
    limit = 50 * max(map(len, good)) + 1_000_000  # 65,536 rows a frame claims before its buffers are seen cost 524,288 bytes
    passed = 0
    tracemalloc.start()
    for attempt in range(6000):
        value = bytearray(good[attempt % len(good)])
        for _ in range(rng.integers(1, 5)):
            place = int(rng.integers(10, len(value)))
            match rng.integers(0, 5):
                case 0 | 1:
                    value[place] = rng.integers(0, 256)
                case 2:
                    del value[place : place + int(rng.integers(1, 20))]
                case 3:
                    value[place:place] = value[place : place + int(rng.integers(1, 20))]
                case 4:
                    value[place : place + int(rng.integers(0, 3))] = LONGS[rng.integers(0, len(LONGS))]
            if len(value) < 12:
                break
        passed += survives(bytes(value))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < limit
    assert passed > 100  # otherwise the attack never gets beyond the first check


@settings(max_examples=50)
@given(st.binary(max_size=200))
def test_any_bytes_behind_a_right_header(body: bytes) -> None:
    survives(frames.CODEC.header + body)
    survives(frames.CODEC.header + SPACE.hash + b"\x08user" + body)


def test_claims_of_billions_are_refused_at_once() -> None:
    start = frames.CODEC.header + SPACE.hash + b"\x08user" + b"\x02"
    for claim in LONGS:
        for repeat in range(6):
            survives(start + b"\x00" * repeat + claim * 3)
            survives(start + b"\x00" * repeat + claim + b"\x02" * 1000)
