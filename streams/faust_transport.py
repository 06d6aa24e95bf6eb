"""Every private name of Faust and aiokafka that crossrep touches, in one place; tests/streams/test_faust_transport.py fails when one moves.

Faust owns group membership, fetching and the event loop. Positions are ours: progress is committed with the state, so after a rebalance
each partition is held until its state is restored, and then flows from our progress, never from what Faust believes was acknowledged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import aiokafka
from aiokafka.consumer.fetcher import FetchError
from faust.transport.drivers import aiokafka as driver
from faust.types import TP

FETCH_WAIT_MS = 50  # Faust hard-codes 1500: an idle partition would hold up a busy one

Positions = Callable[[], Mapping[int, int]]


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

    positions: Positions

    def _new_consumer_thread(self) -> _Thread:
        return _Thread(self, loop=self.loop, beacon=self.beacon)

    async def perform_seek(self) -> None:
        """Called by Faust right before the flow resumes after a rebalance."""
        ready = self.transport.positions()
        assigned = self.assignment()
        offsets = {tp: ready[tp.partition] for tp in assigned if tp.partition in ready}
        if offsets:
            await self.seek_wait(offsets)
        self.pause_partitions({tp for tp in assigned if tp.partition not in ready})


class Transport(driver.Transport):  # type: ignore[misc]
    """Faust's aiokafka transport. `positions` says, of the partitions that may flow, from which offset."""

    Consumer = _Consumer
    positions: Positions


def install(app: Any, positions: Positions) -> None:
    """Make the app use this transport. Call before the app starts."""
    transport = Transport(app.conf.broker_consumer, app)
    transport.positions = positions
    app.transport = transport


async def flow(consumer: Any, tp: TP, offset: int) -> None:
    """Let one restored partition flow from `offset`. Always both, seek and resume, or it can stay paused.

    `Consumer.seek` would do neither safely: it touches aiokafka from the wrong thread.
    """
    await consumer.seek_wait({tp: offset})
    consumer.resume_partitions({tp})
