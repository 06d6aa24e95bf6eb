"""The history: for every key, what it was at a rewind point, written when the key first changes after it.

From time to time a partition declares where it stands a *rewind point*. The first flush that changes a key after that writes the key's
former record to `history.<space>`, in the same transaction as the new one. Going back to a point is then: of every key that changed
since, take the first former record written at or after the point (`streams/operations/rewind.py`).
A hot key costs one record a point, not one a flush.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from crossrep.keys import Keys
from schemas import codec
from state.progress import Point

CODEC = codec("undo")
POINTS = 12  # rewind points that a space's history holds
MAX_BYTES = 900_000  # of a message: brokers take 1 MiB unless told otherwise


@dataclass(frozen=True)
class Undo:
    """Keys of one entity and what they were at `point`: a record, or None where the key did not exist."""

    entity: str
    point: Point
    keys: list[bytes]
    records: list[bytes | None]


def encode(undo: Undo) -> Iterator[bytes]:
    """Messages for the history topic, none larger than brokers take."""
    if not undo.keys:
        return
    largest = 80 + max(len(record or b"") for record in undo.records)
    step = max(1, MAX_BYTES // largest)
    for first in range(0, len(undo.keys), step):
        keys, records = Keys.of(undo.keys[first : first + step]), undo.records[first : first + step]
        yield CODEC.encode(
            {
                "entity": undo.entity,
                "offset": undo.point.offset,
                "append_time": undo.point.append_time,
                "stream_time": undo.point.stream_time,
                "key_offsets": keys.offsets.tobytes(),
                "keys": keys.data.tobytes(),
                "present": bytes(record is not None for record in records),
                "records": b"".join(record or b"" for record in records),
            }
        )


def decode(value: bytes | None) -> Undo:
    """One message of the history topic. Raises BadRecord."""
    found = CODEC.decode(value)
    offsets = np.frombuffer(found["key_offsets"], "<i4").tolist()
    keys = [found["keys"][a:b] for a, b in pairwise(offsets)]
    held = sum(found["present"])
    size = len(found["records"]) // held if held else 0
    blobs = (found["records"][i * size : (i + 1) * size] for i in range(held))
    records = [next(blobs) if present else None for present in found["present"]]
    return Undo(found["entity"], Point(found["offset"], found["append_time"], found["stream_time"]), keys, records)
