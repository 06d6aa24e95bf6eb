"""The fold worker: a Faust app with one agent, which folds frames into the partitions it owns.

Per partition number: hold → fence → restore → seek → flow (`state.partition`). What blocks runs in threads; the event loop folds.
Any failure after validation ends the process, since memory may then be ahead of the log; restarting it is always right.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import signal
import sys
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import faust
import numpy as np
from confluent_kafka import KafkaException, Message
from faust.serializers.codecs import get_codec
from faust.types import TP

from crossrep import frames
from crossrep.errors import CrossrepError, StateError, TopicError
from crossrep.records import RecordLayout
from crossrep.spec import Space, fold_group
from crossrep.writer import rows_of
from state.partition import Partition, Settings
from state.slab import Slab
from state.store import Memory, Room
from streams import faust_transport, memory, metrics, topics
from streams.fetch import BUFFERED, Fetch, Run

log = logging.getLogger(__name__)

EXIT_FAILED, EXIT_REFUSED = 1, 3
LETTERS = 8 << 20  # bytes of dead letters that wait for a flush before the next frame does
STOP = 2.5  # seconds that SIGTERM's flush may take
LOOK = 0.002  # seconds between looks at that queue
WATCH = 5.0  # seconds between looks at whether our topics are still the same


@dataclass(frozen=True)
class FoldOptions:
    """What an operator chooses."""

    name: str  # stable name of this worker: its folder and its group membership survive a restart
    folder: Path  # data folder; the worker's stores lie in folder/<space>/<name>
    port: int = 6066  # of /ready and /metrics
    flush_rows: int = 200_000  # rows folded since its last flush that flush a partition before its interval is over
    slots: int = 65_536  # most keys in memory per entity and partition; `crossrep fold` takes more where there is memory for them
    rocksdb_mb: int = 256  # RocksDB's write buffers, all partitions together
    session_timeout: float = 10.0  # seconds after which a silent worker's partitions move
    min_free_mb: int = 256  # of the data folder's disk; with less, nothing is written


class Fold:
    """The worker's partitions, and which of them flow."""

    def __init__(self, space: Space, bootstrap: str, options: FoldOptions):
        self._published = topics.check(space, bootstrap)
        folder = options.folder / space.name / options.name
        _lock(folder, options.name)
        _warm_up(space)
        self.space = space
        self.bootstrap = bootstrap
        self.options = options
        self._settings = Settings(
            space=space,
            bootstrap=bootstrap,
            folder=folder,
            topic_ids=self._published.topic_ids,
            memory=Memory.of(options.rocksdb_mb << 20),
            room=Room(folder, options.min_free_mb << 20),
            slots=options.slots,
        )
        self.partitions: dict[int, Partition] = {}
        self.assigned: set[int] | None = None  # None until the first rebalance is through
        self._epoch = 0  # of the assignment; work begun for an older one must not let a partition flow
        self._locks: dict[int, asyncio.Lock] = {}  # one opening or flush of a partition at a time
        # The first ones flow early, and what flows already keeps a share of the processor.
        self._restores = asyncio.Semaphore(memory.RESTORES)
        self._threads = ThreadPoolExecutor(max(4, space.partitions), "partition")
        self._tasks: set[asyncio.Task[None]] = set()
        self._flushing: set[int] = set()  # partitions whose flush is to begin
        self._fencing: set[asyncio.Future[Any]] = set()
        self._stopping = False
        self.app = _faust_app(space, bootstrap, options, folder)
        self._queue: asyncio.Queue[Any] = asyncio.Queue()  # Faust's, of runs for the agent, once that has begun
        self._fetch = Fetch(space.frames_topic, bootstrap)
        faust_transport.install(self.app, space.frames_topic, self._runs, self._restart)
        self.app.on_partitions_revoked.connect(self._on_revoked)
        self.app.on_partitions_assigned.connect(self._on_assigned)
        # raw: with value_type=bytes alone Faust would still try to read JSON. acks=False: Faust tracks nothing, positions are ours.
        topic = self.app.topic(
            space.frames_topic, key_type=bytes, value_type=bytes, key_serializer="raw", value_serializer="raw", acks=False
        )
        self.app.agent(topic, name="fold")(self._agent)
        metrics.serve(options.port, self._ready, lambda: metrics.of_partitions(space.name, self.partitions, self._fetch.flowing))

    def _ready(self) -> tuple[bool, dict[str, Any]]:
        """Ready is when all partitions we own are restored and flowing."""
        owned, flowing = sorted(self.assigned or ()), sorted(self._fetch.flowing)
        restoring = {}
        for number in set(owned) - set(flowing) & set(self.partitions):
            stats = self.partitions[number].stats
            if 0 < stats.restored < stats.restore_total:
                restoring[number] = {"done": stats.restored / stats.restore_total, "seconds_left": round(stats.restore_left, 1)}
        full = self._settings.room.full
        ready = self.assigned is not None and owned == flowing and not full
        return ready, {"space": self.space.name, "partitions": owned, "flowing": flowing, "restoring": restoring, "disk_full": full}

    # --- the flow ---

    async def _runs(self) -> list[Run]:
        """More for the agent, when it has nearly nothing left."""
        while self._queue.qsize() > BUFFERED:
            await asyncio.sleep(LOOK)
        try:
            return await self._fetch.runs()
        except Exception as error:  # Faust would stop its fetching, and wait for ever
            _die("fetching frames", error)

    def _restart(self) -> None:
        for number in self._fetch.flowing:
            self._fetch.flow(number, self.partitions[number].progress.offset)

    async def _agent(self, stream: Any) -> None:
        self._queue = stream.channel.queue
        async for event in stream.events():
            run: Run = event.value
            for frame in run.frames:
                try:
                    await self._on_frame(run, frame)
                except Exception as error:
                    _die(f"folding {frame.topic()}[{run.partition}]@{frame.offset()}", error)

    async def _on_frame(self, run: Run, frame: Message) -> None:
        if not self._fetch.current(run):
            return  # fetched before the partition was held or sought: what of it is not folded comes again
        partition, offset, append_time = self.partitions[run.partition], frame.offset(), frame.timestamp()[1] / 1000
        work = partition.decode(offset, frame.key(), frame.value(), append_time)
        if work is None:
            if partition.dead_letter_bytes > LETTERS:
                await self._flush(run.partition)
            return
        while not partition.has_room(work) or partition.dirty_rows > 4 * self.options.flush_rows:
            await self._flush(run.partition)
            if not self._fetch.current(run):
                return
        partition.fold(offset, work, append_time)
        if partition.dirty_rows > self.options.flush_rows:
            self._flush_soon(run.partition)

    def _flush_soon(self, number: int) -> None:
        """In the background, unless a flush of this partition is under way or about to begin."""
        if number not in self._flushing and not self._lock_of(number).locked():
            self._flushing.add(number)
            self._start(self._flush(number))

    async def _flush(self, number: int) -> None:
        async with self._lock_of(number):
            self._flushing.discard(number)
            partition = self.partitions.get(number)
            if partition is None or not partition.unflushed:
                return
            pending = partition.copy()
            try:
                await self._in_thread(partition.commit, pending)
            except Exception as error:
                _die(f"flushing partition {number}", error)
            partition.done(pending)

    async def flush_forever(self) -> None:
        """Flush every partition once an interval."""
        while True:
            await asyncio.sleep(self.space.flush)
            for number in self._fetch.flowing:
                if self.partitions[number].unflushed:
                    self._flush_soon(number)

    async def watch_topics(self) -> None:
        """End the process when a topic of ours is deleted or created anew: what we write would go into something else.

        Asked three times, since a broker that is just starting may not know of any topic yet.
        """
        in_a_row = 0
        while True:
            await asyncio.sleep(WATCH)
            try:
                await self._in_thread(topics.same_topics, self.space, self.bootstrap, self._published)
                in_a_row = 0
            except TopicError as error:
                in_a_row += 1
                if in_a_row == 3:
                    _die("going on", StateError(str(error)))
            except CrossrepError:
                pass  # the cluster is away

    async def watch_faust(self) -> None:
        """End the process when Faust has crashed: its own shutdown can wait for ever for what is no longer there."""
        while not self.app.crashed:
            await asyncio.sleep(0.2)
        _die("reading frames", self.app.crash_reason or RuntimeError("Faust crashed and gave no reason"))

    # --- ownership ---

    async def _on_revoked(self, app: Any, revoked: set[TP], **kwargs: Any) -> None:
        """Kafka's eager protocol takes everything at each rebalance. Flush; memory and stores stay until we know what comes back."""
        self._epoch += 1
        owned = self._fetch.hold()
        await asyncio.gather(*(self._flush(number) for number in owned))
        if self._fencing:  # a fence that landed after the partition moved would hit its new owner
            await asyncio.wait(self._fencing)

    async def _on_assigned(self, app: Any, assigned: set[TP], **kwargs: Any) -> None:
        self._epoch += 1
        self._fetch.hold()
        self.assigned = {tp.partition for tp in assigned if tp.topic == self.space.frames_topic}
        for number in sorted(set(self.partitions) - self.assigned):
            self._start(self._give_up(number, self._epoch))
        for number in sorted(self.assigned):
            self._start(self._take_over(number, self._epoch))

    async def _take_over(self, number: int, epoch: int) -> None:
        async with self._lock_of(number):
            if epoch != self._epoch:
                return
            partition = self.partitions.setdefault(number, Partition(self._settings, number))
            try:
                fencing = asyncio.ensure_future(self._in_thread(partition.fence))
                self._fencing.add(fencing)
                fencing.add_done_callback(self._fencing.discard)
                await fencing
                if epoch != self._epoch:
                    return
                async with self._restores:
                    progress = await self._in_thread(partition.reopen)
                if epoch != self._epoch:
                    return
                self._fetch.flow(number, progress)
            except Exception as error:
                if epoch != self._epoch:
                    log.warning("taking over partition %d was overtaken by a rebalance: %s", number, error)
                    return
                _die(f"taking over partition {number}", error)
            stats = partition.stats
            log.info("partition %d flows from %d (%d records restored in %.2f s)", number, progress, stats.restored, stats.restore_seconds)

    async def _give_up(self, number: int, epoch: int) -> None:
        async with self._lock_of(number):
            if epoch == self._epoch:
                await self._in_thread(self.partitions.pop(number).close)
                log.info("partition %d is given up", number)

    def _lock_of(self, number: int) -> asyncio.Lock:
        return self._locks.setdefault(number, asyncio.Lock())

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)  # the loop itself keeps only weak references
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            _die("work in the background", error)

    async def _in_thread(self, call: Any, *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call, *args)

    # --- the end ---

    async def stop(self) -> None:
        """Flush, close and leave: nothing is left to restore. Static membership keeps our partitions for us while we restart."""
        if self._stopping:
            return
        self._stopping = True
        self._epoch += 1
        owned = self._fetch.hold()
        try:
            await asyncio.wait_for(asyncio.gather(*(self._flush(number) for number in owned)), STOP)
        except TimeoutError:
            log.warning("stopped without a flush: Kafka or the disk kept us waiting. What is not flushed will be folded again")
            _exit(0)
        for partition in self.partitions.values():
            partition.close()
        log.info("stopped: everything is flushed")
        _exit(0)


