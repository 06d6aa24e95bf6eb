"""How fresh readers are: milliseconds from just before an event is produced until a LocalView of its user holds it."""

from __future__ import annotations

import random
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from confluent_kafka import Producer

from crossrep import kafka
from crossrep.errors import CrossrepError
from crossrep.spec import Space
from crossrep.views.view import LocalView
from schemas import codec

INTERVAL = 0.1  # seconds between two probes, on average
POLL = 0.005  # seconds between two looks at the view: what a figure can be too great by
TIMEOUT = 30.0  # seconds in which a probe must be seen


@dataclass(frozen=True)
class Freshness:
    """One figure a probe, in the order in which they became visible. Every probe was one valid impression."""

    milliseconds: list[float]

    @property
    def sent(self) -> int:
        """Events sent, all of them seen: a proof of counts must include them."""
        return len(self.milliseconds)

    def percentile(self, percent: float) -> float:
        return float(np.percentile(self.milliseconds, percent))


def measure(space: Space, bootstrap: str, *, seconds: float, items: Sequence[str]) -> Freshness:
    """Send impressions of users never seen before, one every tenth of a second on average, and watch for each in a LocalView.

    Intervals vary by half, so that probes do not keep step with flushes. Event times are the stream's newest, so that a replay of the past
    is not pulled into the present.

    Args:
        items: ids that exist; the probes take turns with them.

    Raises:
        CrossrepError: a probe was not seen within half a minute, or there are no items.
    """
    if not items:
        raise CrossrepError("freshness needs the ids of some items")
    producer = kafka.producer(bootstrap, **{"partitioner": "murmur2_random", "linger.ms": 1})
    jitter = random.Random(0)
    run = f"probe-{secrets.token_hex(4)}"
    pending: dict[str, float] = {}
    taken: list[float] = []
    with LocalView("user", space.name, bootstrap) as view:
        view.wait(TIMEOUT)
        stream_time = view.stream_time if view.stream_time > 0 else time.time()
        number, begin = 0, time.perf_counter()
        due = begin
        while (now := time.perf_counter()) < begin + seconds or pending:
            if due <= now < begin + seconds:
                user = f"{run}-{number}"
                value = _impression(user, items[number % len(items)], stream_time)
                pending[user] = time.perf_counter()
                _send(producer, space.inputs.impressions, user, value)
                number, due = number + 1, now + INTERVAL * jitter.uniform(0.5, 1.5)
            producer.poll(0)
            if pending:
                waiting = list(pending)
                found = view.get(waiting).found
                seen = time.perf_counter()
                taken += [1000 * (seen - pending.pop(user)) for user, visible in zip(waiting, found) if visible]
                if pending and seen - min(pending.values()) > TIMEOUT:
                    raise CrossrepError(
                        f"probe {next(iter(pending))!r} was not visible in {space.name!r} within {TIMEOUT:.0f} s; are workers running?"
                    )
            time.sleep(POLL)
    return Freshness(taken)


def _impression(user: str, item: str, event_time: float) -> bytes:
    event = {"event_id": user, "user_id": user, "item_id": item, "event_time": int(event_time * 1000), "scenario": "", "branch": "content"}
    return codec("impression").encode(event)


def _send(producer: Producer, topic: str, key: str, value: bytes) -> None:
    def delivered(error: Any, message: Any) -> None:
        if error is not None:
            raise CrossrepError(f"a probe was not taken: {error.str()}")

    producer.produce(topic, value, key, on_delivery=delivered)
