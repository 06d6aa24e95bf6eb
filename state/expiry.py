"""Finding expired keys in the store, a few at each flush: the slab knows only the hot ones.

A key is expired when its newest event is older than its partition's stream time minus `expire_after`. That is decided when a frame is
folded (`Slab.fold`), so what a key's state is never depends on when the sweep comes by; the sweep only makes expired keys disappear for
readers and from the disk.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from crossrep.columnar.algebra import NEVER
from state.store import Store

KEYS_A_LOOK = 2_000  # 2 ms: a look is part of a flush


class Sweep:
    """One entity's pass over one store, and when the next one is worth while.

    Args:
        expire_after: seconds of event time.
    """

    def __init__(self, entity: str, expire_after: float):
        self.entity = entity
        self.expire_after = expire_after
        self.found: list[bytes] = []  # expired as the store has them; the slab may know better
        self._oldest = NEVER  # no stored key is older; NEVER: not known
        self._next: bytes | None = None  # where the pass goes on; None: there is none under way
        self._oldest_of_pass = np.inf

    @property
    def under_way(self) -> bool:
        return bool(self.found) or self._next is not None

    def wrote(self, event_times: NDArray[np.float64]) -> None:
        """Told of every record that is written."""
        oldest = float(event_times.min(initial=np.inf))
        self._oldest, self._oldest_of_pass = min(self._oldest, oldest), min(self._oldest_of_pass, oldest)

    def look(self, store: Store, stream_time: float) -> None:
        """Go on with the pass, or begin one if any key may have expired. Blocks for milliseconds."""
        before = stream_time - self.expire_after
        if self._next is None:
            if before <= self._oldest:
                return
            self._next, self._oldest_of_pass = b"", np.inf
        keys, times, self._next = store.scan(self.entity, self._next, KEYS_A_LOOK)
        old = times < before
        self.found = [keys[i] for i in np.flatnonzero(old).tolist()]
        self._oldest_of_pass = min(self._oldest_of_pass, float(times[~old].min(initial=np.inf)))
        if self._next is None:
            self._oldest = self._oldest_of_pass
