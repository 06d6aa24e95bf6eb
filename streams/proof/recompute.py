"""What the state must be, computed from the recorded frames, independently of the system's own fold.

Frames are read with plain fastavro (`recorded.py`), and each key's decayed mean is the textbook sum in float64,

    mean = Σ wᵢ·2^(-(T-tᵢ)/h)·xᵢ / Σ wᵢ·2^(-(T-tᵢ)/h),   T = max tᵢ

over the rows since the key last began: a key begins anew behind an order to forget it, and when a row meets it after it has expired. Two
passes over the frames: the first finds where each key begins, its count and T; the second sums.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from crossrep.columnar.algebra import NEVER
from crossrep.columnar.forget import Forget
from crossrep.spec import Entity, Space
from state.progress import Progress
from streams.proof.readout import Place, Records, Seen, settled
from streams.proof.recorded import Frame, Progressed, walk

_ABOUT = [
    ("partition", "i4"),
    ("count", "i8"),
    ("event_time", "f8"),
    ("begin", "i8"),  # rows of frames before this one are not in the key's state, or are in its base
    ("upto", "i8"),  # nor are rows of frames behind this one
    ("may_miss", "?"),  # it may have no record: an order to forget it lies behind `upto`
    ("base", "i8"),  # its record in the base; -1: none, or it has begun anew
]


class Expected:
    """What the keys of one entity must be. Slot i of every array belongs to one key of one partition.

    Args:
        seen: what readers see: its keys have the first slots, in its order, and each is computed up to where its record is true.
        base: what they saw earlier, which the frames' rows are added to.
    """

    def __init__(self, entity: str, spec: Entity, seen: Seen, base: Seen | None):
        self.spec = spec
        self.places: list[Place] = []
        self._slots: dict[int, dict[bytes, int]] = {number: {} for number in seen.before}
        self._upto = {number: at.offset - 1 for number, at in seen.before.items()}  # of keys without a record
        self._base = base.records[entity].values if base else None
        self.table = np.zeros(0, [*_ABOUT, ("time", "f8", (len(spec.columns),))])
        self.weight: dict[str, NDArray[np.float64]] = {}
        self.vector: dict[str, NDArray[np.float64]] = {}
        self._see(seen.records[entity], seen)
        if base is not None:
            self._begin_with(base.records[entity], base)

    def _see(self, records: Records, seen: Seen) -> None:
        slots = self._slots_at(records.keys)
        least, most = (_offsets(records, at) - 1 for at in (seen.before, seen.after))
        self.table["upto"][slots] = np.minimum(np.maximum(records.values["source_offset"], least), most)

    def _begin_with(self, base: Records, seen: Seen) -> None:
        slots, held = self._slots_at(base.keys), base.values
        self.table["base"][slots], self.table["count"][slots] = np.arange(len(held)), held["count"]
        self.table["event_time"][slots] = held["event_time"]
        self.table["begin"][slots] = np.maximum(held["source_offset"] + 1, _offsets(base, seen.before))
        self.table["time"][slots] = np.stack([held[f"{name}_time"] for name in self.spec.columns], axis=1)

    def __len__(self) -> int:
        return len(self.places)

    def time(self, column: str) -> NDArray[np.float64]:
        times: NDArray[np.float64] = self.table["time"][: len(self), list(self.spec.columns).index(column)]
        return times

    def since(self, slots: NDArray[np.int64]) -> int:
        """Events of these keys that were counted from frames: those of the base left out."""
        counted, held = int(self.table["count"][slots].sum()), self.table["base"][slots]
        return counted if self._base is None else counted - int(self._base["count"][held[held >= 0]].sum())

    def count(self, number: int, offset: int, frame: Frame, stream_time: float) -> None:
        """First pass: a frame's part in where keys begin, their counts and newest times."""
        slots = self._slots_of(number, frame.keys)
        table = self.table
        due = (table["begin"][slots] <= offset) & (offset <= table["upto"][slots])
        if self.spec.expire_after is not None:
            expired = table["event_time"][slots] < stream_time - self.spec.expire_after
            self._begin_anew(slots[due & expired], offset)
        np.add.at(table["count"], slots[due], frame.counts[due])
        np.maximum.at(table["event_time"], slots[due], frame.times[due])
        for i, name in enumerate(self.spec.columns):
            part = frame.columns[name]
            here = due[part.at]
            np.maximum.at(table["time"][:, i], slots[part.at][here], part.times[here])

    def forget(self, number: int, offset: int, key: bytes) -> None:
        """First pass: an order in a key's partition."""
        slot = self._slots[number].get(key)
        if slot is None or offset < self.table["begin"][slot]:
            return
        if offset <= self.table["upto"][slot]:
            self._begin_anew(np.array([slot]), offset + 1)
        else:
            self.table["may_miss"][slot] = True

    def prepare(self) -> None:
        """Between the passes: what the base has, decayed to the newest times."""
        n, base = len(self), self._base
        slots = np.flatnonzero(self.table["base"][:n] >= 0)
        for name, column in self.spec.columns.items():
            self.weight[name], self.vector[name] = np.zeros(n), np.zeros((n, column.dim))
            if base is None or not len(slots):
                continue
            records = base[self.table["base"][slots]]
            touched = records[f"{name}_time"] > NEVER
            at, records = slots[touched], records[touched]
            since = self.time(name)[at] - records[f"{name}_time"]
            if column.half_life is not None:
                self.weight[name][at] = records[f"{name}_weight"] * np.exp2(-since / column.half_life)
                if column.dim:
                    self.vector[name][at] = self.weight[name][at, None] * records[name]
            else:
                self.weight[name][at[since == 0]], self.vector[name][at[since == 0]] = 1.0, records[name][since == 0]

    def add(self, number: int, offset: int, frame: Frame) -> None:
        """Second pass: a frame's part in the sums."""
        slots = self._slots_of(number, frame.keys)
        due = (self.table["begin"][slots] <= offset) & (offset <= self.table["upto"][slots])
        for name, column in self.spec.columns.items():
            part, weight, vector = frame.columns[name], self.weight[name], self.vector[name]
            here = due[part.at]
            at, times, vectors = slots[part.at][here], part.times[here], part.vectors[here].astype(np.float64)
            newest = self.time(name)[at]
            if column.half_life is not None:
                decayed = part.weights[here] * np.exp2(-(newest - times) / column.half_life)
                _add(weight, at, decayed)
                _add(vector, at, decayed[:, None] * vectors)
            else:
                for i in np.flatnonzero(times == newest).tolist():
                    if not weight[at[i]] or vectors[i].astype("<f4").tobytes() > vector[at[i]].astype("<f4").tobytes():
                        vector[at[i]], weight[at[i]] = vectors[i], 1.0

    def divide(self) -> None:
        """Behind the passes: sums become means."""
        for name, column in self.spec.columns.items():
            if column.half_life is not None:
                weight = self.weight[name][:, None]
                self.vector[name] = np.divide(self.vector[name], weight, out=np.zeros_like(self.vector[name]), where=weight > 0)

    def _slots_of(self, number: int, keys: list[bytes]) -> NDArray[np.int64]:
        known = self._slots[number]
        return np.array([known[key] if key in known else self._new(number, key) for key in keys], np.int64)

    def _slots_at(self, places: list[Place]) -> NDArray[np.int64]:
        return np.array([self._slots[n][key] if key in self._slots[n] else self._new(n, key) for n, key in places], np.int64)

    def _new(self, number: int, key: bytes) -> int:
        slot = self._slots[number][key] = len(self.places)
        self.places.append((number, key))
        if slot == len(self.table):
            more = np.zeros(max(1024, slot), self.table.dtype)
            more["event_time"], more["time"], more["base"] = NEVER, NEVER, -1
            self.table = np.append(self.table, more)
        self.table["partition"][slot], self.table["upto"][slot] = number, self._upto[number]
        return slot

    def _begin_anew(self, slots: NDArray[np.int64], offset: int) -> None:
        table = self.table
        table["begin"][slots], table["count"][slots], table["base"][slots] = offset, 0, -1
        table["event_time"][slots], table["time"][slots] = NEVER, NEVER


