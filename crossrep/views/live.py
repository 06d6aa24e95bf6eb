"""One entity of one space, in a table that follows its topic: what a `LocalView` holds, or two of them while it switches."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from crossrep.columnar import algebra
from crossrep.control.readers import Presence
from crossrep.errors import SpaceError
from crossrep.keys import MISSING, Id, Keys
from crossrep.spec import Space
from crossrep.views import filters
from crossrep.views.answers import Representations, answer
from crossrep.views.follow import Follower
from crossrep.views.table import RecordTable

if TYPE_CHECKING:
    from crossrep.views.disk import Folder


@dataclass(frozen=True)
class Wanted:
    """What a view was told to hold, and how; see `LocalView`."""

    entity: str
    max_bytes: int | None
    partitions: Collection[int] | None
    ids: Sequence[Id] | NDArray[Any] | None
    path: Path | None
    with_means: bool


class Live:
    """The table, the thread that follows, and the folder if there is one.

    Args:
        told: called from the follower's thread with the keys that were updated and deleted.

    Raises:
        SpaceError, ValueError, CrossrepError: as `LocalView` says.
    """

    def __init__(
        self, space: Space, wanted: Wanted, bootstrap: str, told: Callable[[Live, list[bytes], list[bytes]], object] = lambda *changed: None
    ):
        entity = wanted.entity
        if entity not in space.entities:
            raise SpaceError(f"space {space.name!r} has no entity {entity!r}; it has {', '.join(space.entities)}")
        self.space, self._told = space, told
        chosen, only = filters.chosen_of(space, wanted.partitions, wanted.ids)
        self.folder: Folder | None = None
        if wanted.path is not None:
            from crossrep.views import disk  # not every system has what it takes

            self.folder = disk.open_table(wanted.path, space, entity, chosen, only, bootstrap)
        begin = None if self.folder is None else self.folder.begin
        try:
            self.table = RecordTable(space, entity, wanted.max_bytes, only, wanted.with_means, self.folder)
        except BaseException:
            if self.folder is not None:
                self.folder.release()
            raise
        presence = Presence(space.name, entity, "LocalView")
        topic = space.representations_topic(entity)
        self.follower = Follower(topic, self._apply, bootstrap, chosen, begin, self._reached, presence)

    @property
    def caught_up(self) -> bool:
        """Has everything that was in the topic at the start been applied? Raises CrossrepError if following has failed."""
        return self.follower.caught_up

    def get(self, ids: Sequence[Id] | NDArray[Any] | Keys, at: float | None, columns: Collection[str] | None) -> Representations:
        """See `LocalView.get`."""
        self.follower.check()
        layout = self.table.layout
        if columns is not None and not layout.columns.keys() >= set(columns):
            raise KeyError(f"{layout.entity} has not all columns of {list(columns)}; it has {list(layout.columns)}")
        keys = ids if isinstance(ids, Keys) else Keys.of(ids)
        with self.table.lock:
            slots = self.table.index.find(keys)
            records = self.table.records[np.maximum(slots, 0)]
            moment = self.table.stream_time if at is None else at
            means = {} if self.table.means is None else self.table.means.vectors()
        return answer(layout, keys, slots != MISSING, records, moment, means, columns)

    def dim(self, column: str) -> int:
        """See `LocalView.dim`."""
        layout = self.table.layout
        dims = {name: declared.dim for name, declared in layout.columns.items() if declared.dim}
        if column not in dims:
            raise KeyError(f"{layout.entity} has no vectors {column!r}; it has {list(dims)}")
        return dims[column]

    def ids(self) -> list[str]:
        """See `LocalView.ids`."""
        self.follower.check()
        return self.held()

    def held(self) -> list[str]:
        """The same, also of one that has ended."""
        with self.table.lock:
            return [key.decode(errors="replace") for key in self.table.index.keys(self.table.index.slots()).tolist()]

    def nearest(self, column: str, to: Id | NDArray[np.floating], k: int) -> list[tuple[str, float]]:
        """See `LocalView.nearest`."""
        self.dim(column)
        self.follower.check()
        with self.table.lock:
            slots = self.table.index.slots()
            itself = -1
            if isinstance(to, np.ndarray):
                target = to.astype(np.float32)
            else:
                itself = int(self.table.index.find(Keys.of([to]))[0])
                if itself == MISSING:
                    raise KeyError(f"{self.table.layout.entity} {to!r} is not held")
                target = self.table.records[itself][column].copy()
            slots = slots[slots != itself]
            vectors = np.ascontiguousarray(self.table.records[column][slots])
            keys = self.table.index.keys(slots)
        cosines = algebra.cosines(vectors, target)
        best = np.argsort(-cosines, kind="stable")[:k]
        names = keys.take(best).tolist()
        return [(name.decode(errors="replace"), float(cosine)) for name, cosine in zip(names, cosines[best])]

    def close(self) -> None:
        """Stop following, and write the folder out. Who still holds this may go on reading: it gets older."""
        ended = self.follower.close()
        if self.folder is not None and ended:
            folder, self.folder = self.folder, None
            folder.close(self.follower.positions, self.table.stream_time, self.follower.complete_at.wall)

    def _reached(self, positions: dict[int, int], complete: float) -> None:
        if self.folder is not None:
            self.folder.advance(positions, self.table.stream_time, complete)

    def _apply(self, names: list[bytes], values: list[bytes | None]) -> None:
        self._told(self, *self.table.apply(names, values))
