"""Two spaces side by side: which keys each covers, how fresh and how well supported they are, and whether they agree on who is like whom.

Vectors of two spaces have nothing in common, not even their length. Their neighbourhoods do: if both spaces are any good, a key's nearest
keys in one are mostly its nearest keys in the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossrep.columnar import algebra
from crossrep.control import spaces
from crossrep.control.spaces import Published
from crossrep.spec import Space
from crossrep.views import changelog

K = 10  # neighbours
SAMPLE = 200  # keys whose neighbours are compared
AT_ONCE = 16  # of them; each takes four bytes a key of the entity
QUANTILES = (0.1, 0.5, 0.9)

Progressed = Callable[[int], None]  # offsets read, of `changelog.sizes`
Weights = tuple[float, ...] | None  # at QUANTILES; None: a `latest` column, or none touched


@dataclass(frozen=True)
class Side:
    """An entity in one of the two."""

    keys: int
    events: int  # folded into the keys that there are
    stream_time: float | None  # the newest event, seconds since 1970


@dataclass(frozen=True)
class ColumnPair:
    """A column that both have."""

    name: str
    covered: tuple[int, int]  # keys that it has been touched for
    weights: tuple[Weights, Weights]  # that are left, decayed to one time: the later of the two stream times
    overlap: float | None  # mean share of a key's K nearest that are the same; None: no vectors, or fewer than three keys in both
    by_chance: float | None  # what neighbours drawn at random would have
    sampled: int


@dataclass(frozen=True)
class EntityPair:
    """An entity that both have."""

    entity: str
    a: Side
    b: Side
    both: int  # keys
    columns: list[ColumnPair]

    @property
    def coverage(self) -> float:
        """The share of the keys of a that b has."""
        return self.both / self.a.keys if self.a.keys else 1.0


def compare(
    a: Published, b: Published, bootstrap: str, sample: int = SAMPLE, seed: int = 0, progressed: Progressed = lambda offsets: None
) -> list[EntityPair]:
    """Every entity that both have. Reads both changelogs as snapshots do.

    Memory: the records of one entity, in both spaces, twice; and twice the vectors of one column.

    Args:
        sample: of shared keys, to compare neighbours; 0: do not.
        seed: of the sample.

    Raises:
        SpaceError, TopicError: one of them is being rewound, or its topics are not those that were published.
        CrossrepError: the cluster does not answer.
    """
    entities = shared(a.space, b.space)
    for published in (a, b):
        spaces.refuse_retiring(published)
        changelog.refuse_changed(published, entities, bootstrap)
    return [_pair(entity, a.space, b.space, bootstrap, sample, seed, progressed) for entity in entities]


def shared(a: Space, b: Space) -> list[str]:
    """Entities that both have."""
    return [entity for entity in a.entities if entity in b.entities]


def missing(a: Space, b: Space) -> list[str]:
    """What readers of a would look for in vain in b, or find changed."""
    found = []
    for name, entity in a.entities.items():
        if name not in b.entities:
            found.append(f"it has no entity {name}")
            continue
        columns = b.entities[name].columns
        found += [f"it has no column {name}.{column}" for column in entity.columns if column not in columns]
        found += [
            f"{name}.{column} has {columns[column].dim} dims, not {declared.dim}"
            for column, declared in entity.columns.items()
            if column in columns and columns[column].dim != declared.dim
        ]
    return found


def as_json(pairs: list[EntityPair]) -> list[dict[str, Any]]:
    return [asdict(pair) | {"coverage": pair.coverage} for pair in pairs]


def _pair(entity: str, a: Space, b: Space, bootstrap: str, sample: int, seed: int, progressed: Progressed) -> EntityPair:
    (names_a, in_a), (names_b, in_b) = (_read(space, entity, bootstrap, progressed) for space in (a, b))
    places = {name: row for row, name in enumerate(names_b)}
    rows = np.array([(row, places[name]) for row, name in enumerate(names_a) if name in places], np.int64).reshape(-1, 2)
    sides = [Side(len(r), int(r["count"].sum()), float(r["event_time"].max()) if len(r) else None) for r in (in_a, in_b)]
    at = max((side.stream_time for side in sides if side.stream_time is not None), default=0.0)
    columns = []
    for name, declared in a.entities[entity].columns.items():
        if (other := b.entities[entity].columns.get(name)) is None:
            continue
        touched = [r[f"{name}_time"] > algebra.NEVER for r in (in_a, in_b)]
        weights = [_weights(r[t], name, column.half_life, at) for r, t, column in ((in_a, touched[0], declared), (in_b, touched[1], other))]
        chosen = rows[touched[0][rows[:, 0]] & touched[1][rows[:, 1]]]
        overlap, sampled, k = None, min(sample, len(chosen)), min(K, len(chosen) - 1)
        if declared.dim and other.dim and k > 1 and sampled:
            picked = np.random.default_rng(seed).choice(len(chosen), sampled, replace=False)
            near = [_nearest(records[name][chosen[:, side]], picked, k) for side, records in ((0, in_a), (1, in_b))]
            overlap = float(np.mean([len(set(x) & set(y)) / k for x, y in zip(near[0].tolist(), near[1].tolist())]))
        covered = (int(touched[0].sum()), int(touched[1].sum()))
        by_chance = None if overlap is None else k / (len(chosen) - 1)
        columns.append(ColumnPair(name, covered, (weights[0], weights[1]), overlap, by_chance, 0 if overlap is None else sampled))
    return EntityPair(entity, sides[0], sides[1], len(rows), columns)


def _read(space: Space, entity: str, bootstrap: str, progressed: Progressed) -> tuple[list[bytes], NDArray[np.void]]:
    """All keys and their records."""
    names: list[bytes] = []
    parts = []
    for number in range(space.partitions):
        table = changelog.read(space, entity, number, bootstrap, progressed).table
        slots = table.index.slots()
        names += table.index.keys(slots).tolist()
        parts.append(table.records[slots])
    return names, np.concatenate(parts)


def _weights(records: NDArray[np.void], name: str, half_life: float | None, at: float) -> Weights:
    if half_life is None or not len(records):
        return None
    left = algebra.decay(records[f"{name}_weight"], at - records[f"{name}_time"], half_life)
    return tuple(float(value) for value in np.quantile(left, QUANTILES))


def _nearest(vectors: NDArray[np.float32], picked: NDArray[np.int64], k: int) -> NDArray[np.int64]:
    """The rows [len(picked), k] of greatest cosine with the picked rows, themselves left out."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    units = np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 0)
    found = []
    for first in range(0, len(picked), AT_ONCE):
        some = picked[first : first + AT_ONCE]
        cosines = units[some] @ units.T
        cosines[np.arange(len(some)), some] = -np.inf
        found.append(np.argpartition(-cosines, k - 1, axis=1)[:, :k])
    return np.concatenate(found)
