"""Seeding a space with a snapshot: its records as partials, written to the space's frames topic, each exactly once.

A file is written a row group at a time, each in one Kafka transaction, with a marker in the same transaction: the committed offset of the
consumer group `import.<space>` is the number of row groups done, its metadata says of which snapshot. Whoever repeats the import goes on
from there, and fences the one before. Brokers forget offsets after a week, so a space that holds frames and no marker is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from confluent_kafka import KafkaException, Producer, TopicPartition
from numpy.typing import NDArray

from crossrep import kafka
from crossrep.columnar import frames
from crossrep.columnar.algebra import NEVER
from crossrep.columnar.records import RecordLayout
from crossrep.columnar.rows import ColumnRows, Rows
from crossrep.control import binding, spaces
from crossrep.errors import BadFrame, CrossrepError, DataError, SpaceError
from crossrep.files import parquet
from crossrep.keys import Keys
from crossrep.snapshots.store import Manifest, Part, Store
from crossrep.spec import Space

TIMEOUT = 60.0  # seconds a transaction may stay open; one takes far less than one

Progressed = Callable[[int], None]  # rows further


@dataclass(frozen=True)
class Marker:
    """How far an import has come."""

    snapshot: str
    done: int  # row groups
    finished: bool = False


def import_group(space: Space) -> str:
    """The consumer group whose committed offset is the marker."""
    return f"import.{space.name}"


def seed(
    store: Store, manifest: Manifest, space: Space, bootstrap: str, add: bool = False, progressed: Progressed = lambda rows: None
) -> int:
    """Write every row of a snapshot into a space; what an earlier, interrupted run of the same import wrote is not written again.

    Vectors are rounded to the space's `vectors` type; counts, weights and times arrive exactly. Before the first of them the space is bound
    to the model that made them (crossrep/control/binding.py), if the snapshot says which.

    Args:
        add: also into a space that holds frames already.

    Returns:
        The rows written now; 0 if all of them were already there.

    Raises:
        SpaceError: the space's entities do not fit the snapshot's, or it holds something else; says what.
        ModelError: the space is bound to another model.
        DataError: a file of the snapshot is damaged, or holds what no frame can.
        CrossrepError: the cluster does not answer, or another import into this space has taken over. Repeating is safe.
    """
    refuse_unlike(manifest.declared(), space)
    producer = kafka.transactional_producer(bootstrap, import_group(space), TIMEOUT)
    client = kafka.consumer(bootstrap, import_group(space))
    group = client.consumer_group_metadata()
    written, index = 0, 0
    try:
        kafka.retried(lambda: producer.init_transactions(kafka.REQUEST_TIMEOUT))  # ends what a killed run has left open
        done = _done(client, manifest, space, bootstrap, add)
        if manifest.model is not None:
            binding.bind(spaces.find(space.name, bootstrap), manifest.model, bootstrap)
        if done is None:
            _commit(producer, group, space, [], Marker(manifest.id, done := 0))  # from now on what lies there is this import's
        for entity, part in ((entity, part) for entity, parts in manifest.parts.items() for part in parts):
            for keys, records in _row_groups(store, manifest, entity, part):
                index += 1
                if index > done:
                    rows = rows_of_records(RecordLayout(space, entity), keys, records)
                    _commit(producer, group, space, _encoded(space, rows), Marker(manifest.id, index))
                    written += len(rows)
                progressed(len(keys))
        _commit(producer, group, space, [], Marker(manifest.id, index, finished=True))
    except KafkaException as error:
        raise CrossrepError(
            f"the import of snapshot {manifest.id} into space {space.name!r} stopped: {error.args[0].str()}. Repeat the command: what is "
            "written already is not written again"
        ) from error
    finally:
        client.close()
    return written


def refuse_unlike(source: Space, space: Space) -> None:
    """Has the space every entity of the snapshot's, with the same columns? Raises SpaceError that names what differs."""
    problems = []
    for name, entity in source.entities.items():
        if name not in space.entities:
            problems.append(f"it has no entity {name!r}")
            continue
        found = space.entities[name].columns
        problems += [f"{name}.{column} is only in one of them" for column in sorted(entity.columns.keys() ^ found.keys())]
        for column in sorted(entity.columns.keys() & found.keys()):
            there, here = (columns[column].model_dump(exclude_none=True) for columns in (entity.columns, found))
            problems += [
                f"{name}.{column}.{field} is {here.get(field)!r}, in the snapshot {there.get(field)!r}"
                for field in sorted(there.keys() | here.keys())
                if there.get(field) != here.get(field)
            ]
    if problems:
        raise SpaceError(
            f"a snapshot of space {source.name!r} cannot seed space {space.name!r}, whose vectors and weights mean something else:\n"
            + "\n".join(f"  {problem}" for problem in problems)
        )


