"""What a replay reads of Parquet files of samples: one row an event, with the upstream model's outputs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossrep.columnar import algebra
from crossrep.columnar.algebra import NEVER
from crossrep.columnar.rows import Rows
from crossrep.control.binding import Model
from crossrep.errors import DataError
from crossrep.extras import extra
from crossrep.files import places
from crossrep.files.parquet import keys_of
from crossrep.keys import Keys
from crossrep.rollout.replay_tables import Source, Task
from crossrep.spec import Space
from crossrep.writer import rounded, rows_of_kinds

with extra("analytics"):
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq


MODEL = b"crossrep.model"  # of a file's metadata: JSON of the Model that made its vectors, as `crossrep represent` says


def of_files(url: str, space: Space) -> Source:
    """Parquet files with a column for every source of the space, `event`, `event_time`, and one for the ids of every entity.

    Args:
        url: a file, a folder, or a pattern such as s3://bucket/samples/*.parquet.

    Raises:
        DataError: there are none, a column is missing, or they say that they are of several models; names it.
    """
    fs, paths = paths_of(url)
    fields = [*(space.key_field(entity) for entity in space.entities), "event", "event_time", *space.sources]
    tasks: list[Task] = []
    rows = 0
    models: dict[str, Model] = {}
    for path in paths:
        try:
            with opened(fs, path) as file:
                metadata, schema = pq.ParquetFile(file).metadata, pq.read_schema(file)
            if MODEL in (schema.metadata or {}):
                model = Model(**json.loads(schema.metadata[MODEL]))
                models[model.digest] = model
        except (OSError, ValueError, TypeError, pa.ArrowException) as error:
            raise DataError(f"{path} cannot be read: {error}") from None
        if missing := [field for field in fields if field not in schema.names]:
            raise DataError(f"{path} has no column {', '.join(missing)}; space {space.name!r} needs {', '.join(fields)}")
        tasks += [partial(_row_group, fs, path, group, space, fields) for group in range(metadata.num_row_groups)]
        rows += metadata.num_rows * len(space.entities)
    if len(models) > 1:
        labels = ", ".join(sorted(model.label for model in models.values()))
        raise DataError(f"{url} holds vectors of several models ({labels}), which are never averaged: replay each into a space of its own")
    return Source(tasks, rows, next(iter(models.values()), None))


def paths_of(url: str) -> tuple[Any, list[str]]:
    """The Parquet files of a file, folder or pattern. Raises DataError: there are none."""
    fs, root = places.connect(url)
    try:
        paths = sorted(fs.glob(root)) if "*" in root else fs.find(root)
    except OSError as error:
        raise places.unusable(url, "listed", error) from error
    paths = [path for path in paths if path.endswith(".parquet")]
    if not paths:
        raise DataError(f"no Parquet files in {url}")
    return fs, paths


def opened(fs: Any, path: str) -> Any:
    return pa.memory_map(path) if places.is_local(fs) else fs.open(path, "rb")


def _row_group(fs: Any, path: str, group: int, space: Space, fields: list[str]) -> Iterator[tuple[Rows, float]]:
    place = f"row group {group} of {path}"
    try:
        with opened(fs, path) as file:
            table = pq.ParquetFile(file, read_dictionary=["event"]).read_row_group(group, columns=fields, use_threads=False)
        (batch,) = table.combine_chunks().to_batches() or [None]
        if batch is None:
            return
        times = seconds(batch.column("event_time"))
        wrong = algebra.first_outside(times, 0.0, sys.float_info.max)
        if wrong >= 0:
            raise ValueError(f"event_time of row {wrong} is {times[wrong]}: before 1970, or null")
        kinds = batch.column("event").dictionary.to_pylist()
        codes = batch.column("event").indices.to_numpy()
        sources = {source: _vectors(batch.column(source), dim, space.vectors) for source, dim in space.sources.items()}
        for entity in space.entities:
            ids = batch.column(space.key_field(entity)).cast(pa.string())
            named = np.flatnonzero(pc.fill_null(pc.not_equal(ids, ""), False).to_numpy(zero_copy_only=False))
            keys = keys_column(ids if len(named) == len(ids) else ids.take(pa.array(named)))
            if len(named) == len(ids):
                yield rows_of_kinds(space, entity, keys, kinds, codes, times, sources), NEVER
            elif len(named):  # an event without an id does not count for the entity
                chosen = {source: vectors[named] for source, vectors in sources.items()}
                yield rows_of_kinds(space, entity, keys, kinds, codes[named], times[named], chosen), NEVER
    except (OSError, ValueError, TypeError, pa.ArrowException) as error:
        raise DataError(f"{place} cannot be replayed: {error}") from None


def seconds(column: Any) -> NDArray[np.float64]:
    if pa.types.is_timestamp(column.type):
        units = {"s": 1, "ms": 1e3, "us": 1e6, "ns": 1e9}
        since: NDArray[np.float64] = column.cast(pa.int64()).to_numpy(zero_copy_only=False) / units[column.type.unit]
        return since
    if pa.types.is_floating(column.type):
        return np.asarray(column.cast(pa.float64()).to_numpy(zero_copy_only=False))
    raise ValueError(f"event_time is {column.type}; it must be a timestamp, or seconds since 1970 as a float")


def _vectors(column: Any, dim: int, dtype: str) -> NDArray[np.float32]:
    flat = column.flatten()
    if column.null_count or flat.null_count or len(flat) != len(column) * dim:
        raise ValueError(f"a source must hold {dim} numbers in every row")
    vectors = rounded(flat.to_numpy().reshape(-1, dim), dtype).astype(np.float32, copy=False)
    if not np.isfinite(vectors).all():
        raise ValueError(f"a vector is not finite in {dtype}")
    return vectors


def keys_column(ids: Any) -> Keys:
    """A column of strings or numbers as keys. Raises ValueError: one is empty, null or too long."""
    keys = keys_of(ids.cast(pa.string()), pa.nulls(len(ids), pa.binary()))
    if not keys.well_formed():
        raise ValueError("an id is empty, or has over 64 bytes")
    return keys
