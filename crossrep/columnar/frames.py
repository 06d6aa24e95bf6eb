"""Frames: many rows of one entity in one Kafka message, in columns. Layout byte by byte: docs/formats.md."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossrep.columnar import algebra
from crossrep.columnar.avro import Codec
from crossrep.columnar.rows import ColumnRows, Rows
from crossrep.errors import BadFrame, BadRecord
from crossrep.keys import Keys
from crossrep.spec import MAX_KEY_BYTES, Entity, Space

MAX_ROWS = 4096  # rows a frame we write
MAX_BYTES = 900_000  # a frame we write: brokers take 1 MiB unless told otherwise
ROWS_LIMIT = 65536  # rows a frame we read
CLOCK_SKEW = 300.0  # seconds an event may lie after the broker's append time
WEIGHT_LIMIT = 1e100  # of a row, so that no sum of weights overflows
EVENT_WEIGHT_LIMIT = 1e50  # of one event, so that no combined row is over the limit


def _shared_ones(dtype: type) -> NDArray[Any]:
    ones: NDArray[Any] = np.ones(ROWS_LIMIT, dtype)
    ones.flags.writeable = False
    return ones


# What a frame leaves out because it is 1 in every row.
_COUNTS, _WEIGHTS, _PRESENT = _shared_ones(np.int64), _shared_ones(np.float64), _shared_ones(np.bool_)

CODEC = Codec.load(files("crossrep") / "schemas", "frame")


def encode(space: Space, rows: Rows, max_rows: int = MAX_ROWS) -> Iterator[tuple[int, bytes]]:
    """Frames for `rows`, each with the partition of its keys. Empty rows give no frame.

    Raises:
        BadFrame: a vector is not finite, or is beyond the range of the space's vector type.
    """
    if not len(rows):
        return
    max_rows = max(1, min(max_rows, MAX_BYTES // _most_bytes(space, rows)))
    partitions = rows.keys.partitions(space.partitions)
    order = np.argsort(partitions, kind="stable")
    ends = np.cumsum(np.bincount(partitions, minlength=space.partitions))
    for partition, (start, end) in enumerate(zip([0, *ends[:-1]], ends)):
        for first in range(start, end, max_rows):
            yield partition, _encode_one(space, rows.take(order[first : min(first + max_rows, end)]))


def _most_bytes(space: Space, rows: Rows) -> int:
    """Bytes of one row at most."""
    dims = {id(column.vectors): column.vectors.shape[1] for column in rows.columns.values()}
    vector_bytes: int = sum(dims.values()) * np.dtype(space.vectors).itemsize
    return MAX_KEY_BYTES + 20 + 17 * len(rows.columns) + vector_bytes


def _encode_one(space: Space, rows: Rows) -> bytes:
    blocks: dict[int, int] = {}  # the identity of a vector array -> its index: columns of one source share it
    vectors: list[dict[str, Any]] = []
    columns: list[dict[str, Any]] = []
    for name, column in rows.columns.items():
        index = -1
        if column.vectors.shape[1]:
            index = blocks.setdefault(id(column.vectors), len(vectors))
            if index == len(vectors):
                vectors.append({"dtype": space.vectors, "dim": column.vectors.shape[1], "values": _narrow(column.vectors, space, name)})
        columns.append(
            {
                "name": name,
                "present": b"" if column.present.all() else column.present.tobytes(),
                "weights": b"" if (column.weights == 1.0).all() else column.weights.tobytes(),
                "times": b"" if (column.times == rows.times).all() else column.times.tobytes(),
                "vectors": index,
            }
        )
    return CODEC.encode(
        {
            "space_hash": space.hash,
            "entity": rows.entity,
            "rows": len(rows),
            "key_offsets": rows.keys.offsets.tobytes(),
            "keys": rows.keys.data.tobytes(),
            "times": rows.times.tobytes(),
            "counts": b"" if (rows.counts == 1).all() else rows.counts.tobytes(),
            "vectors": vectors,
            "columns": columns,
        }
    )


def _narrow(vectors: NDArray[np.float32], space: Space, name: str) -> bytes:
    with np.errstate(over="ignore"):
        narrow = vectors.astype(space.vectors)
    if not np.isfinite(narrow).all():
        row = int(np.flatnonzero(~np.isfinite(narrow).all(axis=1))[0])
        raise BadFrame("vector", f"{name} of row {row} is not finite in {space.vectors}")
    return narrow.tobytes()


def decode(space: Space, value: bytes | None, append_time: float = np.inf, partition: int | None = None) -> Rows:
    """The rows of one frame, validated whole: whatever passes can be folded without a further check.

    Args:
        append_time: the broker's time of the message, seconds since 1970; times more than five minutes later are refused.
        partition: where the message lay; keys of other partitions are refused, since two owners would each keep a part of their state.

    Raises:
        BadFrame: with a reason: empty, schema, undecodable, spec, entity, length, key, partition, time, weight, count, vector.
    """
    try:
        frame = CODEC.decode(value)
    except BadRecord as error:
        raise BadFrame(error.reason, error.detail) from None
    if frame["space_hash"] != space.hash:
        raise BadFrame("spec", f"written for spec {frame['space_hash'].hex()}, this space {space.name!r} has {space.hash.hex()}")
    entity = space.entities.get(frame["entity"])
    if entity is None:
        raise BadFrame("entity", f"{frame['entity']!r} is not an entity of space {space.name!r}")
    n = frame["rows"]
    if not 0 < n <= ROWS_LIMIT:
        raise BadFrame("length", f"{n} rows; 1 to {ROWS_LIMIT} are allowed")
    times = _array(frame["times"], np.float64, n, "times")
    _check_times(times, append_time, "times")
    counts = _COUNTS[:n]
    if frame["counts"]:
        counts = _array(frame["counts"], np.int64, n, "counts")
        if counts.min() < 1 or counts.max() > 2**40:
            raise BadFrame("count", f"counts from {counts.min()} to {counts.max()}; a row stands for 1 to 2^40 events")
    blocks = [_decode_vectors(block, n, i) for i, block in enumerate(frame["vectors"])]
    given = {column["name"]: column for column in frame["columns"]}
    if set(given) != set(entity.columns) or len(frame["columns"]) != len(given):
        raise BadFrame("length", f"columns {[c['name'] for c in frame['columns']]}, not {list(entity.columns)}")
    columns = {name: _decode_column(given[name], name, entity, times, blocks, append_time) for name in entity.columns}
    return Rows(frame["entity"], _decode_keys(frame, n, space.partitions, partition), times, counts, columns)


def vectors_as_sent(value: bytes) -> dict[str, NDArray[np.floating]]:
    """The vectors of a frame that `decode` accepts, not widened: by column, float16 or float32 [n, dim]; of one block, one array."""
    frame = CODEC.decode(value)
    blocks = [np.frombuffer(block["values"], block["dtype"]).reshape(frame["rows"], block["dim"]) for block in frame["vectors"]]
    return {column["name"]: blocks[column["vectors"]] for column in frame["columns"] if column["vectors"] >= 0}


def _array(data: bytes, dtype: type, n: int, name: str) -> NDArray[Any]:
    if len(data) != n * np.dtype(dtype).itemsize:
        raise BadFrame("length", f"{name} has {len(data)} bytes, not {n} × {np.dtype(dtype).itemsize}")
    return np.frombuffer(data, dtype)


def _check_times(times: NDArray[np.float64], append_time: float, name: str) -> None:
    wrong = algebra.first_outside(times, 0.0, min(append_time + CLOCK_SKEW, sys.float_info.max))
    if wrong >= 0:
        raise BadFrame(
            "time", f"{name} of row {wrong} is {times[wrong]}: before 1970, or over 5 minutes later than the frame's append time"
        )


def _decode_keys(frame: dict[str, Any], n: int, partitions: int, partition: int | None) -> Keys:
    keys = Keys(np.frombuffer(frame["keys"], np.uint8), _array(frame["key_offsets"], np.int32, n + 1, "key_offsets"))
    if not keys.well_formed():
        raise BadFrame("key", f"key_offsets must rise from 0 to {len(keys.data)} in steps of 1 to {MAX_KEY_BYTES} bytes")
    if partition is not None:
        foreign = np.flatnonzero(keys.partitions(partitions) != partition)
        if len(foreign):
            raise BadFrame("partition", f"key of row {foreign[0]} belongs to another partition than {partition}")
    return keys


def _decode_vectors(block: dict[str, Any], n: int, index: int) -> NDArray[np.float32]:
    if not 0 < block["dim"] <= 4096:
        raise BadFrame("length", f"vector block {index} has dim {block['dim']}")
    if block["dtype"] == "float16":
        vectors, finite = algebra.widen(_array(block["values"], np.float16, n * block["dim"], f"vector block {index}"))
    else:
        vectors = _array(block["values"], np.float32, n * block["dim"], f"vector block {index}")
        finite = bool(np.isfinite(vectors).all())
    if not finite:
        row = int(np.flatnonzero(~np.isfinite(np.frombuffer(block["values"], block["dtype"])))[0]) // block["dim"]
        raise BadFrame("vector", f"vector block {index} has a value that is not finite in row {row}")
    return vectors.reshape(n, block["dim"])


def _decode_column(
    column: dict[str, Any], name: str, entity: Entity, times: NDArray[np.float64], blocks: list[NDArray[np.float32]], append_time: float
) -> ColumnRows:
    n = len(times)
    present = _PRESENT[:n]
    if column["present"]:
        present = _array(column["present"], np.uint8, n, f"{name}.present") != 0
        present.flags.writeable = False  # as all that is read from a frame: the kernels are compiled for that, once
    if column["times"]:
        own = _array(column["times"], np.float64, n, f"{name}.times")
        if present.any():
            _check_times(own[present], append_time, f"{name}.times")
        times = own
    weights = _WEIGHTS[:n]
    if column["weights"]:
        weights = _array(column["weights"], np.float64, n, f"{name}.weights")
        if algebra.first_outside(weights, math.ulp(0.0), WEIGHT_LIMIT) >= 0:
            wrong = present & ~((weights > 0) & (weights <= WEIGHT_LIMIT))
            if wrong.any():
                row = int(np.flatnonzero(wrong)[0])
                raise BadFrame("weight", f"{name}.weights of row {row} is {weights[row]}; 0 < weight <= {WEIGHT_LIMIT:g}")
    dim = entity.columns[name].dim
    index = column["vectors"]
    if dim == 0:
        return ColumnRows(np.empty((n, 0), np.float32), weights, times, present)
    if not 0 <= index < len(blocks) or blocks[index].shape[1] != dim:
        raise BadFrame("length", f"{name}.vectors is {index}; it must be the index of a block of dim {dim}")
    return ColumnRows(blocks[index], weights, times, present)
