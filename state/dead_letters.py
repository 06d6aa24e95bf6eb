"""Dead letters: what was refused, as it was, with where it stood and why."""

from __future__ import annotations

from crossrep.errors import BadRecord
from schemas import codec

CODEC = codec("dead_letter")
MOST = 512 << 10  # bytes of a value that are kept, so that the letter itself is never too large; the offset leads to the whole


def encode(topic: str, partition: int, offset: int, key: bytes | None, value: bytes | None, error: BadRecord) -> bytes:
    return CODEC.encode(
        {
            "topic": topic,
            "partition": partition,
            "offset": offset,
            "key": key,
            "value": value[:MOST] if value else value,
            "reason": error.reason,
            "detail": error.detail,
        }
    )
