"""The decayed mean of one key as bytes, for the peers in Python. No import of crossrep: Quix Streams has an environment of its own."""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import NDArray

DIM = 64
HALF_LIFE = 3 * 86400.0
SAMPLE = np.dtype([("vector", "<f4", DIM), ("time", "<f8"), ("weight", "<f8")])  # 272 bytes
_SAMPLE_TAIL = struct.Struct("<dd")  # time, weight
_STATE_HEAD = struct.Struct("<qdd")  # count, time, weight; the mean follows as float32: 280 bytes


def folded(state: bytes | None, sample: bytes) -> bytes:
    """The state with one sample more: crossrep's formula (`crossrep.columnar.algebra`), for one row."""
    vector = np.frombuffer(sample, np.float32, DIM)
    time, weight = _SAMPLE_TAIL.unpack_from(sample, 4 * DIM)
    if state is None:
        return _STATE_HEAD.pack(1, time, weight) + vector.tobytes()
    count, newest, old = _STATE_HEAD.unpack_from(state)
    since = (time - newest) / HALF_LIFE
    if since >= 0:
        newest, old = time, old * 2.0**-since
    else:
        weight *= 2.0**since
    total = old + weight
    mean: NDArray[np.float32] = np.frombuffer(state, np.float32, DIM, _STATE_HEAD.size)
    mean = mean + (weight / total) * (vector - mean)
    return _STATE_HEAD.pack(count + 1, newest, total) + mean.tobytes()