def run(space: Space, bootstrap: str, options: FoldOptions) -> NoReturn:
    """Fold until told to stop (SIGTERM, SIGINT).

    Raises:
        CrossrepError: the space or its topics do not fit, or another worker has this name.
    """
    fold = Fold(space, bootstrap, options)
    bound = memory.memory_bound(space, options)
    log.info("memory: at most %d MiB (%s)", sum(bound.values()) >> 20, ", ".join(f"{part} {size >> 20}" for part, size in bound.items()))

    async def main() -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, lambda: fold._start(fold.stop()))
        fold.app.finalize()
        # Before the start: partitions may flow, and Faust may crash, a second before it is over.
        fold._start(fold.flush_forever())
        fold._start(fold.watch_topics())
        fold._start(fold.watch_faust())
        await fold.app.start()
        await fold.app.wait_until_stopped()

    asyncio.run(main())
    _die("the Faust app stopped", fold.app.crash_reason or RuntimeError("no reason given"))


def _warm_up(space: Space) -> None:
    """Load what the first frame should not wait a second for: the compiled kernels, by folding a row of each entity into nothing."""
    get_codec("raw")  # the first call looks through all installed packages
    for entity in space.entities:
        layout = RecordLayout(space, entity)
        sources = {name: np.zeros((1, dim), np.float32) for name, dim in space.sources.items()}
        rows = rows_of(space, entity, ["1"], next(iter(space.weights)), [0.0], sources)
        for number, frame in frames.encode(space, rows):
            slab = Slab(layout, lambda keys: [None] * len(keys), 8)
            slab.fold(frames.decode(space, frame, partition=number), 0)
            layout.decode(slab.copy_dirty(0).writes.values())


