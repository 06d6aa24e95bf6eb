"""Every private name of Faust and aiokafka that crossrep touches, in one place; tests/streams/test_faust_transport.py fails when one moves.

Faust owns group membership, fetching and the event loop. Positions are ours: progress is committed with the state, so after a rebalance
each partition is held until its state is restored, and then flows from our progress, never from what Faust believes was acknowledged.

A message costs Faust about 120 µs, whatever its size: two tasks and a queue. So what it is given as one message is a *run*: consecutive
frames of one partition, about a mebibyte of them.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import aiokafka
from aiokafka.consumer.fetcher import FetchError
from aiokafka.errors import NoOffsetForPartitionError
from faust.transport.drivers import aiokafka as driver
from faust.types import TP
from faust.types.tuples import ConsumerMessage

FETCH_WAIT_MS = 50  # Faust hard-codes 1500: an idle partition would hold up a busy one
RUN = 1 << 20  # bytes of frames that make a run full; the last one may be larger
BUFFERED = 12  # runs in the agent's queue with which the next ones are fetched
LOOK = 0.002  # seconds between looks at that queue

Positions = Callable[[], Mapping[int, int]]
Backlog = Callable[[], int]


class _Thread(driver.AIOKafkaConsumerThread):  # type: ignore[misc]
    """Creates the aiokafka consumer with the settings Faust has no option for."""

    def _create_worker_consumer(self, transport: Any) -> aiokafka.AIOKafkaConsumer:
        consumer = super()._create_worker_consumer(transport)
        fetcher_settings = {
            "_isolation_level": "read_committed",
            "_auto_offset_reset": "none",  # a position that is gone is an error, never a jump
            "_fetch_max_wait_ms": FETCH_WAIT_MS,
        }
        for name, value in fetcher_settings.items():
            if not hasattr(consumer, name):
                raise AttributeError(f"aiokafka {aiokafka.__version__} has no AIOKafkaConsumer.{name}; crossrep must be adapted")
            setattr(consumer, name, value)
        return consumer

    async def _seek_wait(self, consumer: aiokafka.AIOKafkaConsumer, partitions: Mapping[TP, int]) -> None:
        # A group without committed offsets leaves an error in aiokafka's queue at assignment; the position we give makes it void.
        queue = consumer._fetcher._records
        for tp in partitions:
            if isinstance(queue.get(tp), FetchError):
                del queue[tp]
        await super()._seek_wait(consumer, partitions)


class _Consumer(driver.Consumer):  # type: ignore[misc]
    """Seeks where crossrep's progress is, and pauses what is not restored."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._seeks: Counter[TP] = Counter()

    def _new_consumer_thread(self) -> _Thread:
        return _Thread(self, loop=self.loop, beacon=self.beacon)

    async def perform_seek(self) -> None:
        """Called by Faust right before the flow resumes after a rebalance."""
        await _seek_to_progress(self, self.assignment())
        ready = self.transport.positions()  # asked again: a partition may have been restored while we were seeking
        self.pause_partitions({tp for tp in self.assignment() if tp.partition not in ready})

    async def seek_wait(self, partitions: Mapping[TP, int]) -> None:
        # Counted before and behind, so that a fetch that overlaps with the seek in any way can tell.
        self._seeks.update(partitions.keys())
        await super().seek_wait(partitions)
        self._seeks.update(partitions.keys())

    async def _getmany(self, active_partitions: set[TP] | None, timeout: float) -> Any:
        """Fetch when the agent's queue is nearly empty, and let nothing through that was fetched for a state of affairs that is over.

        Faust's own way to wait is to leave out the partitions that filled the queue, so that a fetch waits for the others although
        these have data. `stream_buffer_maxsize` must be so large that it never does.

        Faust hands aiokafka its live set of active partitions: a rebalance meanwhile empties it, and aiokafka takes an empty set for all.
        What comes back may then be from before a seek, or of partitions that are not restored.
        """
        while self.transport.backlog() > BUFFERED:
            await asyncio.sleep(LOOK)
        asked, seeks = frozenset(active_partitions or ()), self._seeks.copy()
        try:
            records = await super()._getmany(asked, timeout)
        except NoOffsetForPartitionError:
            return {}  # of a partition not yet restored: it gets its position when it is
        live = self._get_active_partitions()
        moved = {tp for tp in records if self._seeks[tp] != seeks[tp]}
        await _seek_to_progress(self, moved & live)  # nothing of these was let through since their seek, so that is where they go on
        return {tp: list(_runs(found)) for tp, found in records.items() if tp in asked and tp in live and tp not in moved}

    def _to_message(self, tp: TP, record: Sequence[Any]) -> ConsumerMessage:
        """A run as Faust's message: its value is aiokafka's records."""
        last = record[-1]
        return ConsumerMessage(
            *(tp.topic, tp.partition, last.offset, last.timestamp / 1000, last.timestamp_type),
            headers=None,
            key=None,
            value=record,
            checksum=None,
            tp=tp,
            generation_id=self.app.consumer_generation_id,
        )


def _runs(records: Iterable[Any]) -> Iterator[list[Any]]:
    run: list[Any] = []
    size = 0
    for record in records:
        run.append(record)
        size += len(record.value or b"")
        if size >= RUN:
            yield run
            run, size = [], 0
    if run:
        yield run


async def _seek_to_progress(consumer: _Consumer, tps: Iterable[TP]) -> None:
    ready = consumer.transport.positions()
    offsets = {tp: ready[tp.partition] for tp in tps if tp.partition in ready}
    if offsets:
        await consumer.seek_wait(offsets)


class Transport(driver.Transport):  # type: ignore[misc]
    """Faust's aiokafka transport. `positions` says, of the partitions that may flow, from which offset; `backlog`, runs not yet folded."""

    Consumer = _Consumer
    positions: Positions
    backlog: Backlog


def install(app: Any, positions: Positions, backlog: Backlog) -> None:
    """Make the app use this transport. Call before the app starts."""
    transport = Transport(app.conf.broker_consumer, app)
    transport.positions, transport.backlog = positions, backlog
    app.transport = transport


async def flow(consumer: Any, tp: TP, offset: int) -> None:
    """Let one restored partition flow from `offset`. Always both, seek and resume, or it can stay paused.

    `Consumer.seek` would do neither safely: it touches aiokafka from the wrong thread.
    """
    await consumer.seek_wait({tp: offset})
    consumer.resume_partitions({tp})
