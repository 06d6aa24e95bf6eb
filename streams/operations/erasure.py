"""Erasing a key: the order, and the proof of what is still recorded of it, and until when."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

import numpy as np
from rich.table import Table

from crossrep import kafka
from crossrep.columnar import forget, frames
from crossrep.columnar.forget import Forget
from crossrep.errors import CrossrepError, SpaceError
from crossrep.keys import Keys
from crossrep.spec import Space
from state import history, progress

FOLDED_WITHIN = 60.0  # seconds that an order may take until it is folded


@dataclass(frozen=True)
class Order:
    """A written order."""

    key: Forget
    partition: int
    offset: int
    appended: float  # seconds since 1970


@dataclass(frozen=True)
class Trace:
    """What one topic still records of a key from before its order."""

    topic: str
    records: int
    until: float | None  # seconds since 1970 when the last of them is gone by the topic's settings; None: never


def order(space: Space, bootstrap: str, key: Forget) -> Order:
    """Write the order to forget a key. It takes effect behind everything that is in the key's partition now.

    Raises:
        SpaceError: no such entity.
        CrossrepError: the cluster did not take it.
    """
    if key.entity not in space.entities:
        raise SpaceError(f"space {space.name!r} has no entity {key.entity!r}; it has {', '.join(space.entities)}")
    partition = int(Keys.of([key.key]).partitions(space.partitions)[0])
    taken: list[Any] = []
    producer = kafka.producer(bootstrap, acks="all")
    producer.produce(
        space.frames_topic, forget.encode(space, key), key.key, partition, on_delivery=lambda error, message: taken.append((error, message))
    )
    producer.flush(kafka.REQUEST_TIMEOUT)
    if not taken or taken[0][0] is not None:
        reason = taken[0][0].str() if taken else "no answer"
        raise CrossrepError(f"the order to forget was not taken by {space.frames_topic}[{partition}]: {reason}. Give it again")
    return Order(key, partition, taken[0][1].offset(), taken[0][1].timestamp()[1] / 1000)


def wait(space: Space, bootstrap: str, order: Order) -> None:
    """Until the order is folded: from then on no reader sees what was.

    Raises:
        CrossrepError: no fold worker has come by in time. The order stands: it will be folded.
    """
    deadline = time.monotonic() + FOLDED_WITHIN
    while True:
        at = progress.committed(space, bootstrap).get(order.partition)
        if at is not None and at.offset > order.offset:
            return
        if time.monotonic() > deadline:
            raise CrossrepError(
                f"the order {space.frames_topic}[{order.partition}]@{order.offset} stands, but is not folded after {FOLDED_WITHIN:.0f} s. "
                "Start a fold worker, and look again: crossrep forget --check"
            )
        time.sleep(0.1)


def traces(space: Space, bootstrap: str, key: Forget) -> list[Trace]:
    """What the topics still record of a key from before the newest order to forget it, read message by message.

    Raises:
        CrossrepError: no such order is on the frames topic (any more).
    """
    partition = int(Keys.of([key.key]).partitions(space.partitions)[0])

    def read(topic: str) -> Any:
        return kafka.messages(bootstrap, topic, {partition: kafka.bounds(bootstrap, topic)[partition]})

    newest: Any = None
    rows: list[tuple[int, float]] = []  # frames with the key: offset, append time
    for message in read(space.frames_topic):
        value = message.value()
        if forget.is_order(value):
            if value == forget.encode(space, key):
                newest = message
        elif _holds(key, value):
            rows.append((message.offset(), message.timestamp()[1] / 1000))
    if newest is None:
        raise CrossrepError(f"no order to forget {key.entity} {key.key.decode(errors='replace')!r} is on {space.frames_topic}[{partition}]")
    offset = newest.offset()
    found = [_trace(bootstrap, space.frames_topic, "retention.ms", [at for place, at in rows if place < offset])]
    former: list[float] = []
    since: list[float] = []
    for message in read(space.representations_topic(key.entity)):
        if message.key() == key.key:
            since.append(message.timestamp()[1] / 1000)
            if not message.value():
                former, since = former + since[:-1], []  # everything in front of a tombstone is former
    found.append(_trace(bootstrap, space.representations_topic(key.entity), "max.compaction.lag.ms", former))
    undone = []
    for message in read(space.history_topic):
        undo = history.decode(message.value())
        held = undo.entity == key.entity and undo.point.offset <= offset and dict(zip(undo.keys, undo.records)).get(key.key)
        if held:
            undone.append(message.timestamp()[1] / 1000)
    found.append(_trace(bootstrap, space.history_topic, "retention.ms", undone))
    return found


def table(found: list[Trace]) -> Table:
    rows = Table("topic", "former records of the key", "gone by", box=None)
    for trace in found:
        until = "" if not trace.records else "never: set a limit" if trace.until is None else _text(trace.until)
        rows.add_row(trace.topic, str(trace.records), until)
    return rows


def _text(time: float) -> str:
    return datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _holds(key: Forget, value: bytes | None) -> bool:
    if value is None or key.key not in value:
        return False
    try:
        frame = frames.CODEC.decode(value)
    except CrossrepError:
        return False
    ends = np.frombuffer(frame["key_offsets"], "<i4").tolist()
    return frame["entity"] == key.entity and any(frame["keys"][a:b] == key.key for a, b in pairwise(ends))


def _trace(bootstrap: str, topic: str, setting: str, appended: list[float]) -> Trace:
    config = kafka.settings(bootstrap, topic)
    kept = int(config[setting])
    never = kept < 0 or kept > 10**15
    # Logs are deleted and compacted by whole segments, each when its youngest record is old enough.
    segment = int(config["segment.ms"])
    until = None if never else max(appended, default=0.0) + (kept + (segment if setting == "retention.ms" else 0)) / 1000
    return Trace(topic, len(appended), until)
