"""LocalView: a space's representations of one entity, in this process's memory, kept fresh from their topic."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

import numpy as np
from numpy.typing import NDArray

from crossrep import kafka
from crossrep.errors import CrossrepError, SpaceError
from crossrep.keys import Id, Keys
from crossrep.spec import Space
from crossrep.views.answers import Representations
from crossrep.views.changes import Callback, Changes, Subscribers, iterate
from crossrep.views.live import Live, Wanted
from crossrep.views.switch import Switcher, aliased

Missing = Literal["zero", "mean"]


class LocalView:
    """All representations of one entity of a space, following their topic.

        with crossrep.LocalView("user", space="kuairand-v1") as users:
            users.wait()
            answer = users.get(["17", "4711"])
            answer.found, answer["cr"].vectors, answer["cr"].weights

    While the cluster is away the view answers with what it holds, and goes on where it was when the cluster is back; `staleness` says how
    old its answers may be. It ends when it cannot go on: a record is not one of this space, there is no memory for more keys, the topic
    was deleted, created anew or truncated, or deletions may have gone from it while the view was suspended or cut off. Then every question
    raises CrossrepError, which says why; a new view is the way on.

    With an alias, such as `current`, it goes along with promotions: the new space is loaded beside the former, which answers until then,
    and takes its place in one step. Every answer is of one space and says which; `Changes.switched` tells callbacks. For that time it takes
    both spaces' memory; `max_bytes` holds for each. What cannot be loaded is tried again: `check` says why, and the former goes on.

    Memory, `memory_bytes`: per key the record's size (`record_bytes`, four bytes a dimension and some) and an eighth of that in reserve,
    and 86 to 172 bytes of index. At the peak, while the index doubles beside the old one, 258 bytes of index; the records grow in place
    (without Linux's mremap, old and new exist together for a moment: twice the record's size). Beside that come up to 128 MiB of records
    on their way in. A container's kernel kills rather than refuses memory: give `max_bytes` there. With `path`, records and 65 bytes a key
    of the index lie in files, of which the kernel keeps in memory what it has room for; `memory_bytes` and `max_bytes` count them too.

    Thread-safe.

    Args:
        entity: such as "user".
        space: the name of a published space, or an alias (docs/spaces.md). Everything else is learnt from its publication.
        bootstrap: the cluster; default KAFKA_BOOTSTRAP, or the local broker.
        max_bytes: the table and the index end the view rather than take more than this, also while they grow.
        partitions: hold these partitions' keys alone; nothing else is fetched.
        ids: hold these keys alone; their partitions are read. What a filter leaves out is answered as any key that is not held.
        path: keep the table in files below this folder (Linux, macOS), so that it may be larger than memory, and a new view goes on
            where the last one was. One view at a time. It is a cache: right to delete, and emptied by itself, with a warning that says
            why, when it cannot be trusted.
        missing: the vector of keys that have none: "zero", or "mean", the mean over all keys held that have one. Their weight is 0.

    Raises:
        SpaceError: no such space, no such entity in it, or no such partition.
        ValueError: an id is empty or longer than 64 bytes; nothing is wanted; both filters are given; `missing` is neither.
        CrossrepError: the cluster does not answer, for 20 seconds; another view has the folder open.
    """

    def __init__(
        self,
        entity: str,
        space: str,
        bootstrap: str | None = None,
        max_bytes: int | None = None,
        *,
        partitions: Collection[int] | None = None,
        ids: Sequence[Id] | NDArray[Any] | None = None,
        path: Path | str | None = None,
        missing: Missing = "zero",
    ):
        if missing not in get_args(Missing):
            raise ValueError(f"missing is {missing!r}; it must be one of {', '.join(map(repr, get_args(Missing)))}")
        address = kafka.bootstrap_servers(bootstrap)
        self.entity = entity
        self._wanted = Wanted(entity, max_bytes, partitions, ids, None if path is None else Path(path), missing == "mean")
        self._address = address
        self._subscribers = Subscribers()
        found, follows = aliased(space, address)
        self._live = self._open(found)
        self._switcher = Switcher(space, address, lambda: self._live, self._load, self._switch) if follows else None

    @property
    def space(self) -> Space:
        """Whose representations it answers now; with an alias another one after a promotion."""
        return self._live.space

    @property
    def alias(self) -> str | None:
        """The name that it follows, if it was given one."""
        return None if self._switcher is None else self._switcher.alias

    def get(
        self, ids: Sequence[Id] | NDArray[Any] | Keys, at: float | None = None, columns: Collection[str] | None = None
    ) -> Representations:
        """Look ids up, as they are now; does not wait (see `wait`).

        Args:
            ids: n strings, bytes or integers; an array or a tensor of them, [n], does too.
            at: decay weights to this time, seconds since 1970; default the stream's time, the newest event seen in any record.
            columns: answer these alone, which is less to copy.

        Raises:
            ValueError: an id is empty or longer than 64 bytes.
            KeyError: the entity has no such column.
            CrossrepError: following the topic has failed, so that what is held is no longer kept fresh; open a new view.
        """
        return self._live.get(ids, at, columns)

    def arrow(self) -> Any:
        """Everything held, at one moment, as a pyarrow.Table: the columns of a snapshot's files (docs/snapshots.md), weights decayed to
        each column's own newest event. pandas, polars and DuckDB read it without another copy.

        Arrow keeps columns and the view rows, so this is one copy of everything, in memory; the view stands still meanwhile.

        Raises:
            CrossrepError: pyarrow is not installed; following has failed.
        """
        from crossrep.views.arrow import table

        live = self._live
        live.follower.check()
        return table(live.table)

    def dim(self, column: str) -> int:
        """Dimensions of a column's vectors.

        Raises:
            KeyError: the entity has no vectors of that name.
        """
        return self._live.dim(column)

    def ids(self) -> list[str]:
        """Every id held, in no particular order."""
        return self._live.ids()

    def nearest(self, column: str, to: Id | NDArray[np.floating], k: int = 10) -> list[tuple[str, float]]:
        """The k ids whose vectors have the greatest cosine with an id's vector (itself left out) or with a given vector.

        Raises:
            KeyError: the id is not held, or the column has no vector.
        """
        return self._live.nearest(column, to, k)

    def __len__(self) -> int:
        """Ids held."""
        live = self._live
        live.follower.check()
        return live.table.index.size

    @property
    def memory_bytes(self) -> int:
        """Bytes of table and index, in memory and files."""
        return self._live.table.memory_bytes

    @property
    def record_bytes(self) -> int:
        """Bytes of one record."""
        return self._live.table.layout.size

    @property
    def caught_up(self) -> bool:
        """Has everything that was in the topic when the view started been applied?"""
        return self._live.follower.caught_up

    @property
    def lag(self) -> int:
        """Offsets behind the end of the topic as it was last seen; with the cluster away that may be long ago: see `staleness`."""
        return self._live.follower.lag

    @property
    def staleness(self) -> float:
        """How old answers may be: whatever was visible to readers more than this many seconds ago is in the view.

        About a second while all is well; grows while the cluster does not answer or the view is behind; infinite until first caught up.
        """
        return self._live.follower.staleness

    @property
    def stream_time(self) -> float:
        """The newest event time in any record, seconds since 1970; -inf while there is none."""
        live = self._live
        live.follower.check()
        return live.table.stream_time

    def wait(self, timeout: float | None = None) -> None:
        """Block until caught up with what was in the topic when the view started. Raises TimeoutError after `timeout` seconds."""
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while not self.caught_up:
            if time.monotonic() > deadline:
                raise self._live.follower.late(timeout)
            time.sleep(0.01)

    def subscribe(self, callback: Callback) -> Callable[[], None]:
        """Call back with `Changes`: first, before this returns, with all ids held, then with what each run of records changes.

        Whoever follows them all knows exactly which ids the view holds. A key that changes several times within a run is told once; now
        and then a change is told that the first call had already seen. Later calls come from the view's own thread, which reads no further
        meanwhile: hand longer work on, and do not close the view in it. A callback that raises is logged and not called again; `check`
        raises its error from then on, while the view goes on.

        Returns a function that ends it.
        """
        self._live.follower.check()
        return self._subscribers.add(callback, lambda: (self.space.name, self.ids()))

    def check(self) -> None:
        """Is all well? For health checks.

        Raises:
            CrossrepError: following the topic has failed, or a callback has, or what an alias stands for now cannot be loaded.
        """
        self._live.follower.check()
        self._subscribers.check()
        if self._switcher is not None:
            self._switcher.check()

    async def aget(
        self, ids: Sequence[Id] | NDArray[Any] | Keys, at: float | None = None, columns: Collection[str] | None = None
    ) -> Representations:
        """`get`, for asyncio: in a thread, so that the loop never waits for the table."""
        return await asyncio.to_thread(self.get, ids, at, columns)

    async def until_caught_up(self, timeout: float | None = None) -> None:
        """`wait`, for asyncio."""
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while not self.caught_up:
            if time.monotonic() > deadline:
                raise self._live.follower.late(timeout)
            await asyncio.sleep(0.05)

    def changes(self) -> AsyncGenerator[Changes, None]:
        """`subscribe`, for asyncio: `async for updated, deleted in view.changes()`, first all ids held.

        A loop that is slower than the stream gets several changes merged: nothing piles up but ids. Raises CrossrepError once the view
        has ended.
        """
        return iterate(self.subscribe, lambda: self._live.follower.check())

    def close(self) -> None:
        """Stop following; takes 2 seconds at most, and with `path` as long as the disk takes to write everything out."""
        if self._switcher is not None:
            self._switcher.close()
        if self._live.folder is not None:
            self._live.follower.fail(CrossrepError("the view was closed, and its folder may be another view's by now"))
        self._live.close()

    def __enter__(self) -> LocalView:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __deepcopy__(self, memo: object) -> LocalView:
        """Itself: it is a connection, and copies of a model share it."""
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("a LocalView cannot be pickled: it follows a topic in a thread of its process. Open one where it is needed")

    def _open(self, space: Space) -> Live:
        return Live(space, self._wanted, self._address, self._told)

    def _load(self, space: Space) -> Live:
        former = self._live.space
        if self._wanted.partitions is not None and former.partitions != space.partitions:
            raise SpaceError(
                f"it has {space.partitions} partitions, not {former.partitions}: those of the view's filter hold other keys there. Open a "
                "view of it"
            )
        return self._open(space)

    def _switch(self, fresh: Live) -> Live:
        former = self._live

        with self._subscribers.lock:  # what they are told before is of the former, and what behind of the fresh one
            self._live = fresh
            self._subscribers.switched(fresh.space.name, former.held, fresh.held)
        return former

    def _told(self, live: Live, updated: list[bytes], deleted: list[bytes]) -> None:
        self._subscribers.tell(updated, deleted, live.space.name, lambda: live is self._live)
