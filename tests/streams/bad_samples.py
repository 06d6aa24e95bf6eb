"""Events for the tests of bad input."""

from __future__ import annotations

import time
from typing import Any

from schemas import codec

NOW = time.time()
DAY = 86_400


def event(kind: str = "impression", **changed: Any) -> bytes:
    """An encoded event, good unless something is changed."""
    whole = {"event_id": "e", "user_id": "u1", "item_id": "i1", "event_time": int((NOW - DAY) * 1000), "scenario": "feed", "branch": "ad"}
    if kind == "click":
        whole["impression_id"] = "e"
    return codec(kind).encode({**whole, **changed})
