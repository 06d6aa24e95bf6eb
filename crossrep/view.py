"""LocalView: a space's representations of one entity, in this process's memory, kept fresh from their topic."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crossrep import algebra, kafka, spaces
from crossrep.errors import SpaceError
from crossrep.follow import Follower
from crossrep.keys import MISSING, Keys
from crossrep.records import RecordLayout
from crossrep.spec import Space
from crossrep.table import RecordTable

Id = str | bytes | int


@dataclass(frozen=True)
class ColumnValues:
    """One column of n ids. Where an id is not found, or never had this column: vector 0, weight 0, time -inf."""

    vectors: NDArray[np.float32]  # [n, dim]
    weights: NDArray[np.float64]  # [n], decayed to the time asked for: the confidence; NaN for `latest`
    times: NDArray[np.float64]  # [n], seconds since 1970 of the newest event in the column


@dataclass(frozen=True)
class Representations(Mapping[str, ColumnValues]):
    """The answer to a look-up of n ids: a mapping from column to values, with what is known of each id."""

    found: NDArray[np.bool_]  # [n]
    counts: NDArray[np.int64]  # [n], events folded; 0 if not found
    event_times: NDArray[np.float64]  # [n], newest event, seconds since 1970; -inf if not found
    source_offsets: NDArray[np.int64]  # [n], every frame of the id's partition up to and including this offset is in it; -1 if not found
    at: float  # the time weights are decayed to, seconds since 1970
    columns: dict[str, ColumnValues]

    def __getitem__(self, column: str) -> ColumnValues:
        return self.columns[column]

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    def __len__(self) -> int:
        return len(self.columns)


class LocalView:
    """All representations of one entity of a space, following their topic.

        with crossrep.LocalView("user", space="kuairand-v1") as users:
            users.wait()
            answer = users.get(["17", "4711"])
            answer.found, answer["cr"].vectors, answer["cr"].weights

    While the cluster is away the view answers with what it holds, and goes on where it was when the cluster is back; `staleness` says how
    old its answers may be. It ends when it cannot go on: a record is not one of this space, there is no memory for more keys, the topic
    was deleted, created anew or truncated. Then every question raises CrossrepError, which says why; a new view is the way on.

    Memory, `memory_bytes`: per key the record's size (`record_bytes`, four bytes a dimension and some) and an eighth of that in reserve,
    and 86 to 172 bytes of index. At the peak, while the index doubles beside the old one, 258 bytes of index; the records grow in place
    (without Linux's mremap, old and new exist together for a moment: twice the record's size). Beside that come up to 128 MiB of records
    on their way in. A container's kernel kills rather than refuses memory: give `max_bytes` there.

    Thread-safe.

    Args:
        entity: such as "user".
        space: the name of a published space. Everything else is learnt from its publication.
        bootstrap: the cluster; default KAFKA_BOOTSTRAP, or the local broker.
        max_bytes: the table and the index end the view rather than take more than this, also while they grow.

    Raises:
        SpaceError: no such space, or no such entity in it.
        CrossrepError: the cluster does not answer, for 20 seconds.
    """

    def __init__(self, entity: str, space: str, bootstrap: str | None = None, max_bytes: int | None = None):
        address = kafka.bootstrap_servers(bootstrap)
        self.space: Space = spaces.find(space, address).space
        if entity not in self.space.entities:
            raise SpaceError(f"space {space!r} has no entity {entity!r}; it has {', '.join(self.space.entities)}")
        self.entity = entity
        self._table = RecordTable(self.space, entity, max_bytes)
        self._follower = Follower(self.space.representations_topic(entity), self._table.apply, address)

    def get(self, ids: Sequence[Id], at: float | None = None) -> Representations:
        """Look ids up, as they are now; does not wait (see `wait`).

        Args:
            ids: n strings, bytes or integers.
            at: decay weights to this time, seconds since 1970; default the stream's time, the newest event seen in any record.

        Raises:
            CrossrepError: following the topic has failed, so that what is held is no longer kept fresh; open a new view.
        """
        self._follower.check()
        keys = Keys.of(ids)
        with self._table.lock:
            slots = self._table.index.find(keys)
            records = self._table.records[np.maximum(slots, 0)]
            moment = self._table.stream_time if at is None else at
        return represent(self._table.layout, slots != MISSING, records, moment)

    def ids(self) -> list[str]:
        """Every id held, in no particular order."""
        self._follower.check()
        with self._table.lock:
            return [key.decode(errors="replace") for key in self._table.index.keys(self._table.index.slots()).tolist()]

    def nearest(self, column: str, to: Id | NDArray[np.floating], k: int = 10) -> list[tuple[str, float]]:
        """The k ids whose vectors have the greatest cosine with an id's vector (itself left out) or with a given vector.

        Raises:
            KeyError: the id is not held, or the column has no vector.
        """
        if column not in self._table.layout.columns or not self._table.layout.columns[column].dim:
            raise KeyError(f"{self.entity} has no vectors {column!r}; it has {[n for n, c in self._table.layout.columns.items() if c.dim]}")
        self._follower.check()
        with self._table.lock:
            slots = self._table.index.slots()
            itself = -1
            if isinstance(to, np.ndarray):
                target = to.astype(np.float32)
            else:
                itself = int(self._table.index.find(Keys.of([to]))[0])
                if itself == MISSING:
                    raise KeyError(f"{self.entity} {to!r} is not held")
                target = self._table.records[itself][column].copy()
            slots = slots[slots != itself]
            vectors = np.ascontiguousarray(self._table.records[column][slots])
            keys = self._table.index.keys(slots)
        cosines = algebra.cosines(vectors, target)
        best = np.argsort(-cosines, kind="stable")[:k]
        names = keys.take(best).tolist()
        return [(name.decode(errors="replace"), float(cosine)) for name, cosine in zip(names, cosines[best])]

    def __len__(self) -> int:
        """Ids held."""
        self._follower.check()
        return self._table.index.size

    @property
    def memory_bytes(self) -> int:
        """Bytes of table and index."""
        return self._table.memory_bytes

    @property
    def record_bytes(self) -> int:
        """Bytes of one record."""
        return self._table.layout.size

    @property
    def caught_up(self) -> bool:
        """Has everything that was in the topic when the view started been applied?"""
        return self._follower.caught_up

    @property
    def lag(self) -> int:
        """Offsets behind the end of the topic as it was last seen; with the cluster away that may be long ago: see `staleness`."""
        return self._follower.lag

    @property
    def staleness(self) -> float:
        """How old answers may be: whatever was visible to readers more than this many seconds ago is in the view.

        About a second while all is well; grows while the cluster does not answer or the view is behind; infinite until first caught up.
        """
        return self._follower.staleness

    @property
    def stream_time(self) -> float:
        """The newest event time in any record, seconds since 1970; -inf while there is none."""
        self._follower.check()
        return self._table.stream_time

    def wait(self, timeout: float | None = None) -> None:
        """Block until caught up with what was in the topic when the view started. Raises TimeoutError after `timeout` seconds."""
        self._follower.wait(timeout)

    def close(self) -> None:
        """Stop following; takes 2 seconds at most."""
        self._follower.close()

    def __enter__(self) -> LocalView:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def represent(
    layout: RecordLayout, found: NDArray[np.bool_], records: NDArray[np.void], at: float, columns: Sequence[str] | None = None
) -> Representations:
    """The answer of a look-up, from records.

    Args:
        found: bool [n].
        records: of the layout, [n]; what lies where an id is not found means nothing.
        at: decay weights to this time, seconds since 1970.
        columns: which; default all.
    """
    chosen = {}
    for name, column in layout.columns.items():
        if columns is not None and name not in columns:
            continue
        times = np.where(found, records[f"{name}_time"], algebra.NEVER)
        vectors = np.where(found[:, None], records[name], np.float32(0)) if column.dim else np.empty((len(found), 0), np.float32)
        weights = np.full(len(found), np.nan)
        if column.half_life is not None:
            held = np.where(found, records[f"{name}_weight"], 0.0)
            since = np.subtract(at, times, out=np.zeros(len(held)), where=held > 0)
            weights = algebra.decay(held, since, column.half_life)
        chosen[name] = ColumnValues(vectors, weights, times)
    counts = np.where(found, records["count"], 0).astype(np.int64)
    offsets = np.where(found, records["source_offset"], -1).astype(np.int64)
    return Representations(found, counts, np.where(found, records["event_time"], algebra.NEVER), offsets, at, chosen)
