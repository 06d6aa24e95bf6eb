"""The fold worker: a Faust app with one agent (`owner.py`), which folds frames into the partitions it owns (`state.partition`)."""

from __future__ import annotations

import asyncio
import logging
from typing import Any, NoReturn

import numpy as np
from confluent_kafka import Message

from crossrep import kafka
from crossrep.columnar import frames
from crossrep.columnar.records import RecordLayout
from crossrep.errors import CrossrepError, StateError, TopicError
from crossrep.spec import Space, fold_group
from crossrep.writer import rows_of
from state.partition import Partition, Settings
from state.slab import Slab
from state.store import Memory, Room
from streams import metrics, topics
from streams.stateful import memory
from streams.stateful.fetch import Run
from streams.stateful.fold_options import FoldOptions
from streams.stateful.membership import Membership, die
from streams.stateful.owner import Owner

log = logging.getLogger(__name__)

LETTERS = 8 << 20  # bytes of dead letters that wait for a flush before the next frame does
WATCH = 5.0  # seconds between looks at whether our topics are still the same


class Fold:
    """The worker's partitions, and which of them flow."""

    def __init__(self, space: Space, bootstrap: str, options: FoldOptions):
        self._published = topics.check(space, bootstrap)
        folder = options.folder / space.name / options.name
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
            tombstones_kept=min(kafka.tombstones_kept(bootstrap, space.representations_topic(entity)) for entity in space.entities),
            slots=options.slots,
        )
        member = Membership(
            fold_group(space), [space.frames_topic], space.partitions, bootstrap, options.name, folder, options.session_timeout
        )
        self.owner = Owner(member, lambda number: Partition(self._settings, number), self._on_frame)
        metrics.serve(options.port, self._ready, lambda: metrics.of_partitions(space.name, self.owner.partitions, self.owner.fetch.flowing))

    def _ready(self) -> tuple[bool, dict[str, Any]]:
        """Ready is when all partitions we own are restored and flowing."""
        owner = self.owner
        owned, flowing = sorted(owner.assigned or ()), sorted(owner.fetch.flowing)
        restoring = {}
        for number in set(owned) - set(flowing) & set(owner.partitions):
            stats = owner.partitions[number].stats
            if 0 < stats.restored < stats.restore_total:
                restoring[number] = {"done": stats.restored / stats.restore_total, "seconds_left": round(stats.restore_left, 1)}
        full = self._settings.room.full
        return owner.flows and not full, {
            "space": self.space.name,
            "partitions": owned,
            "flowing": flowing,
            "restoring": restoring,
            "disk_full": full,
        }

    # --- the flow ---

    async def _on_frame(self, run: Run, frame: Message) -> None:
        partition, offset, append_time = self.owner.partitions[run.partition], frame.offset(), frame.timestamp()[1] / 1000
        work = partition.decode(offset, frame.key(), frame.value(), append_time)
        if work is None:
            if partition.dead_letter_bytes > LETTERS:
                await self.owner.flush(run.partition)
            return
        while not partition.has_room(work) or partition.dirty_rows > 4 * self.options.flush_rows:
            await self.owner.flush(run.partition)
            if not self.owner.fetch.current(run):
                return
        partition.fold(offset, work, append_time)
        if partition.dirty_rows > self.options.flush_rows:
            self.owner.flush_soon(run.partition)

    async def watch_topics(self) -> None:
        """End the process when a topic of ours is deleted or created anew: what we write would go into something else.

        Asked three times, since a broker that is just starting may not know of any topic yet.
        """
        in_a_row = 0
        while True:
            await asyncio.sleep(WATCH)
            try:
                await self.owner.in_thread(topics.same_topics, self.space, self.bootstrap, self._published)
                in_a_row = 0
            except TopicError as error:
                in_a_row += 1
                if in_a_row == 3:
                    die("going on", StateError(str(error)))
            except CrossrepError:
                pass  # the cluster is away


def run(space: Space, bootstrap: str, options: FoldOptions) -> NoReturn:
    """Fold until told to stop (SIGTERM, SIGINT).

    Raises:
        CrossrepError: the space or its topics do not fit, or another worker has this name.
    """
    fold = Fold(space, bootstrap, options)
    bound = memory.memory_bound(space, options)
    log.info("memory: at most %d MiB (%s)", sum(bound.values()) >> 20, ", ".join(f"{part} {size >> 20}" for part, size in bound.items()))
    fold.owner.run(fold.owner.flush_forever(space.flush), fold.watch_topics())


def _warm_up(space: Space) -> None:
    """Load what the first frame should not wait a second for: the compiled kernels, by folding a row of each entity into nothing."""
    for entity in space.entities:
        layout = RecordLayout(space, entity)
        sources = {name: np.zeros((1, dim), np.float32) for name, dim in space.sources.items()}
        rows = rows_of(space, entity, ["1"], next(iter(space.weights)), [0.0], sources)
        for number, frame in frames.encode(space, rows):
            slab = Slab(layout, lambda keys: [None] * len(keys), 8)
            slab.fold(frames.decode(space, frame, partition=number), 0)
            layout.decode(slab.copy_dirty(0).writes.values())
