"""Who owns which partition numbers: a Faust app's membership of the group, and the state that goes with each number.

Per partition number: hold → fence → restore → seek → flow. What blocks runs in threads; the event loop takes in messages. Any failure after
validation ends the process, since memory may then be ahead of the log; restarting it is always right.

Faust's member subscribes to the first topic alone. The same partition number of the other topics comes with it.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, NoReturn, Protocol, TypeVar

from confluent_kafka import Message
from faust.serializers.codecs import get_codec
from faust.types import TP

from streams.stateful import faust_transport
from streams.stateful.fetch import BUFFERED, Fetch, Run
from streams.stateful.membership import Membership, die, faust_app, leave, lock

log = logging.getLogger(__name__)

STOP = 2.5  # seconds that SIGTERM's flush may take
LOOK = 0.002  # seconds between looks at that queue
RESTORES = 2  # partitions restored at a time


class Owned(Protocol):
    """The state of one partition number. `fence`, `reopen` and `commit` block and run in threads, one at a time."""

    @property
    def unflushed(self) -> bool:
        """Is there anything for a flush to do?"""

    @property
    def positions(self) -> Sequence[int]:
        """The next offset of each topic."""

    @property
    def restored(self) -> str:
        """What `reopen` has restored, for the log."""

    def fence(self) -> None:
        """Become the only writer."""

    def reopen(self) -> Any:
        """Restore what is committed; keep what is in memory if that is it already."""

    def copy(self) -> Any:
        """What a flush writes. Messages may be taken in again as soon as this returns."""

    def commit(self, pending: Any) -> None:
        """Write a copy, and progress, in one transaction."""

    def done(self, pending: Any) -> None:
        """The copy is committed."""

    def close(self) -> None:
        """Give up what is in memory."""


Part = TypeVar("Part", bound=Owned)
TakeIn = Callable[[Run, Message], Awaitable[None]]


class Owner(Generic[Part]):
    """This worker's partitions, and which of them flow.

    Args:
        make: the state of a partition number, holding nothing yet.
        take_in: one message of a run; asks `fetch.current` again after it has waited for anything.
        ends: it is also told when the end of a partition is reached (`kafka.is_end`).

    Raises:
        CrossrepError: another worker has this name.
    """

    def __init__(self, member: Membership, make: Callable[[int], Part], take_in: TakeIn, ends: bool = False):
        lock(member.folder, member.name)
        get_codec("raw")  # the first call looks through all installed packages
        self.partitions: dict[int, Part] = {}
        self.assigned: set[int] | None = None  # None until the first rebalance is through
        self._make, self._take_in = make, take_in
        self._topic = member.topics[0]
        self._epoch = 0  # of the assignment; work begun for an older one must not let a partition flow
        self._locks: dict[int, asyncio.Lock] = {}  # one opening or flush of a partition at a time
        # The first ones flow early, and what flows already keeps a share of the processor.
        self._restores = asyncio.Semaphore(RESTORES)
        self._threads = ThreadPoolExecutor(max(4, member.partitions), "partition")
        self._tasks: set[asyncio.Task[None]] = set()
        self._flushing: set[int] = set()  # partitions whose flush is to begin
        self._fencing: set[asyncio.Future[Any]] = set()
        self._stopping = False
        self.app = faust_app(member)
        self._queue: asyncio.Queue[Any] = asyncio.Queue()  # Faust's, of runs for the agent, once that has begun
        self.fetch = Fetch(member.topics, member.bootstrap, ends)
        faust_transport.install(self.app, self._topic, self._runs, self._restart)
        self.app.on_partitions_revoked.connect(self._on_revoked)
        self.app.on_partitions_assigned.connect(self._on_assigned)
        # raw: with value_type=bytes alone Faust would still try to read JSON. acks=False: Faust tracks nothing, positions are ours.
        topic = self.app.topic(self._topic, key_type=bytes, value_type=bytes, key_serializer="raw", value_serializer="raw", acks=False)
        self.app.agent(topic, name=member.group.partition(".")[0])(self._agent)

    @property
    def flows(self) -> bool:
        """Are all partitions we own restored and flowing?"""
        return self.assigned is not None and self.assigned == self.fetch.flowing

    # --- the flow ---

    async def _runs(self) -> list[Run]:
        """More for the agent, when it has nearly nothing left."""
        while self._queue.qsize() > BUFFERED:
            await asyncio.sleep(LOOK)
        try:
            return await self.fetch.runs()
        except Exception as error:  # Faust would stop its fetching, and wait for ever
            die("fetching", error)

    def _restart(self) -> None:
        for number in self.fetch.flowing:
            self.fetch.flow(number, *self.partitions[number].positions)

    async def _agent(self, stream: Any) -> None:
        self._queue = stream.channel.queue
        async for event in stream.events():
            run: Run = event.value
            for frame in run.frames:
                try:
                    if self.fetch.current(
                        run
                    ):  # else: fetched before the partition was held or sought; what of it is not taken comes again
                        await self._take_in(run, frame)
                except Exception as error:
                    die(f"taking in {frame.topic()}[{run.partition}]@{frame.offset()}", error)

    def flush_soon(self, number: int) -> None:
        """In the background, unless a flush of this partition is under way or about to begin."""
        if number not in self._flushing and not self._lock_of(number).locked():
            self._flushing.add(number)
            self.start(self.flush(number))

    async def flush(self, number: int) -> None:
        async with self._lock_of(number):
            self._flushing.discard(number)
            partition = self.partitions.get(number)
            if partition is None or not partition.unflushed:
                return
            pending = partition.copy()
            try:
                await self.in_thread(partition.commit, pending)
            except Exception as error:
                die(f"flushing partition {number}", error)
            partition.done(pending)

    async def flush_forever(self, interval: float) -> None:
        """Flush every partition once an interval, in seconds."""
        while True:
            await asyncio.sleep(interval)
            for number in self.fetch.flowing:
                if self.partitions[number].unflushed:
                    self.flush_soon(number)

    async def watch_faust(self) -> None:
        """End the process when Faust has crashed: its own shutdown can wait for ever for what is no longer there."""
        while not self.app.crashed:
            await asyncio.sleep(0.2)
        die("reading", self.app.crash_reason or RuntimeError("Faust crashed and gave no reason"))

    # --- ownership ---

    async def _on_revoked(self, app: Any, revoked: set[TP], **kwargs: Any) -> None:
        """Kafka's eager protocol takes everything at each rebalance. Flush; memory and stores stay until we know what comes back."""
        self._epoch += 1
        owned = self.fetch.hold()
        await asyncio.gather(*(self.flush(number) for number in owned))
        if self._fencing:  # a fence that landed after the partition moved would hit its new owner
            await asyncio.wait(self._fencing)

    async def _on_assigned(self, app: Any, assigned: set[TP], **kwargs: Any) -> None:
        self._epoch += 1
        self.fetch.hold()
        self.assigned = {tp.partition for tp in assigned if tp.topic == self._topic}
        for number in sorted(set(self.partitions) - self.assigned):
            self.start(self._give_up(number, self._epoch))
        for number in sorted(self.assigned):
            self.start(self._take_over(number, self._epoch))

    async def _take_over(self, number: int, epoch: int) -> None:
        async with self._lock_of(number):
            if epoch != self._epoch:
                return
            partition = self.partitions.setdefault(number, self._make(number))
            try:
                fencing = asyncio.ensure_future(self.in_thread(partition.fence))
                self._fencing.add(fencing)
                fencing.add_done_callback(self._fencing.discard)
                await fencing
                if epoch != self._epoch:
                    return
                async with self._restores:
                    await self.in_thread(partition.reopen)
                if epoch != self._epoch:
                    return
                self.fetch.flow(number, *partition.positions)
            except Exception as error:
                if epoch != self._epoch:
                    log.warning("taking over partition %d was overtaken by a rebalance: %s", number, error)
                    return
                die(f"taking over partition {number}", error)
            log.info("partition %d flows from %s (%s)", number, ", ".join(map(str, partition.positions)), partition.restored)

    async def _give_up(self, number: int, epoch: int) -> None:
        async with self._lock_of(number):
            if epoch == self._epoch:
                await self.in_thread(self.partitions.pop(number).close)
                log.info("partition %d is given up", number)

    def _lock_of(self, number: int) -> asyncio.Lock:
        return self._locks.setdefault(number, asyncio.Lock())

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)  # the loop itself keeps only weak references
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            die("work in the background", error)

    async def in_thread(self, call: Any, *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call, *args)

    # --- the end ---

    async def stop(self) -> None:
        """Flush, close and leave: nothing is left to restore. Static membership keeps our partitions for us while we restart."""
        if self._stopping:
            return
        self._stopping = True
        self._epoch += 1
        owned = self.fetch.hold()
        try:
            await asyncio.wait_for(asyncio.gather(*(self.flush(number) for number in owned)), STOP)
        except TimeoutError:
            log.warning("stopped without a flush: Kafka or the disk kept us waiting. What is not flushed will be folded again")
            leave(0)
        for partition in self.partitions.values():
            partition.close()
        log.info("stopped: everything is flushed")
        leave(0)

    def run(self, *beside: Coroutine[Any, Any, None]) -> NoReturn:
        """Work until told to stop (SIGTERM, SIGINT).

        Args:
            beside: what else runs on the event loop.
        """

        async def main() -> None:
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, lambda: self.start(self.stop()))
            self.app.finalize()
            # Before the start: partitions may flow, and Faust may crash, a second before it is over.
            for work in (self.watch_faust(), *beside):
                self.start(work)
            await self.app.start()
            await self.app.wait_until_stopped()

        asyncio.run(main())
        die("the Faust app stopped", self.app.crash_reason or RuntimeError("no reason given"))
