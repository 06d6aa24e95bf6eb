"""FrameWriter: how models of other teams write into a space, without going through `crossrep infer`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from confluent_kafka import KafkaError, KafkaException
from numpy.typing import ArrayLike, NDArray

from crossrep import kafka
from crossrep.columnar import algebra, frames
from crossrep.columnar.aggregates import combine
from crossrep.columnar.rows import ColumnRows, Rows
from crossrep.control import spaces
from crossrep.errors import CrossrepError
from crossrep.keys import Keys
from crossrep.spec import Space


def rows_of(
    space: Space,
    entity: str,
    ids: Sequence[str | bytes | int] | Keys,
    event: Sequence[str] | NDArray[np.str_] | str,
    times: ArrayLike,
    sources: Mapping[str, NDArray[np.floating]],
    weights: ArrayLike | None = None,
) -> Rows:
    """Raw rows, one per event, of one entity: what each column of its spec takes of them.

    Args:
        ids: n ids of the entity.
        event: what happened, one for all or n: names of the spec's [weights].
        times: n event times, seconds since 1970.
        sources: the upstream model's outputs the entity's columns name, each [n, dim].
        weights: n weights instead of the spec's; finite and > 0.

    Raises:
        ValueError: an id, event, weight or shape is wrong; names it.
    """
    n = len(ids)
    events = np.full(n, event) if isinstance(event, str) else np.asarray(event)
    moments = np.asarray(times, np.float64)
    if events.shape != (n,) or moments.shape != (n,):
        raise ValueError(f"{n} ids, but events of shape {events.shape} and times of shape {moments.shape}")
    own = None
    if weights is not None:
        own = np.asarray(weights, np.float64)
        if own.shape != (n,) or not ((own > 0) & (own <= frames.EVENT_WEIGHT_LIMIT)).all():
            raise ValueError(f"weights must be {n} numbers > 0 and <= {frames.EVENT_WEIGHT_LIMIT:g}")
    kinds, codes = np.unique(events, return_inverse=True)
    named = {column.source for column in space.entities[entity].columns.values() if column.dim}
    vectors = {name: rounded(np.asarray(array), space.vectors) for name, array in sources.items() if name in named}
    return rows_of_kinds(space, entity, ids if isinstance(ids, Keys) else Keys.of(ids), kinds.tolist(), codes, moments, vectors, own)


def rows_of_kinds(
    space: Space,
    entity: str,
    keys: Keys,
    kinds: Sequence[str],
    codes: NDArray[np.integer],
    times: NDArray[np.float64],
    sources: Mapping[str, NDArray[np.float32]],
    weights: NDArray[np.float64] | None = None,
) -> Rows:
    """The same of events that are numbers, and vectors that are `rounded`.

    Args:
        kinds: names of the spec's [weights].
        codes: by row, an index into `kinds`.

    Raises:
        ValueError: an event or shape is wrong; names it.
    """
    n = len(keys)
    unknown = set(kinds) - set(space.weights)
    if unknown:
        raise ValueError(f"event {min(unknown)!r} is not in the space's [weights]: {', '.join(space.weights)}")
    own = np.array([space.weights[kind] for kind in kinds])[codes] if weights is None else weights
    columns = {}
    for name, column in space.entities[entity].columns.items():
        taken = np.isin(kinds, column.events)[codes] if column.events else np.ones(n, np.bool_)
        block = np.empty((n, 0), np.float32)
        if column.dim:
            if column.source not in sources or sources[column.source].shape != (n, column.dim):
                shape = sources[column.source].shape if column.source in sources else "nothing"
                raise ValueError(f"{entity}.{name} needs source {column.source!r} of shape {(n, column.dim)}, got {shape}")
            block = sources[column.source]
        columns[name] = ColumnRows(block, own if column.aggregate == "decayed_mean" else np.ones(n), times, taken)
    return Rows(entity, keys, times, np.ones(n, np.int64), columns)


def rounded(vectors: NDArray[np.floating], dtype: str) -> NDArray[np.float32]:
    """As they will travel, before anything is compared or merged: what `latest` keeps must not depend on who saw the full precision."""
    with np.errstate(over="ignore"):
        narrow = vectors.astype(dtype, copy=False)
    if narrow.dtype != np.float16:
        return narrow
    wide, finite = algebra.widen(narrow)
    return wide if finite else narrow.astype(np.float32)


class FrameWriter:
    """Writes rows to a space's frames topic, each batch in one Kafka transaction.

        with crossrep.FrameWriter("kuairand-v1", name="my-model-0") as writer:
            writer.write("user", ids, event="impression", times=times, sources={"cr": cr, "ur": ur})
            writer.commit()

    What is not committed is not visible to anybody. Not thread-safe.

    Args:
        space: the name of a published space.
        name: stable and unique among running writers; a second writer of the same name fences the first.
        combine: merge rows of one key before writing; fewer bytes, the same state. Default: as the space declares.

    Raises:
        SpaceError: no such space.
        CrossrepError: the cluster does not answer.
    """

    def __init__(self, space: str, name: str, bootstrap: str | None = None, combine: bool | None = None):
        address = kafka.bootstrap_servers(bootstrap)
        self.space = spaces.find(space, address).space
        self._combine = self.space.combine if combine is None else combine
        self._pending: list[tuple[int, bytes]] = []
        self._producer = kafka.transactional_producer(address, f"frames.{space}.{name}", timeout=10.0)
        try:
            kafka.retried(lambda: self._producer.init_transactions(kafka.REQUEST_TIMEOUT))
        except KafkaException as error:
            raise CrossrepError(f"writer {name!r} of space {space!r} cannot start: {error.args[0].str()}") from error

    def write(
        self,
        entity: str,
        ids: Sequence[str | bytes | int],
        event: Sequence[str] | NDArray[np.str_] | str,
        times: ArrayLike,
        sources: Mapping[str, NDArray[np.floating]],
        weights: ArrayLike | None = None,
    ) -> None:
        """Add rows to the next commit (see `rows_of` for the arguments).

        Raises:
            ValueError: an argument is wrong; nothing of this call is written.
            BadFrame: a vector is not finite; nothing of this call is written.
        """
        if entity not in self.space.entities:
            raise ValueError(f"space {self.space.name!r} has no entity {entity!r}; it has {', '.join(self.space.entities)}")
        rows = rows_of(self.space, entity, ids, event, times, sources, weights)
        if not (np.isfinite(rows.times).all() and (rows.times >= 0).all()):
            raise ValueError("times must be finite seconds since 1970")
        if not all(np.isfinite(column.vectors).all() for column in rows.columns.values()):
            raise ValueError(f"vectors must be finite in {self.space.vectors}")
        self._pending += frames.encode(self.space, combine(self.space, rows) if self._combine else rows)

    def commit(self) -> None:
        """Make everything written since the last commit visible at once.

        Raises:
            CrossrepError: it could not be committed; says whether anything may be visible, and whether to call `commit` again.
        """
        producer = self._producer
        try:
            producer.begin_transaction()
            for partition, frame in self._pending:
                producer.produce(self.space.frames_topic, frame, partition=partition)
            kafka.retried(producer.commit_transaction)
        except BufferError as error:
            kafka.retried(lambda: producer.abort_transaction(kafka.REQUEST_TIMEOUT))
            raise CrossrepError("nothing was written: more than fits the producer's queue of 1 GiB. Write less between commits") from error
        except KafkaException as error:
            raise self._failed(error.args[0]) from error
        self._pending = []

    def _failed(self, problem: KafkaError) -> CrossrepError:
        if problem.txn_requires_abort():
            try:
                kafka.retried(lambda: self._producer.abort_transaction(kafka.REQUEST_TIMEOUT))
                return CrossrepError(f"nothing was written: {problem.str()}. Call commit() again")
            except KafkaException as worse:
                problem = worse.args[0]
        if problem.fatal():
            return CrossrepError(f"nothing was written: {problem.str()}. Another writer of this name has taken over")
        return CrossrepError(f"it is unknown whether the rows are visible: {problem.str()}. Look before you write them again")

    def __enter__(self) -> FrameWriter:
        return self

    def __exit__(self, *exc: Any) -> None:
        """Rows not committed are dropped."""
        self._pending = []
