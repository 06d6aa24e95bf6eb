"""Vectors as they will travel: in the space's type, and what does not fit in it refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from confluent_kafka import Message
from numpy.typing import NDArray

from crossrep.columnar.algebra import widen
from crossrep.errors import BadFrame, BadRecord
from crossrep.spec import Space


def narrowed(
    space: Space, messages: Sequence[Message], sources: Mapping[str, NDArray[np.float32]]
) -> tuple[dict[str, NDArray[np.floating]], NDArray[np.int64], list[tuple[Message, BadRecord]]]:
    """The sources of n messages in the space's vector type, the rows that are finite there, and a refusal for each that is not."""
    with np.errstate(over="ignore", invalid="ignore"):
        narrow = {name: np.asarray(array).astype(space.vectors, copy=False) for name, array in sources.items()}
    good = np.ones(len(messages), np.bool_)
    refused: list[tuple[Message, BadRecord]] = []
    for name, array in narrow.items():
        if _all_finite(array):
            continue
        for row in np.flatnonzero(good & ~np.isfinite(array).all(axis=1)).tolist():
            good[row] = False
            refused.append((messages[row], BadFrame("vector", f"{name} is not finite in {space.vectors}")))
    return narrow, np.flatnonzero(good), refused


def _all_finite(array: NDArray[np.floating]) -> bool:
    return widen(array)[1] if array.dtype == np.float16 else bool(np.isfinite(array).all())
