"""Taking a snapshot: every partition of every entity to a Parquet file, then the manifest."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version

from crossrep import changelog, parquet, spaces
from crossrep.algebra import NEVER
from crossrep.errors import CrossrepError
from crossrep.snapshots import Manifest, Part, Store, new_id
from crossrep.spaces import Published
from crossrep.spec import Space
from crossrep.table import RecordTable

Progressed = Callable[[int], None]  # offsets read, of changelog.sizes()


def take(published: Published, bootstrap: str, store: Store, progressed: Progressed = lambda offsets: None) -> Manifest:
    """Write and publish a snapshot of all entities of a space. A failure leaves nothing behind; a kill leaves what nobody sees.

    Memory: the keys of one partition of one entity at a time.

    Raises:
        SpaceError, TopicError: the space is being rewound, or its topics are not those that were published.
        DataError: nothing can be written there.
        CrossrepError: the cluster does not answer, or a record is not one of this space.
    """
    space, id = published.space, new_id()
    entities = list(space.entities)
    changelog.refuse_changed(published, entities, bootstrap)
    store.begin(id)
    try:
        parts: dict[str, list[Part]] = {}
        times: dict[str, float | None] = {}
        for entity in entities:
            found = [_take_part(space, entity, number, bootstrap, store, id, progressed) for number in range(space.partitions)]
            parts[entity] = [part for part, _ in found]
            times[entity] = max((time for _, time in found if time > NEVER), default=None)
        changelog.refuse_changed(spaces.find(space.name, bootstrap), entities, bootstrap)
        manifest = Manifest(
            id=id,
            space=space.name,
            spec_hash=space.hash.hex(),
            spec=space.toml_dict,
            created=datetime.now(UTC),
            crossrep=version("crossrep"),
            stream_times=times,
            parts=parts,
        )
        store.publish(manifest)
    except BaseException:
        with suppress(CrossrepError):
            store.remove(id)
        raise
    return manifest


def _take_part(space: Space, entity: str, number: int, bootstrap: str, store: Store, id: str, progressed: Progressed) -> tuple[Part, float]:
    """One partition's file, and the newest event time of its rows."""
    state = changelog.read(space, entity, number, bootstrap, progressed)
    inside = f"{entity}/part-{number:05d}.parquet"
    try:
        store.fs.makedirs(store.path(id, entity), exist_ok=True)
        with store.fs.open(store.path(id, inside), "wb") as file:
            hashed = parquet.Hashed(file)
            parquet.write(hashed, state.table)
    except OSError as error:
        raise store.unusable("written", error) from error
    part = Part(
        path=inside,
        partition=number,
        first_offset=state.first,
        end_offset=state.end,
        source_offset=int(_greatest(state.table, "source_offset", -1)),
        rows=state.table.index.size,
        bytes=hashed.bytes,
        sha256=hashed.sha256,
    )
    return part, _greatest(state.table, "event_time", NEVER)


def _greatest(table: RecordTable, field: str, least: float) -> float:
    return float(table.records[field][table.index.slots()].max(initial=least))
