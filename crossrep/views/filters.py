"""Which of a space's keys a view holds."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from numpy.typing import NDArray

from crossrep.errors import SpaceError
from crossrep.keys import Id, Keys
from crossrep.spec import Space


def chosen_of(
    space: Space, partitions: Collection[int] | None, ids: Sequence[Id] | NDArray[Any] | None
) -> tuple[set[int] | None, set[bytes] | None]:
    """The partitions to follow and the keys to keep; None: all."""
    if partitions is not None and ids is not None:
        raise ValueError("partitions and ids are both given: ids alone decide which partitions are read")
    if ids is not None:
        keys = Keys.of(ids)
        chosen, only = set(keys.partitions(space.partitions).tolist()), set(keys.tolist())
    elif partitions is not None:
        chosen, only = set(partitions), None
    else:
        return None, None
    if not chosen:
        raise ValueError(f"{'partitions' if ids is None else 'ids'} is empty: nothing would be read. Leave it out to read everything")
    for number in chosen:
        if number not in range(space.partitions):
            raise SpaceError(f"space {space.name!r} has partitions 0 to {space.partitions - 1}; {number!r} is none of them")
    return chosen, only
