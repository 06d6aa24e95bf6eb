"""Events, and samples of other teams' models, for the tests of bad input."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from crossrep.spec import Space
from schemas import codec

NOW = time.time()
DAY = 86_400


def event(kind: str = "impression", **changed: Any) -> bytes:
    """An encoded event, good unless something is changed."""
    whole = {"event_id": "e", "user_id": "u1", "item_id": "i1", "event_time": int((NOW - DAY) * 1000), "scenario": "feed", "branch": "ad"}
    if kind == "click":
        whole["impression_id"] = "e"
    return codec(kind).encode({**whole, **changed})


def sample(space: Space, **changed: Any) -> bytes:
    """An encoded sample of another team's model, good unless something is changed."""
    vectors = {name: np.linspace(0, 1, dim, dtype="<f4").tobytes() for name, dim in space.sources.items()}
    whole = {
        "event": "click",
        "event_time": int((NOW - DAY) * 1000),
        "keys": {"user": "u", "item": "i"},
        "vectors": vectors,
        "weight": None,
    }
    return codec("inference").encode({**whole, **changed})
