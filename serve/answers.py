"""What look-ups answer: JSON, or the same arrays as safetensors. docs/serve.md has both."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from crossrep.views.answers import Representations
from serve.replica import Replica

JSON = b"application/json"
SAFETENSORS = b"application/x-safetensors"
_DTYPES = {"<f8": "F64", "<i8": "I64", "<f4": "F32", "|b1": "BOOL"}


@dataclass(frozen=True)
class Answer:
    """One HTTP response."""

    status: int
    body: bytes
    content_type: bytes = JSON
    headers: tuple[tuple[bytes, bytes], ...] = ()


class Refused(Exception):
    """A request that is not answered: what is wrong with it, and what to do."""

    def __init__(self, status: int, error: str, fix: str, *headers: tuple[bytes, bytes]):
        super().__init__(error)
        self.answer = Answer(status, dumps({"error": error, "fix": fix}), JSON, headers)


def dumps(value: Any) -> bytes:
    """JSON; numpy arrays as lists, float32 in as few digits as tell it from its neighbours, infinite and NaN as null."""
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


def about(replica: Replica, space: str, digest: str) -> dict[str, Any]:
    """What every answer says: the space, and how far behind it the replica is. Raises CrossrepError."""
    return {"space": space, "hash": digest, "entity": replica.entity, "lag": lag(replica)}


def lag(replica: Replica) -> dict[str, Any]:
    """Records not yet applied; and seconds: whatever was visible longer ago than that is in the answer (null: not yet known)."""
    seconds = replica.staleness
    return {"records": replica.lag, "seconds": round(seconds, 3) if math.isfinite(seconds) else None}


def batch(said: dict[str, Any], found: Representations, weighted: set[str]) -> bytes:
    """n keys in columns, as `Representations` holds them."""
    columns = {}
    for name, values in found.items():
        column: dict[str, Any] = {"vector": values.vectors} if values.vectors.shape[1] else {}
        columns[name] = column | ({"weight": values.weights} if name in weighted else {}) | {"time": values.times}
    return dumps(said | {"at": found.at, "found": found.found, "count": found.counts, "event_time": found.event_times, "columns": columns})


def point(said: dict[str, Any], id: str, found: Representations, weighted: set[str]) -> bytes:
    """One key that was found."""
    columns = {}
    for name, values in found.items():
        column: dict[str, Any] = {"vector": values.vectors[0]} if values.vectors.shape[1] else {}
        columns[name] = column | ({"weight": values.weights[0]} if name in weighted else {}) | {"time": values.times[0]}
    return dumps(said | {"at": found.at, "id": id, "count": found.counts[0], "event_time": found.event_times[0], "columns": columns})


def tensors(said: dict[str, Any], found: Representations, weighted: set[str]) -> bytes:
    """The arrays of `batch`, exactly, as a safetensors file: its length in 8 bytes, a header in JSON, then the arrays end to end."""
    arrays: dict[str, NDArray[Any]] = {"count": found.counts, "event_time": found.event_times}
    vectors: dict[str, NDArray[Any]] = {}
    for name, values in found.items():
        arrays[f"{name}.time"] = values.times
        if name in weighted:
            arrays[f"{name}.weight"] = values.weights
        if values.vectors.shape[1]:
            vectors[f"{name}.vector"] = values.vectors
    arrays |= vectors | {"found": found.found}  # the widest first: everything is aligned then
    seconds = said["lag"]["seconds"]
    metadata = {"space": said["space"], "hash": said["hash"], "entity": said["entity"], "at": repr(float(found.at))}
    metadata |= {"lag_records": str(said["lag"]["records"]), "lag_seconds": "" if seconds is None else str(seconds)}
    header: dict[str, Any] = {"__metadata__": metadata}
    blobs, end = [], 0
    for name, array in arrays.items():
        blob = np.ascontiguousarray(array).tobytes()
        header[name] = {"dtype": _DTYPES[array.dtype.str], "shape": array.shape, "data_offsets": (end, end := end + len(blob))}
        blobs.append(blob)
    text = orjson.dumps(header)
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *blobs])
