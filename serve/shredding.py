"""Deleted keys leave a replica's files, in the background: RocksDB by itself keeps their records until it happens to compact them."""

from __future__ import annotations

import logging
import threading
import time

from state.store import Store

log = logging.getLogger(__name__)

SHARE = 0.02  # of the time it may take: where keys expire all the time, a large store would be rewritten without end
KEPT = 10_000  # names of keys to remember


class Shredder:
    """Told of every deletion of one entity, it shreds at once, and then after fifty times as long as that took.

    `pending` is kept in the store's meta: after a restart nobody knows which keys they were, and all of the store is compacted.
    Expired and forgotten keys are treated alike: a tombstone does not say which it is.
    """

    def __init__(self, store: Store, entity: str):
        self._store, self._entity = store, entity
        self._deleted: set[bytes] | None = None if store.meta.deletions else set()  # None: not known which
        self._thread: threading.Thread | None = None
        self._failed = False
        self._due = 0.0

    @property
    def pending(self) -> bool:
        """May records of deleted keys be in the files?"""
        return self._deleted != set() or self._failed or self._running

    @property
    def _running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def deleted(self, keys: list[bytes]) -> None:
        """In the store already."""
        if self._deleted is not None:
            self._deleted.update(keys)
            if len(self._deleted) > KEPT:
                self._deleted = None

    def look(self) -> None:
        """Begin if it is time to. Does not block."""
        if self._running or time.monotonic() < self._due or not self.pending:
            return
        keys = None if self._deleted is None or self._failed else sorted(self._deleted)
        self._deleted, self._failed = set(), False
        self._thread = threading.Thread(target=self._shred, args=(keys,), name=f"shred-{self._entity}", daemon=True)
        self._thread.start()

    def _shred(self, keys: list[bytes] | None) -> None:
        started = time.monotonic()
        try:
            self._store.shred(self._entity, keys)
        except Exception:  # rocksdict raises plain Exceptions
            self._failed = True
            log.exception("deleted keys of %s could not be taken out of the files; tried again later", self._entity)
        took = time.monotonic() - started
        self._due = started + max(took / SHARE, 1.0)

    def close(self, timeout: float) -> bool:
        """Wait for what is under way, seconds at most. Returns whether nothing is."""
        if self._thread is not None:
            self._thread.join(timeout)
        return not self._running