def rows_of_records(layout: RecordLayout, keys: Keys, records: NDArray[np.void]) -> Rows:
    """n records as the n partials that fold to them."""
    times = records["event_time"].copy()
    columns = {}
    for name, column in layout.columns.items():
        present = records[f"{name}_time"] > NEVER
        vectors = np.ascontiguousarray(records[name]) if column.dim else np.empty((len(records), 0), np.float32)
        weights = records[f"{name}_weight"].copy() if column.half_life is not None else np.ones(len(records))
        columns[name] = ColumnRows(vectors, weights, np.where(present, records[f"{name}_time"], times), present)
    return Rows(layout.entity, keys, times, records["count"].astype(np.int64), columns)


def marker(client: Any, space: Space) -> Marker | None:
    """How far the last import into the space has come; None where nothing says that there was one."""
    (part,) = kafka.committed(client, [TopicPartition(space.frames_topic, 0)])
    return Marker(**json.loads(part.metadata)) if part.offset >= 0 else None


def _done(client: Any, manifest: Manifest, space: Space, bootstrap: str, add: bool) -> int | None:
    """Row groups already written; None: this import has not begun. Raises SpaceError: something else is there."""
    found = marker(client, space)
    if found is not None and found.snapshot == manifest.id:
        return found.done
    if found is not None and not found.finished:
        raise SpaceError(
            f"the import of snapshot {found.snapshot} into space {space.name!r} is half done. Finish it first: crossrep import ... --into "
            f"{space.name} --snapshot {found.snapshot}"
        )
    if not add and any(end for _, end in kafka.bounds(bootstrap, space.frames_topic).values()):
        raise SpaceError(
            f"{space.frames_topic} holds frames already, of events or of another import: what they count might be counted twice. Import "
            "into a new space, or say --add if the snapshot's events are surely not among them"
        )
    return None


def _row_groups(store: Store, manifest: Manifest, entity: str, part: Part) -> Iterator[tuple[Keys, NDArray[np.void]]]:
    """A file's rows, once its bytes are known to be those that were written."""
    path, layout = store.path(manifest.id, part.path), RecordLayout(manifest.declared(), entity)
    try:
        with store.fs.open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != part.sha256:
                raise DataError(f"{path} is damaged: its SHA-256 is {digest}, not {part.sha256}. Take a new snapshot, or another one")
            file.seek(0)
            yield from parquet.read(file, layout)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}. It may have been removed by another run's --keep") from None


def _encoded(space: Space, rows: Rows) -> list[tuple[int, bytes]]:
    """Frames, each read as a fold worker will: what it would refuse must not be sent."""
    try:
        found = list(frames.encode(space, rows))
        for partition, frame in found:
            frames.decode(space, frame, partition=partition)
    except BadFrame as error:
        hint = ' Declare vectors = "float32" in it' if error.reason == "vector" and space.vectors == "float16" else ""
        raise DataError(f"a row of {rows.entity} does not fit a frame of space {space.name!r}: {error.detail}.{hint}") from None
    return found


def _commit(producer: Producer, group: Any, space: Space, found: list[tuple[int, bytes]], marker: Marker) -> None:
    """Frames and marker, in one transaction. Raises KafkaException: it may be repeated by a new producer."""
    producer.begin_transaction()
    for partition, frame in found:
        producer.produce(space.frames_topic, frame, partition=partition)
    place = TopicPartition(space.frames_topic, 0, marker.done, json.dumps(marker.__dict__))
    kafka.retried(lambda: producer.send_offsets_to_transaction([place], group))
    kafka.retried(producer.commit_transaction)