def _faust_app(space: Space, bootstrap: str, options: FoldOptions, folder: Path) -> faust.App:
    return faust.App(
        fold_group(space),
        broker=";".join(f"kafka://{address}" for address in bootstrap.split(",")),
        consumer_group_instance_id=options.name,  # a restarted worker gets its partitions back without a rebalance
        datadir=str(folder / "faust"),
        store="memory://",
        table_standby_replicas=0,
        topic_allow_declare=False,
        topic_disable_leader=True,
        broker_session_timeout=options.session_timeout,
        # Kafka tells members of a rebalance in answer to their heartbeats, and all wait for the last one to hear of it.
        broker_heartbeat_interval=min(0.5, options.session_timeout / 5),
        broker_rebalance_timeout=60.0,
        broker_request_timeout=60.0,
        consumer_max_fetch_size=1 << 16,  # Faust's member may fetch once before it is paused
        broker_max_poll_interval=faust_transport.MAX_POLL_INTERVAL,
        stream_buffer_maxsize=100_000,  # `_runs` knows when to wait
        stream_wait_empty=False,
        stream_recovery_delay=0.0,
        web_enabled=False,  # /ready and /metrics answer from a thread of their own
        worker_redirect_stdouts=False,
    )


def _lock(folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT)  # held open, and so locked, until the process ends
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CrossrepError(f"a worker named {name!r} already runs on {folder}; give this one another --name") from None


def _die(doing: str, error: BaseException) -> NoReturn:
    """End the process at once: nothing after a failure may be flushed."""
    if isinstance(error, StateError):
        log.error("%s is refused: %s", doing, error)
        _exit(EXIT_REFUSED)
    if isinstance(error, KafkaException):
        log.error("%s failed: %s. The process ends, since memory may be ahead of the log; start it again", doing, error.args[0])
    else:
        log.critical("%s failed; the process ends, since memory may be ahead of the log; start it again", doing, exc_info=error)
    _exit(EXIT_FAILED)


def _exit(code: int) -> NoReturn:
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
