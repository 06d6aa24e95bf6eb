"""One entity's representations on this machine: all of them in RocksDB, those in use in memory too, following their topic."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossrep import kafka
from crossrep.columnar.records import RecordLayout
from crossrep.control.readers import Presence
from crossrep.errors import CrossrepError
from crossrep.keys import MISSING, Keys
from crossrep.spec import Space
from crossrep.views.answers import Representations, answer
from crossrep.views.follow import CLOSE_TIMEOUT, Follower
from serve.recent import Held, Recent
from serve.shredding import Shredder
from state.store import Memory, Meta, Room, Store, open_store

CHUNK = 1000  # records written at a time: RocksDB keeps the interpreter's lock meanwhile, 0.6 µs a record
WARMED = 10_000  # records read at a time into an empty memory
NOTED_EVERY = 60.0  # seconds after which the disk is told that it is still current, though nothing came


@dataclass(frozen=True)
class Place:
    """Where replicas keep what they hold."""

    folder: Path
    memory: Memory  # RocksDB's, of all entities
    room: Room


class Replica:
    """Follows one entity's topic, and keeps it: a restart goes on from where the disk is, unless that cannot be trusted (`state.store`).

    Records and the offsets behind them go to RocksDB in one batch, and then to memory. `applied` counts the records read since the start.
    It ends when it cannot go on, as `LocalView` does; then `check` raises CrossrepError. Thread-safe.

    Args:
        slots: keys in memory at most; the others are read from RocksDB.
    """

    def __init__(self, space: Space, entity: str, bootstrap: str, place: Place, slots: int):
        self.entity, self.layout = entity, RecordLayout(space, entity)
        self.recent = Recent(self.layout, slots)
        self.stream_time = -np.inf  # the newest event time in any record, seconds since 1970
        self.resumed = 0  # records of the disk that were read into memory at the start
        self.disk_reads = 0  # keys asked of RocksDB
        self._space, self._place, self._bootstrap = space, place, bootstrap
        self._topic = space.representations_topic(entity)
        self._store: Store | None = None
        self._shredder: Shredder | None = None
        self._broken: Exception | None = None
        self._run: dict[bytes, bytes] = {}  # applied, not yet written; empty: deleted
        self._noted = 0.0
        presence = Presence(space.name, entity, "serve")
        self._follower = Follower(self._topic, self._apply, bootstrap, begin=self._begin, reached=self._reached, presence=presence)

    def held(self, keys: Keys) -> Held:
        """What is in memory of n keys: microseconds. Only once caught up."""
        return self.recent.get(keys)

    def read(self, keys: Keys, held: Held) -> tuple[NDArray[np.bool_], NDArray[np.void]]:
        """All of n keys: what was held, and the others from RocksDB. Takes as long as the disk does; not for an event loop.

        Returns found, bool [n], and records [n].

        Raises:
            CrossrepError: the disk cannot be read; the replica has ended.
        """
        found, records = held.slots != MISSING, held.records
        if held.whole or not held.missing:
            return found, records
        assert self._store is not None, "caught up"
        rows = np.flatnonzero(~found)
        self.disk_reads += len(rows)
        try:
            values = self._store.get(self.entity, keys.take(rows).tolist())
        except Exception as error:  # rocksdict raises plain Exceptions
            self._broken = error
            raise CrossrepError(f"the store of {self._topic} cannot be read: {error}. Restart: it is rebuilt if it is damaged") from error
        rows = rows[[value is not None for value in values]]
        records[rows] = self.layout.decode([value for value in values if value is not None])
        found[rows] = True
        self.recent.admit(keys.take(rows), records[rows], held.generation)
        return found, records

    def get(self, ids: list[Any], at: float | None = None) -> Representations:
        """Look ids up, as `LocalView.get` does. The disk is read if need be."""
        self.check()
        keys = Keys.of(ids)
        found, records = self.read(keys, self.held(keys))
        return answer(self.layout, keys, found, records, self.stream_time if at is None else at, {})

    def records(self, start: bytes, count: int) -> tuple[list[bytes], NDArray[np.void], bytes | None]:
        """Up to `count` keys from `start` on in byte order, their records, and where to go on (None: that was the end)."""
        assert self._store is not None, "caught up"
        keys, values, after = self._store.records(self.entity, start, count)
        return keys, self.layout.decode(values), after

    @property
    def caught_up(self) -> bool:
        """Has everything that was in the topic at the start been applied? Raises as `check` does."""
        return self._follower.caught_up

    @property
    def lag(self) -> int:
        """Offsets behind the end of the topic as it was last seen. Raises as `check` does."""
        return self._follower.lag

    @property
    def staleness(self) -> float:
        """Seconds: what was visible longer ago than this is in the answers. Infinite until first caught up. Raises as `check` does."""
        return self._follower.staleness

    @property
    def keys(self) -> int:
        """How many there are: exact while all are in memory, else RocksDB's estimate."""
        return len(self.recent) if self.recent.whole or self._store is None else self._store.estimated_records

    @property
    def applied(self) -> int:
        """Records read from the topic since the start."""
        return self._follower.records

    def wait(self, timeout: float | None = None) -> None:
        """Block until caught up. Raises TimeoutError, CrossrepError."""
        self._follower.wait(timeout)

    def check(self) -> None:
        """Raise CrossrepError if it has ended: what it holds is then old and getting older."""
        if self._broken is not None:
            raise CrossrepError(f"the store of {self._topic} cannot be read: {self._broken}. Restart: it is rebuilt if it is damaged")
        self._follower.check()

    def close(self) -> None:
        """Stop following and close the disk; takes some seconds at most. If more is needed the disk stays open, as after a kill."""
        quiet = self._follower.close() and (self._shredder is None or self._shredder.close(CLOSE_TIMEOUT))
        if quiet and self._store is not None:
            self._store.close()

    def _begin(self, topic_id: str, bounds: dict[int, tuple[int, int]]) -> dict[int, int]:
        expected = Meta(self._space.hash.hex(), {self._topic: topic_id})
        changelog = {str(number): bound for number, bound in bounds.items()}
        folder = self._place.folder / self.entity
        kept = kafka.tombstones_kept(self._bootstrap, self._topic)
        store = open_store(folder, expected, changelog, self._place.memory, kept, [self.entity])
        self.stream_time = store.meta.stream_time
        self._store, self._shredder = store, Shredder(store, self.entity)
        self._warm(store)
        return {number: store.meta.changelog[str(number)] for number in bounds}

    def _warm(self, store: Store) -> None:
        """Fill the memory from the disk, and load the compiled kernels that look-ups need."""
        nothing = Keys.of([])
        self.recent.renew(nothing, self.layout.empty(0), nothing)
        nobody = Keys.of(["?"])
        answer(self.layout, nobody, np.zeros(1, np.bool_), self.held(nobody).records, 0.0, {})
        start: bytes | None = b""
        while start is not None and self.recent.whole:
            keys, records, start = self.records(start, WARMED)
            self.recent.renew(Keys.of(keys), records, nothing)
            self.resumed += len(keys)

    def _apply(self, names: list[bytes], values: list[bytes | None]) -> None:
        self._run.update(zip(names, (value or b"" for value in values)))

    def _reached(self, positions: dict[int, int], complete: float) -> None:
        store, shredder = self._store, self._shredder
        assert store is not None and shredder is not None, "begun"
        if math.isfinite(complete):  # not before all is read
            shredder.look()
        changelog = {str(number): position for number, position in positions.items()}
        if changelog == store.meta.changelog and time.monotonic() < self._noted + NOTED_EVERY:
            return
        self._noted = time.monotonic()
        self._place.room.wait()
        names, values = list(self._run), list(self._run.values())
        records = self.layout.decode([value for value in values if value], f"a record of {self._topic}:")
        if len(records):
            self.stream_time = max(self.stream_time, float(records["event_time"].max()))
        current = max(store.meta.current, complete)
        deletions = shredder.pending or not all(values)
        meta = replace(store.meta, changelog=changelog, stream_time=self.stream_time, current=current, deletions=deletions)
        done = 0
        for first in range(0, max(len(names), 1), CHUNK):
            some = slice(first, first + CHUNK)
            # Records may be newer on the disk than it says; the rest is read again then.
            store.write({self.entity: (names[some], values[some])}, meta if first + CHUNK >= len(names) else None)
            kept = [name for name, value in zip(names[some], values[some]) if value]
            deleted = [name for name, value in zip(names[some], values[some]) if not value]
            shredder.deleted(deleted)
            self.recent.renew(Keys.of(kept), records[done : done + len(kept)], Keys.of(deleted))
            done += len(kept)
        self._run.clear()
