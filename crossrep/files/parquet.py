"""Records as Parquet and back, without losing a bit.

Columns for people: `id`, `count`, `event_time`, and per column of the spec its vector, weight and time; null where no event has touched
the column. Timestamps are rounded to microseconds, so exact seconds lie beside them, and a key that is no UTF-8 lies beside its id: columns
whose names begin with an underscore, which no column of a spec can. docs/snapshots.md lists them all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossrep.columnar.algebra import NEVER
from crossrep.columnar.records import RecordLayout
from crossrep.errors import DataError
from crossrep.extras import extra
from crossrep.keys import Keys

with extra("analytics"):
    import pyarrow as pa
    import pyarrow.parquet as pq

ROWS = 65_536  # rows a row group

_TIME = pa.timestamp("us", "UTC")


def id_column(columns: Container[str]) -> str:
    """The name of the column of ids: `id`, or `id_` where the spec has a column `id`."""
    name = "id"
    while name in columns:
        name += "_"
    return name


def schema(layout: RecordLayout) -> Any:
    """The Arrow schema of an entity's files, in the order of the file."""
    fields = [(id_column(layout.columns), pa.string()), ("count", pa.int64()), ("event_time", _TIME)]
    exact = ["_event_time"]
    for name, column in layout.columns.items():
        if column.dim:
            fields.append((name, pa.list_(pa.float32(), column.dim)))
        if column.half_life is not None:
            fields.append((f"{name}_weight", pa.float64()))
        fields.append((f"{name}_time", _TIME))
        exact.append(f"_{name}_time")
    fields += [("source_offset", pa.int64()), ("_key", pa.binary()), *((name, pa.float64()) for name in exact)]
    return pa.schema(fields)


def to_arrow(layout: RecordLayout, keys: Keys, records: NDArray[np.void]) -> Any:
    """n records of n keys as an Arrow record batch."""
    ids, odd = ids_of(keys)
    columns = [ids, pa.array(records["count"].astype(np.int64)), timestamps(records["event_time"])]
    exact = [pa.array(records["event_time"].copy())]
    for name, column in layout.columns.items():
        times = records[f"{name}_time"].copy()
        if column.dim:
            flat = pa.array(np.ascontiguousarray(records[name]).reshape(-1))
            columns.append(pa.FixedSizeListArray.from_arrays(flat, column.dim, mask=pa.array(times == NEVER)))
        if column.half_life is not None:
            columns.append(pa.array(records[f"{name}_weight"].copy()))
        columns.append(timestamps(times))
        exact.append(pa.array(times))
    columns += [pa.array(records["source_offset"].astype(np.int64)), odd, *exact]
    return pa.record_batch(columns, schema(layout))


def from_arrow(layout: RecordLayout, batch: Any) -> tuple[Keys, NDArray[np.void]]:
    """The keys and records that `to_arrow` was given.

    Raises:
        DataError: the columns are not those of this entity.
    """
    if batch.schema.names != schema(layout).names:
        raise DataError(f"columns {batch.schema.names}, not {schema(layout).names}")
    records = layout.empty(len(batch))
    for name in ("count", "source_offset"):
        records[name] = batch.column(name).to_numpy()
    records["event_time"] = batch.column("_event_time").to_numpy()
    for name, column in layout.columns.items():
        records[f"{name}_time"] = batch.column(f"_{name}_time").to_numpy()
        if column.half_life is not None:
            records[f"{name}_weight"] = batch.column(f"{name}_weight").to_numpy()
        if column.dim:
            vectors = batch.column(name).fill_null([0.0] * column.dim)
            records[name] = vectors.flatten().to_numpy().reshape(-1, column.dim)
    return keys_of(batch.column(id_column(layout.columns)), batch.column("_key")), records


def write(file: Any, layout: RecordLayout, runs: Iterable[tuple[Keys, NDArray[np.void]]]) -> None:
    """Keys and their records to an open file, a row group a run, of at most ROWS."""
    with pq.ParquetWriter(file, schema(layout), use_dictionary=False) as writer:
        for keys, records in runs:
            writer.write_batch(to_arrow(layout, keys, records))


def read(file: Any, layout: RecordLayout) -> Iterator[tuple[Keys, NDArray[np.void]]]:
    """Keys and records of a file that `write` wrote, a row group at a time: at most ROWS each, always the same ones.

    Raises:
        DataError: it is not such a file.
    """
    try:
        opened = pq.ParquetFile(file)
        for group in range(opened.num_row_groups):
            (batch,) = opened.read_row_group(group).combine_chunks().to_batches()
            yield from_arrow(layout, batch)
    except pa.ArrowException as error:
        raise DataError(f"not a Parquet file of this space: {error}") from None


class Hashed:
    """A file for writing that counts and hashes what goes through it."""

    def __init__(self, file: Any):
        self._file = file
        self._hash = hashlib.sha256()
        self.bytes = 0
        self.closed = False

    def write(self, data: Any) -> int:
        self._hash.update(data)
        self.bytes += memoryview(data).nbytes
        self._file.write(data)
        return memoryview(data).nbytes

    def tell(self) -> int:
        return self.bytes

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        """Whoever opened the file closes it."""

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


def ids_of(keys: Keys) -> tuple[Any, Any]:
    """Keys as text, and those that are no UTF-8 as they are; null where the text says it all."""
    ids = pa.StringArray.from_buffers(len(keys), pa.py_buffer(keys.offsets), pa.py_buffer(keys.data))
    try:
        ids.validate(full=True)
        return ids, pa.nulls(len(keys), pa.binary())
    except pa.ArrowInvalid:
        names = keys.tolist()
        texts = [name.decode(errors="backslashreplace") for name in names]
        return pa.array(texts), pa.array([None if text.encode() == name else name for text, name in zip(texts, names)], pa.binary())


def keys_of(ids: Any, odd: Any) -> Keys:
    """The keys that `ids_of` was given."""
    if odd.null_count < len(odd):
        return Keys.of([key if key is not None else id.encode() for id, key in zip(ids.to_pylist(), odd.to_pylist())])
    _, offsets, data = ids.buffers()
    ends = np.frombuffer(offsets, np.int32)[ids.offset : ids.offset + len(ids) + 1] if len(ids) else np.zeros(1, np.int32)
    held = np.frombuffer(data, np.uint8) if data is not None else np.zeros(0, np.uint8)
    return Keys(held[ends[0] : ends[-1]], ends - ends[0])


def timestamps(seconds: NDArray[np.float64]) -> Any:
    never = ~np.isfinite(seconds)
    return pa.array(np.round(np.where(never, 0.0, seconds) * 1e6).astype(np.int64), pa.int64(), mask=never).cast(_TIME)
