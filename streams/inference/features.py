"""Features of users and items, followed from their compacted topics and encoded once an update, ready for a model's batch."""

from __future__ import annotations

import logging
import threading

import numpy as np
from numpy.typing import NDArray

from crossrep.errors import BadRecord
from crossrep.keys import MISSING, KeyIndex, Keys
from crossrep.spec import MAX_KEY_BYTES
from crossrep.views.follow import Follower
from models.upstream import UpstreamModel
from schemas import codec

log = logging.getLogger(__name__)


class FeatureView:
    """The encoded features of every user or item.

    A feature record that cannot be read is skipped: what was known before stays, and `skipped` counts it. A tombstone deletes the id that
    is its message key: a worker that starts once compaction has removed the record must not know less than one that runs.

    Args:
        kind: "user" or "item".
    """

    def __init__(self, kind: str, topic: str, model: UpstreamModel, bootstrap: str):
        self.kind, self.skipped = kind, 0
        self._model = model
        self._codec = codec(f"{kind}_features")
        self._lock = threading.Lock()
        self._index = KeyIndex(1024)
        self._table = np.zeros((1024, len(model.features[kind])), np.int32)
        self._follower = Follower(topic, self._apply, bootstrap)

    def rows(self, keys: Keys) -> NDArray[np.int32]:
        """Encoded features of n ids, int32 [n, F]; an id never seen gets what the model makes of an unknown one."""
        self._follower.check()
        with self._lock:
            slots = self._index.find(keys)
            rows = self._table[np.maximum(slots, 0)]
        unknown = np.flatnonzero(slots == MISSING)
        if len(unknown):
            ids = [key.decode() for key in keys.take(unknown).tolist()]
            rows[unknown] = self._model.encode(self.kind, ids, [{}] * len(ids))
        return rows

    def __len__(self) -> int:
        return self._index.size

    @property
    def caught_up(self) -> bool:
        return self._follower.caught_up

    def wait(self, timeout: float | None = None) -> None:
        """Block until everything published so far is here. Raises TimeoutError."""
        self._follower.wait(timeout)

    def close(self) -> None:
        self._follower.close()

    def _apply(self, names: list[bytes], values: list[bytes | None]) -> None:
        newest: dict[bytes, tuple[str, dict[str, object]] | None] = {}  # None: deleted
        for name, value in zip(names, values):
            if value is None:
                newest[name] = None
                continue
            try:
                record = self._codec.decode(value)
                key = record[f"{self.kind}_id"].encode()
                Keys.of([key])
                newest[key] = (record[f"{self.kind}_id"], record["values"])
            except (BadRecord, ValueError) as error:
                self.skipped += 1
                log.warning("%s features under key %r are skipped: %s", self.kind, name, error)
        deleted = Keys.of([name for name, features in newest.items() if features is None and name and len(name) <= MAX_KEY_BYTES])
        with self._lock:
            slots = self._index.find(deleted)
            self._index.remove(slots[slots != MISSING])
        known = {key: features for key, features in newest.items() if features is not None}
        if not known:
            return
        encoded = self._model.encode(self.kind, [id for id, _ in known.values()], [row for _, row in known.values()])
        keys = Keys.of(list(known))
        with self._lock:
            slots = self._index.find(keys)
            wanted = self._index.size + int(np.count_nonzero(slots == MISSING))
            if wanted > self._index.capacity:
                capacity = max(2 * self._index.capacity, wanted)
                self._index.grow(capacity)
                self._table = np.concatenate([self._table, np.zeros((capacity - len(self._table), self._table.shape[1]), np.int32)])
            self._index.insert(keys, slots)
            self._table[slots] = encoded
