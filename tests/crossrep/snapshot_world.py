"""What the tests of snapshots share: records written as a fold worker does, and what a LocalView says of the same topic."""

from __future__ import annotations

from typing import Any

import numpy as np

from crossrep import LocalView, kafka
from crossrep.columnar.aggregates import Aggregates
from crossrep.columnar.records import RecordLayout
from crossrep.control import spaces
from crossrep.files import parquet as columns
from crossrep.keys import Keys
from crossrep.snapshots.store import Manifest, Store
from crossrep.snapshots.taking import take
from crossrep.spec import Space
from crossrep.writer import rows_of

Rows = dict[bytes, bytes]  # key -> record


def some_rows(space: Space, entity: str, ids: list[Any], seed: int, start: float = 1.6e9) -> tuple[Keys, np.ndarray[Any, Any]]:
    """Records of random events, three a key, at times that are no round numbers."""
    random, n = np.random.default_rng(seed), 3 * len(ids)
    layout, state = RecordLayout(space, entity), Aggregates(RecordLayout(space, entity), len(ids))
    sources = {name: random.normal(size=(n, dim)).astype("f4") for name, dim in space.sources.items()}
    events = np.where(random.random(n) < 0.2, "click", "impression")
    rows = rows_of(space, entity, ids * 3, events, start + random.random(n) * 1e6, sources)
    state.fold(np.tile(np.arange(len(ids), dtype=np.int32), 3), rows)
    assert state.layout.dtype == layout.dtype
    return Keys.of(ids), state.records(np.arange(len(ids), dtype=np.int32), seed)


class Changelog:
    """Writes records, and deletions, in transactions."""

    def __init__(self, space: Space, bootstrap: str):
        self.space = space
        self.producer = kafka.transactional_producer(bootstrap, f"test.{space.name}", 30.0)
        self.producer.init_transactions(30)

    def put(self, entity: str, ids: list[Any], seed: int = 0, abort: bool = False, start: float = 1.6e9) -> None:
        keys, records = some_rows(self.space, entity, ids, seed, start)
        self.send(entity, [(key, record.tobytes()) for key, record in zip(keys.tolist(), records)], abort)

    def delete(self, entity: str, ids: list[Any]) -> None:
        self.send(entity, [(key, None) for key in Keys.of(ids).tolist()])

    def send(self, entity: str, records: list[tuple[bytes, bytes | None]], abort: bool = False) -> None:
        self.producer.begin_transaction()
        self.produce(entity, records)
        if abort:
            self.producer.flush(30)
            self.producer.abort_transaction(30)
        else:
            self.producer.commit_transaction(30)

    def produce(self, entity: str, records: list[tuple[bytes, bytes | None]]) -> None:
        partitions = Keys.of([key for key, _ in records]).partitions(self.space.partitions).tolist()
        for (key, value), partition in zip(records, partitions):
            self.producer.produce(self.space.representations_topic(entity), value, key, partition=partition)


def snapshot(space: Space, bootstrap: str, store: Store) -> Manifest:
    return take(spaces.find(space.name, bootstrap), bootstrap, store)


def rows(store: Store, manifest: Manifest, entity: str, partition: int | None = None) -> Rows:
    """What the files hold."""
    layout, found = RecordLayout(manifest.declared(), entity), {}
    for part in manifest.parts[entity]:
        if partition in (None, part.partition):
            with store.fs.open(store.path(manifest.id, part.path)) as file:
                for keys, records in columns.read(file, layout):
                    found |= dict(zip(keys.tolist(), (record.tobytes() for record in records)))
    return found


def seen(bootstrap: str, space: Space, entity: str) -> Rows:
    """What a LocalView holds once it has read everything."""
    with LocalView(entity, space.name, bootstrap) as view:
        view.wait(60)
        slots = view._live.table.index.slots()
        return dict(zip(view._live.table.index.keys(slots).tolist(), (record.tobytes() for record in view._live.table.records[slots])))


def replayed(bootstrap: str, space: Space, entity: str, partition: int, end: int) -> Rows:
    """What a read_committed reader gets who stops at an offset: in plain Python."""
    found: Rows = {}
    for message in kafka.messages(bootstrap, space.representations_topic(entity), {partition: (0, end)}):
        if message.value() is None:
            found.pop(message.key(), None)
        else:
            found[message.key()] = message.value()
    return found
