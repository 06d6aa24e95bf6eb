"""Taking a snapshot: every partition of every entity to a Parquet file, then the manifest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from crossrep.columnar.algebra import NEVER
from crossrep.columnar.records import RecordLayout
from crossrep.control import binding, spaces
from crossrep.control.spaces import Published
from crossrep.files import parquet
from crossrep.files.dated import header
from crossrep.keys import Keys
from crossrep.snapshots.store import Manifest, Part, Store
from crossrep.spec import Space
from crossrep.views import changelog
from crossrep.views.table import RecordTable

Progressed = Callable[[int], None]  # offsets read, of changelog.sizes()


def take(published: Published, bootstrap: str, store: Store, progressed: Progressed = lambda offsets: None) -> Manifest:
    """Write and publish a snapshot of all entities of a space. A failure leaves nothing behind; a kill leaves what nobody sees.

    Memory: the keys of one partition of one entity at a time.

    Raises:
        SpaceError, TopicError: the space is being rewound, or its topics are not those that were published.
        DataError: nothing can be written there.
        CrossrepError: the cluster does not answer, or a record is not one of this space.
    """
    space = published.space
    entities = list(space.entities)
    changelog.refuse_changed(published, entities, bootstrap)
    with store.begun() as id:
        parts: dict[str, list[Part]] = {}
        times: dict[str, float | None] = {}
        for entity in entities:
            found = [_take_part(space, entity, number, bootstrap, store, id, progressed) for number in range(space.partitions)]
            parts[entity] = [part for part, _ in found]
            times[entity] = max((time for _, time in found if time > NEVER), default=None)
        changelog.refuse_changed(spaces.find(space.name, bootstrap), entities, bootstrap)
        manifest = Manifest(**header(space, id), stream_times=times, parts=parts, model=binding.model_of(published, bootstrap))
        store.publish(manifest)
    return manifest


def write_part(
    store: Store, id: str, layout: RecordLayout, partition: int, runs: Iterable[tuple[Keys, NDArray[np.void]]], **offsets: int
) -> Part:
    """A partition's file. `offsets`: first_offset, end_offset and source_offset of its Part. Raises DataError: it cannot be written."""
    inside, rows = f"{layout.entity}/part-{partition:05d}.parquet", 0

    def counted() -> Iterator[tuple[Keys, NDArray[np.void]]]:
        nonlocal rows
        for keys, records in runs:
            rows += len(keys)
            yield keys, records

    try:
        store.fs.makedirs(store.path(id, layout.entity), exist_ok=True)
        with store.fs.open(store.path(id, inside), "wb") as file:
            hashed = parquet.Hashed(file)
            parquet.write(hashed, layout, counted())
    except OSError as error:
        raise store.unusable("written", error) from error
    return Part(path=inside, partition=partition, rows=rows, bytes=hashed.bytes, sha256=hashed.sha256, **offsets)


def _take_part(space: Space, entity: str, number: int, bootstrap: str, store: Store, id: str, progressed: Progressed) -> tuple[Part, float]:
    """One partition's file, and the newest event time of its rows."""
    state = changelog.read(space, entity, number, bootstrap, progressed)
    offsets = {
        "first_offset": state.first,
        "end_offset": state.end,
        "source_offset": int(_greatest(state.table, "source_offset", -1)),
    }
    part = write_part(store, id, state.table.layout, number, state.table.runs(parquet.ROWS), **offsets)
    return part, _greatest(state.table, "event_time", NEVER)


def _greatest(table: RecordTable, field: str, least: float) -> float:
    return float(table.records[field][table.index.slots()].max(initial=least))