def recompute(
    space: Space, bootstrap: str, seen: Seen, base: Seen | None, refused: set[tuple[int, int]], share: float, progressed: Progressed
) -> tuple[dict[str, Expected], dict[int, float]]:
    """What every key must be, at the frame up to which its record says that it is true; and the partitions' stream times at the end.

    Args:
        base: what readers saw earlier: only the frames since are read, and added to it. Without it, all frames from the first on.
        refused: partition and offset of frames that are dead letters.
        progressed: told frames read and frames there are, over both passes.

    Raises:
        CrossrepError: a frame that must have been folded cannot be read, or the cluster does not answer.
    """
    expected = {entity: Expected(entity, spec, seen, base) for entity, spec in space.entities.items()}
    log = settled(bootstrap, [space.frames_topic])[space.frames_topic]
    # Not from the progress itself: where retention has emptied a partition, that lies on the last transaction's marker, which is gone.
    starts = {number: max(base.before[number].offset if base else 0, first) for number, (first, _) in log.items()}
    bounds = {number: (start, seen.after[number].offset) for number, start in starts.items()}
    stream_times = {number: base.before[number].stream_time if base else NEVER for number in bounds}

    def passed(before: int) -> Iterator[tuple[int, int, Forget | Frame]]:
        return walk(space, bootstrap, seen, bounds, refused, share, lambda done, total: progressed(before * total + done, 2 * total))

    for number, offset, work in passed(0):
        if isinstance(work, Forget):
            expected[work.entity].forget(number, offset, work.key)
        else:
            expected[work.entity].count(number, offset, work, stream_times[number])
            stream_times[number] = max(stream_times[number], work.newest)
    for about in expected.values():
        about.prepare()
    for number, offset, work in passed(1):
        if isinstance(work, Frame):
            expected[work.entity].add(number, offset, work)
    for about in expected.values():
        about.divide()
    return expected, stream_times


def _offsets(records: Records, at: dict[int, Progress]) -> NDArray[np.int64]:
    return np.array([at[number].offset for number, _ in records.keys], np.int64)


def _add(target: NDArray[np.float64], at: NDArray[np.int64], values: NDArray[np.float64]) -> None:
    """`np.add.at` of rows, which numpy does slowly."""
    if values.size:
        order = np.argsort(at, kind="stable")
        starts = np.flatnonzero(np.diff(at[order], prepend=-1))
        target[at[order][starts]] += np.add.reduceat(values[order], starts, axis=0)
