"""The tables of a space from an archive or from files of samples, by the stream's own fold, without Kafka in between.

Every thread takes tasks from one queue (a partition of an archive, a row group of a file) and folds them into tables of its own; in the end
those are folded into one. The fold is associative and commutative, so who took what makes no difference but rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import Empty, SimpleQueue

import numpy as np
from numpy.typing import NDArray

from crossrep.columnar.aggregates import Aggregates
from crossrep.columnar.algebra import NEVER
from crossrep.columnar.records import RecordLayout
from crossrep.columnar.rows import Rows
from crossrep.control.binding import Model
from crossrep.files import parquet
from crossrep.files.dated import header
from crossrep.keys import KeyIndex, Keys
from crossrep.snapshots import taking
from crossrep.snapshots.store import Manifest, Part, Replayed, Store
from crossrep.spec import Space

Task = Callable[[], Iterator[tuple[Rows, float]]]  # rows; keys whose newest event is older than that begin anew, NEVER: none do
Progressed = Callable[[int], None]  # rows further


@dataclass(frozen=True)
class Source:
    """What there is to do, and how many rows it gives at most."""

    tasks: list[Task]
    rows: int
    model: Model | None = None  # that made the vectors; None: nothing says so


_SLOTS = 1 << 14  # of an empty table


class Table:
    """All keys of one entity and their state. Not thread-safe."""

    def __init__(self, space: Space, entity: str):
        self.layout = RecordLayout(space, entity)
        self.index, self.state = KeyIndex(_SLOTS), Aggregates(self.layout, _SLOTS)
        self.folded = 0  # rows

    def fold(self, rows: Rows, expired_before: float = NEVER) -> None:
        """Args: expired_before: keys whose newest event is older (seconds since 1970) begin anew, as in a fold worker."""
        slots, missing = self.index.look_up(rows.keys)
        if missing:
            room = self.index.capacity
            while room < self.index.size + missing:
                room *= 2
            if room > self.index.capacity:
                self.index.grow(room)
                self.state.grow(room)
            self.index.insert(rows.keys, slots)
        if expired_before > NEVER:
            self.state.clear(slots[self.state.event_time[slots] < expired_before])
        self.state.fold(slots, rows)
        self.folded += len(rows)

    def rows(self) -> Iterator[Rows]:
        """One a key, in runs: what folds to the same state."""
        slots = self.index.slots()
        for first in range(0, len(slots), parquet.ROWS):
            chosen = slots[first : first + parquet.ROWS]
            columns = {name: column.rows(chosen) for name, column in self.state.columns.items()}
            yield Rows(self.layout.entity, self.index.keys(chosen), self.state.event_time[chosen], self.state.count[chosen], columns)


def fold(space: Space, tasks: Sequence[Task], threads: int, progressed: Progressed = lambda rows: None) -> dict[str, Table]:
    """By entity, the table of all rows of all tasks. Memory: the keys of every thread's tasks.

    Raises:
        whatever a task raises.
    """
    queue: SimpleQueue[Task] = SimpleQueue()
    for task in tasks:
        queue.put(task)

    def work() -> dict[str, Table]:
        tables = {entity: Table(space, entity) for entity in space.entities}
        try:
            while True:
                for rows, expired_before in queue.get_nowait()():
                    tables[rows.entity].fold(rows, expired_before)
                    progressed(len(rows))
        except Empty:
            return tables
        except BaseException:
            while not queue.empty():  # the others need not finish what fails
                queue.get()
            raise

    with ThreadPoolExecutor(threads, "replay") as pool:
        mine, *others = [future.result() for future in [pool.submit(work) for _ in range(threads)]]
    while others:
        for entity, table in others.pop().items():
            folded = mine[entity].folded + table.folded
            for rows in table.rows():
                mine[entity].fold(rows)
            mine[entity].folded = folded
    return mine


def publish(store: Store, space: Space, tables: dict[str, Table], replayed: Replayed, model: Model | None = None) -> Manifest:
    """Write the tables as a snapshot of the space. Keys that have expired by their partition's newest event are left out.

    Raises:
        DataError: nothing can be written there.
    """
    places = {entity: _by_partition(space, table) for entity, table in tables.items()}
    newest = [
        max(float(tables[entity].state.event_time[slots[number]].max(initial=NEVER)) for entity, slots in places.items())
        for number in range(space.partitions)
    ]
    with store.begun() as id:
        parts: dict[str, list[Part]] = {}
        times: dict[str, float | None] = {}
        for entity, table in tables.items():
            expire_after, parts[entity] = space.entities[entity].expire_after, []
            for number, slots in enumerate(places[entity]):
                if expire_after is not None:
                    slots = slots[table.state.event_time[slots] >= newest[number] - expire_after]
                offsets = {"first_offset": 0, "end_offset": 0, "source_offset": -1}
                parts[entity].append(taking.write_part(store, id, table.layout, number, _runs(table, slots), **offsets))
            newest_of_all = float(table.state.event_time.max(initial=NEVER))
            times[entity] = newest_of_all if newest_of_all > NEVER else None
        manifest = Manifest(**header(space, id), stream_times=times, parts=parts, model=model, replayed=replayed)
        store.publish(manifest)
    return manifest


def _by_partition(space: Space, table: Table) -> list[NDArray[np.int32]]:
    slots = table.index.slots()
    partitions = table.index.keys(slots).partitions(space.partitions)
    order = np.argsort(partitions, kind="stable")
    return np.split(slots[order], np.cumsum(np.bincount(partitions, minlength=space.partitions))[:-1])


def _runs(table: Table, slots: NDArray[np.int32]) -> Iterator[tuple[Keys, NDArray[np.void]]]:
    for first in range(0, len(slots), parquet.ROWS):
        chosen = slots[first : first + parquet.ROWS]
        yield table.index.keys(chosen), table.state.records(chosen)
