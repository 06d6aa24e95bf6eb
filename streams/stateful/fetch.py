"""Fetching with librdkafka, for the partitions that Faust's membership of the group gives us: frames, or events.

Faust's own client copies what it fetches four or five times, in Python: at full load that took a sixth of the interpreter's time.

Each time a partition begins to flow, from whatever offset, is a *flow* of its own. A run carries the number of its flow, and whoever folds
asks `current` first: what was fetched before a rebalance or a new position is never folded after it, wherever it waited.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from confluent_kafka import Consumer, KafkaError, Message, TopicPartition

from crossrep import kafka
from crossrep.errors import CrossrepError, StateError
from streams.silence import Place, Silence, reached

log = logging.getLogger(__name__)

RUN = 2 << 20  # bytes of frames that are fetched at a time; the last ones may be over
BUFFERED = 6  # runs that wait to be folded, with which the next ones are fetched
WAIT = 0.05  # seconds a fetch waits for a first frame; a partition that is to flow waits as long
QUEUED = 16 << 20  # bytes of frames that librdkafka may hold for us
FETCHED = 1 << 20  # bytes a partition of one answer from a broker
AT_ONCE = 4  # frames taken from librdkafka by one call

Fetched = tuple[list[Message], list[tuple[int, StateError]]]  # frames, and partitions that lack what they were asked for
Ahead = tuple[
    dict[int, int], list[Future[None]], Future[Fetched]
]  # a fetch: the flows when it began, what was ordered before, what it brings


@dataclass(frozen=True)
class Run:
    """Consecutive frames of one partition, at least one."""

    partition: int
    flow: int
    frames: list[Message]


class Fetch:
    """Frames of the partitions that flow. Belongs to an event loop; librdkafka is called from one thread, so calls to it never overlap.

    Args:
        topics: with the same partitions: a number flows in all of them or in none.
        ends: runs also hold the events that tell of a partition's end (`kafka.is_end`).
    """

    def __init__(self, topics: Sequence[str], bootstrap: str, ends: bool = False):
        self._topics = topics
        self._ends = ends
        self._client: Consumer = kafka.consumer(
            bootstrap,
            f"{topics[0]}-fetch",  # of which nobody is a member: partitions are given, not subscribed to
            {
                **kafka.ENDS,
                "queued.max.messages.kbytes": QUEUED >> 10,
                "fetch.message.max.bytes": FETCHED,
                "fetch.wait.max.ms": int(WAIT * 1000),
            },
        )
        self._thread = ThreadPoolExecutor(1, "fetch")
        self._numbers = itertools.count()
        self._flows: dict[int, int] = {}
        self._orders: list[Future[None]] = []  # not yet known to have worked
        self._ahead: Ahead | None = None
        self._began: dict[Place, int] = {}  # the offsets at which what is assigned began
        self._silence = Silence(bootstrap)

    @property
    def flowing(self) -> set[int]:
        return set(self._flows)

    def flow(self, partition: int, *offsets: int) -> None:
        """Fetch this partition from these offsets on, one a topic. Whatever was fetched of it before is void at once."""
        self._flows[partition] = next(self._numbers)
        for topic, offset in zip(self._topics, offsets, strict=True):
            self._orders.append(self._thread.submit(self._assign, topic, partition, offset))

    def pause(self, topic: str, partition: int, paused: bool = True) -> None:
        """Fetch no more of this topic's partition for now, or again. A new flow begins unpaused."""
        self._orders.append(self._thread.submit(self._pause, topic, partition, paused))

    def hold(self) -> set[int]:
        """Let nothing flow; all that was fetched is void at once. Returns what flowed."""
        held, self._flows = self.flowing, {}
        self._orders.append(self._thread.submit(self._unassign))
        return held

    def current(self, run: Run) -> bool:
        """May this run be folded, or was it fetched for a state of affairs that is over?"""
        return self._flows.get(run.partition) == run.flow

    async def runs(self) -> list[Run]:
        """What comes next: about two mebibytes, nothing if nothing came for a moment.

        Raises:
            CrossrepError: frames were deleted before they were fetched, or the connection is gone for good.
        """
        flows, orders, frames = self._ahead or self._begin()
        found, lacking = await asyncio.shield(asyncio.wrap_future(frames))
        self._ahead = self._begin()  # goes on while these are folded
        for order in orders:
            order.result()
        for number, error in lacking:
            if number in flows and flows[number] == self._flows.get(number):
                raise error
        by_partition: dict[int, list[Message]] = {}
        for frame in found:
            by_partition.setdefault(frame.partition(), []).append(frame)
        return [Run(number, flows[number], its) for number, its in by_partition.items() if number in flows]

    def _begin(self) -> Ahead:
        # There is one thread: what was ordered up to here is done before this fetch, what is ordered from here on behind it.
        orders, self._orders = self._orders, []
        return dict(self._flows), orders, self._thread.submit(self._take)

    # --- in the thread ---

    def _assign(self, topic: str, partition: int, offset: int) -> None:
        self._began[topic, partition] = offset
        place = TopicPartition(topic, partition, offset)
        if place in self._client.assignment():
            self._client.incremental_unassign([place])
        self._client.incremental_assign([place])
        self._client.resume([place])
        self._silence.assigned({(topic, partition): offset})

    def _pause(self, topic: str, partition: int, paused: bool) -> None:
        if (topic, partition) in self._began:  # else it does not flow any more
            (self._client.pause if paused else self._client.resume)([TopicPartition(topic, partition)])

    def _unassign(self) -> None:
        self._began = {}
        self._client.unassign()
        self._silence.unassigned()

    def _take(self) -> Fetched:
        frames: list[Message] = []
        lacking: list[tuple[int, StateError]] = []
        size = 0
        events = self._client.consume(1, WAIT)
        if not events:
            self._silence.check()
        while events:
            self._silence.heard(reached(events))
            for event in events:
                if event.error() is None or (self._ends and kafka.is_end(event)):
                    frames.append(event)
                    size += len(event)
                elif event.error().code() == KafkaError._AUTO_OFFSET_RESET:
                    # librdkafka tells of it even if the partition was taken away meanwhile, or is read from elsewhere.
                    if event.offset() >= self._began.get((event.topic(), event.partition()), math.inf):
                        lacking.append((event.partition(), _deleted(event)))
                else:
                    self._check(event)
            events = self._client.consume(AT_ONCE, 0) if size < RUN else []
        return frames, lacking

    def _check(self, event: Message) -> None:
        place, error = f"{event.topic()}[{event.partition()}]", event.error()
        if error.fatal():
            raise CrossrepError(f"fetching {place}: {error.str()}")
        if not (kafka.is_end(event) or error.retriable() or error.code() in kafka.TRANSIENT):
            log.warning("fetching %s: %s", place, error.str())


def _deleted(event: Message) -> StateError:
    place = f"{event.topic()}[{event.partition()}]"
    return StateError(f"{place}: frames were deleted before they were folded ({event.error().str()}). The next start says what can be done")
