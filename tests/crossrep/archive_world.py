"""An archive made without Kafka: files as the archiver writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossrep.archive import columns
from crossrep.archive.columns import Frame
from crossrep.archive.store import About, Archive
from crossrep.columnar import frames
from crossrep.columnar.aggregates import combine
from crossrep.columnar.rows import Rows
from crossrep.spec import Space
from crossrep.writer import rows_of

HOUR = 1.7e9 // 3600 * 3600  # append times begin here, seconds since 1970

Samples = dict[str, Any]  # user_id, item_id, event, event_time, and an array for every source


def samples(space: Space, n: int, seed: int = 0, keys: int = 40) -> Samples:
    random = np.random.default_rng(seed)
    return {
        "user_id": [f"u{i}" for i in random.integers(0, keys, n)],
        "item_id": [f"i{i}" for i in random.zipf(1.5, n) % keys],
        "event": np.where(random.random(n) < 0.3, "click", "impression"),
        "event_time": np.round(1.6e9 + np.sort(random.random(n)) * 1e5 - random.exponential(3000, n), 3),
        **{name: random.normal(size=(n, dim)).astype(np.float16) for name, dim in space.sources.items()},
    }


def rows(space: Space, entity: str, given: Samples, chosen: NDArray[np.int64] | slice = slice(None)) -> Rows:
    ids = np.array(given[f"{entity}_id"])[chosen].tolist()
    sources = {name: given[name][chosen] for name in space.sources}
    return rows_of(space, entity, ids, given["event"][chosen], given["event_time"][chosen], sources)


def store_of(space: Space, folder: Path | str) -> Archive:
    store = Archive(str(folder), space.name)
    store.begin(About(space=space.name, spec_hash=space.hash.hex(), spec=space.toml_dict, topic_id="none"))
    return store


def put(
    store: Archive, space: Space, given: Samples, first: int = 0, batch: int = 50, combined: bool = False, hour: float = HOUR
) -> list[Frame]:
    """Archive samples as frames of small batches: a file for every partition and entity, from offset `first` on. Returns the frames."""
    written = []
    for entity in space.entities:
        offsets = dict.fromkeys(range(space.partitions), first)
        found: dict[int, list[Frame]] = {number: [] for number in offsets}
        for start in range(0, len(given["event"]), batch):
            one = rows(space, entity, given, slice(start, start + batch))
            for number, value in frames.encode(space, combine(space, one) if combined else one):
                decoded = frames.decode(space, value, partition=number)
                found[number].append(Frame(decoded, frames.vectors_as_sent(value), offsets[number], hour, None))
                offsets[number] += 1
        for number, of in found.items():
            store.put(store.path(entity, number, first, max(offsets.values()), hour), columns.encoded(space, entity, number, of))
            written += of
    return written
