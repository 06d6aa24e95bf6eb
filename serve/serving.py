"""What a process serves: the replicas of one space, and while it switches those of the next one beside them."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from pathlib import Path
from typing import Any

from crossrep.columnar.records import RecordLayout
from crossrep.control import spaces
from crossrep.errors import CrossrepError
from crossrep.spec import Space
from crossrep.views.switch import Switcher, aliased
from serve.options import Options
from serve.recent import slots_within
from serve.replica import Place, Replica
from serve.status import Status
from state.store import Memory, Room

log = logging.getLogger(__name__)

SEARCH = 15.0  # seconds that an answer takes at most, once its question has arrived
_OURS = "replica-of-an-alias"  # file that marks a folder as one that we made


class Serving:
    """One space: a replica of each entity. A request enters, asks, and leaves; what is closed waits for those that are inside."""

    def __init__(self, space: Space, bootstrap: str, options: Options, folder: Path):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CrossrepError(f"folder {folder}: {error.strerror}. Choose another: --data") from None
        self.space, self.hash = space, space.hash.hex()
        layouts = {entity: RecordLayout(space, entity) for entity in space.entities}
        slots = slots_within(list(layouts.values()), options.memory_mb << 20)
        place = Place(folder, Memory.of(options.rocksdb_mb << 20), Room(folder, options.min_free_mb << 20))
        self.replicas = {entity: Replica(space, entity, bootstrap, place, slots) for entity in space.entities}
        self.weighted = {e: {n for n, c in layout.columns.items() if c.half_life is not None} for e, layout in layouts.items()}
        self.status = Status(space, bootstrap, self.replicas, folder, options.workers)
        self._lock = threading.Lock()
        self._inside, self._closed = 0, False
        self._patience = options.client_timeout + SEARCH

    @property
    def caught_up(self) -> bool:
        """Have all? Raises CrossrepError if one has ended."""
        return all(replica.caught_up for replica in self.replicas.values())

    def check(self) -> None:
        """Raise CrossrepError if a replica has ended."""
        for replica in self.replicas.values():
            replica.check()

    def enter(self) -> bool:
        """False: it is closed, or about to be."""
        with self._lock:
            self._inside += not self._closed
            return not self._closed

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1

    def close(self, wait: float | None = None) -> None:
        """Let nobody in, wait until all have left (so many seconds; default: as many as a request may take), close the disks."""
        with self._lock:
            self._closed = True
        deadline = time.monotonic() + (self._patience if wait is None else wait)
        while self._inside and time.monotonic() < deadline:
            time.sleep(0.01)
        for replica in self.replicas.values():
            replica.close()


class Served:
    """The space that is served, or the one an alias stands for: all its entities are replaced in one step.

    Raises:
        SpaceError: there is no such space or alias.
        CrossrepError: the folder cannot be used.
    """

    def __init__(self, name: str, bootstrap: str, options: Options):
        self.name = name
        self._bootstrap, self._options = bootstrap, options
        space, follows = aliased(name, bootstrap)
        self._switcher: Switcher[Serving] | None = None
        self.now = self._of_alias(space) if follows else Serving(space, bootstrap, options, options.folder)
        if follows:
            self._switcher = Switcher(name, bootstrap, lambda: self.now, self._of_alias, self._switch)

    def enter(self) -> Serving:
        """For one request, which calls `leave` in the end."""
        while not (now := self.now).enter():
            pass
        return now

    @property
    def alias(self) -> dict[str, Any] | None:
        """What it follows; `loading` is the space that was promoted and is being read, `problem` why it cannot be."""
        if self._switcher is None:
            return None
        return {"name": self.name, "loading": self._switcher.loading, "problem": self._switcher.problem}

    def close(self) -> None:
        if self._switcher is not None:
            self._switcher.close()
        self.now.close(1.0)

    def _of_alias(self, space: Space) -> Serving:
        """The former's disk is kept, so that a rollback is quick; a retired space's is not."""
        folder, kept = self._options.folder, set(spaces.read_all(self._bootstrap))
        if self._switcher is not None:
            kept.add(self.now.space.name)
        for ours in folder.glob(f"*/{_OURS}"):
            if ours.parent.name not in kept:
                log.info("space %s is retired: %s is removed", ours.parent.name, ours.parent)
                shutil.rmtree(ours.parent, ignore_errors=True)
        serving = Serving(space, self._bootstrap, self._options, folder / space.name)
        (folder / space.name / _OURS).touch()
        return serving

    def _switch(self, fresh: Serving) -> Serving:
        former, self.now = self.now, fresh
        return former
