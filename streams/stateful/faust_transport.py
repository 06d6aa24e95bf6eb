"""Every private name of Faust and aiokafka that crossrep touches, in one place; test_faust_transport.py fails when one moves.

Faust owns group membership, the agent and the event loop. Positions are ours: progress is committed with the state, so after a rebalance
each partition is held until its state is restored, and then flows from our progress, never from what Faust believes was acknowledged.
Fetching is ours too (`fetch.py`).

A message costs Faust about 120 µs, whatever its size: two tasks and a queue. So what it is given as one message is a *run* of frames.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from aiokafka import TopicPartition
from faust.transport.drivers import aiokafka as driver
from faust.types import TP
from faust.types.tuples import ConsumerMessage

from streams.stateful.fetch import Run

# Seconds after which aiokafka gives up membership because nobody fetches with it. Nobody does.
MAX_POLL_INTERVAL = 1e9

NextRuns = Callable[[], Awaitable[list[Run]]]
Restart = Callable[[], None]


class _Thread(driver.AIOKafkaConsumerThread):  # type: ignore[misc]
    """The member of the group, which fetches nothing."""

    async def on_partitions_assigned(self, assigned: set[TP], generation_id: int = 0) -> None:
        self._ensure_consumer().pause(*(TopicPartition(*tp) for tp in assigned))
        await super().on_partitions_assigned(assigned, generation_id)

    def verify_event_path(self, now: float, tp: TP) -> None:
        """Faust would complain that nothing is fetched."""


class _Consumer(driver.Consumer):  # type: ignore[misc]
    """Gives Faust the runs that our fetch brings."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._given = itertools.count()

    def _new_consumer_thread(self) -> _Thread:
        return _Thread(self, loop=self.loop, beacon=self.beacon)

    async def perform_seek(self) -> None:
        """Called by Faust right before the flow resumes after a rebalance: what it was given until then it may have dropped."""
        self.transport.restart()

    async def getmany(self, timeout: float) -> AsyncIterator[tuple[TP, ConsumerMessage]]:
        for run in await self.transport.next_runs():
            yield TP(self.transport.topic, run.partition), self._to_message(run)

    def _to_message(self, run: Run) -> ConsumerMessage:
        # Faust drops what is not behind the offset it last saw. Ours may go back, so it is shown a counter.
        tp = TP(self.transport.topic, run.partition)
        return ConsumerMessage(
            *(*tp, next(self._given), 0.0, 0),
            headers=None,
            key=None,
            value=run,
            checksum=None,
            tp=tp,
            generation_id=self.app.consumer_generation_id,
        )


class Transport(driver.Transport):  # type: ignore[misc]
    """Faust's aiokafka transport, fetching with ours."""

    Consumer = _Consumer
    topic: str
    next_runs: NextRuns
    restart: Restart


def install(app: Any, topic: str, next_runs: NextRuns, restart: Restart) -> None:
    """Make the app use this transport. Call before the app starts.

    Args:
        next_runs: gives the next runs of `topic`, none if none came for a moment.
        restart: what was fetched until now may be lost; all that flows must flow anew.
    """
    transport = Transport(app.conf.broker_consumer, app)
    transport.topic, transport.next_runs, transport.restart = topic, next_runs, restart
    app.transport = transport
