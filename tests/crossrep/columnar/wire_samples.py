"""A small space with every kind of column, and random rows for it. Shared by the tests of the wire formats and the aggregates."""

from __future__ import annotations

import numpy as np

from crossrep.columnar import frames
from crossrep.columnar.aggregates import combine
from crossrep.columnar.rows import ColumnRows, Rows
from crossrep.keys import Keys
from crossrep.spec import Space

TOML = """
name = "test-1"
partitions = 4
vectors = "VECTORS"

[weights]
impression = 1.0
click = 4.0

[entities.user.columns.cr]
source = "cr"
dim = 4
aggregate = "decayed_mean"
half_life = "3d"

[entities.user.columns.fast]
source = "cr"
dim = 4
aggregate = "decayed_mean"
half_life = "1m"

[entities.user.columns.clicks]
source = "cr"
dim = 4
aggregate = "decayed_mean"
half_life = "3d"
events = ["click"]

[entities.user.columns.rate]
source = "cr"
dim = 0
aggregate = "decayed_mean"
half_life = "6h"
events = ["click"]

[entities.user.columns.ur]
source = "ur"
dim = 3
aggregate = "latest"

[entities.item.columns.cr]
source = "cr"
dim = 4
aggregate = "decayed_mean"
half_life = "7d"
"""


def space(vectors: str = "float32") -> Space:
    return Space.parse(TOML.replace("VECTORS", vectors))


def raw_rows(
    declared: Space, entity: str, ids: list[bytes], rng: np.random.Generator, start: float = 1.7e9, spread: float = 86400.0
) -> Rows:
    """One row an id, as an inference worker would write them: vectors of one source are one array, clicks are present in some rows."""
    n = len(ids)
    times = start + np.round(rng.random(n) * spread, rng.integers(0, 4))
    click = rng.random(n) < 0.3
    weights = np.where(click, declared.weights["click"], declared.weights["impression"])
    sources = {source: rng.standard_normal((n, dim)).astype(np.float32) for source, dim in declared.sources.items()}
    columns = {}
    for name, column in declared.entities[entity].columns.items():
        vectors = sources[column.source] if column.dim else np.empty((n, 0), np.float32)
        columns[name] = ColumnRows(vectors, weights, times, click if column.events else np.ones(n, np.bool_))
    return Rows(entity, Keys.of(ids), times, np.ones(n, np.int64), columns)


SPACES = {name: space(name) for name in ("float16", "float32")}
SPACE = SPACES["float32"]


def rows_of(ids: list[bytes], seed: int, entity: str = "user", combined: bool = False) -> Rows:
    rows = raw_rows(SPACE, entity, ids, np.random.default_rng(seed))
    return combine(SPACE, rows) if combined else rows


def one_frame(seed: int = 1, n: int = 6, combined: bool = False, dtype: str = "float32") -> bytes:
    """A frame of n rows of one partition."""
    ids = [key for key in (b"k%d" % i for i in range(100)) if Keys.of([key]).partitions(4)[0] == 2][:n]
    ((_, value),) = frames.encode(SPACES[dtype], rows_of(ids, seed, combined=combined))
    return value
