"""What must hold of an impression or a click behind its schema."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from crossrep.columnar.frames import CLOCK_SKEW
from crossrep.errors import BadEvent
from crossrep.spec import MAX_KEY_BYTES


def check_event(event: dict[str, Any], append_time: float, optional: Sequence[str] = ("scenario",)) -> None:
    """Raise if it does not.

    Args:
        append_time: the broker's time of the message, seconds since 1970.
        optional: fields that may be empty, but must not be longer than a key.

    Raises:
        BadEvent: an id is missing or too long ("id"), the time is before 1970 or over five minutes after the append time ("time").
    """
    for name in ("user_id", "item_id"):
        if not event[name] or _too_long(event[name]):
            raise BadEvent("id", f"{name} {event[name]!r}: 1 to {MAX_KEY_BYTES} bytes are allowed")
    for name in optional:
        if _too_long(event.get(name, "")):
            raise BadEvent("id", f"{name} {event[name]!r} is longer than {MAX_KEY_BYTES} bytes")
    if not 0 <= event["event_time"] <= (append_time + CLOCK_SKEW) * 1000:
        raise BadEvent("time", f"event_time {event['event_time']} ms: before 1970, or over 5 minutes after it was appended")


def _too_long(id: str) -> bool:
    # No character has over four bytes: most ids need not be encoded to know.
    return 4 * len(id) > MAX_KEY_BYTES and len(id.encode()) > MAX_KEY_BYTES
