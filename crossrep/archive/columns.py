"""Rows of frames as Parquet and back, without losing a bit: float16 stays float16.

Columns for people: `id`, `count`, `event_time`, and per column of the spec its vector and weight. Those that only exactness needs, or that
say where a row came from, begin with an underscore, which no column of a spec can. docs/archive.md lists them all.

What is the same twice is stored once: a column whose vector is that of the first column of its source in the same row is null, and so is a
time that is the row's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossrep.columnar import algebra
from crossrep.columnar.rows import ColumnRows, Rows
from crossrep.errors import DataError
from crossrep.extras import extra
from crossrep.files import places
from crossrep.files.parquet import ROWS, id_column, ids_of, keys_of, timestamps
from crossrep.keys import Keys
from crossrep.spec import Column, Entity, Space

with extra("analytics"):
    import pyarrow as pa
    import pyarrow.parquet as pq

_TIME = pa.timestamp("us", "UTC")
_APPEND = pa.timestamp("ms", "UTC")
_SOURCE = pa.dictionary(pa.int32(), pa.string())
_TYPES = {"float16": pa.float16(), "float32": pa.float32()}


@dataclass(frozen=True)
class Frame:
    """One frame as it was sent, and where it lay."""

    rows: Rows
    vectors: Mapping[str, NDArray[np.floating]]  # by column with a dim: float16 or float32 [n, dim]; of one block: the same array
    offset: int
    append_time: float  # by the broker's clock, seconds since 1970, whole milliseconds
    source: str | None  # its header crossrep.source (crossrep/control/lineage.py)


@dataclass(frozen=True)
class Archived:
    """n rows of one entity and one partition, in the order of the topic, from one or more frames."""

    partition: int
    rows: Rows
    offsets: NDArray[np.int64]  # [n], of the row's frame
    append_times: NDArray[np.float64]  # [n], of the row's frame, seconds since 1970
    sources: NDArray[np.int32]  # [n], index into `headers`; -1: the frame does not say of which events it was made
    headers: list[str]

    def take(self, rows: NDArray[np.int64]) -> Archived:
        """The given rows, in that order."""
        return Archived(self.partition, self.rows.take(rows), self.offsets[rows], self.append_times[rows], self.sources[rows], self.headers)

    def where(self, wanted: NDArray[np.bool_]) -> Archived:
        """The rows where `wanted` [n] is True; itself where that is all of them."""
        return self if wanted.all() else self.take(np.flatnonzero(wanted))

    def without(self, start: int, forgotten: Mapping[bytes, int]) -> Archived:
        """Without rows of frames below `start`, and of keys that are to be forgotten: key -> offset of the order."""
        wanted = self.offsets >= start
        if forgotten and len(self.offsets) and self.offsets[0] < max(forgotten.values()):
            orders = np.array([forgotten.get(key, -1) for key in self.rows.keys.tolist()])
            wanted &= self.offsets >= orders
        return self.where(wanted)


def shared(entity: Entity) -> dict[str, str]:
    """By column with a dim: the first column of its source, whose vectors it may share."""
    first: dict[str, str] = {}
    return {name: first.setdefault(column.source, name) for name, column in entity.columns.items() if column.dim}


def schema(entity: Entity, dtypes: Mapping[str, str]) -> Any:
    """The Arrow schema of an entity's files. `dtypes`: float16 or float32, by column with a dim."""
    first = shared(entity)
    fields = [pa.field(id_column(entity.columns), pa.string()), pa.field("count", pa.int64()), pa.field("event_time", _TIME)]
    hidden = [pa.field("_key", pa.binary()), pa.field("_event_time", pa.float64())]
    for name, column in entity.columns.items():
        if column.dim:
            element = pa.field("element", _TYPES[dtypes[name]], nullable=False)
            fields.append(pa.field(name, pa.list_(element, column.dim), nullable=first[name] != name))
        fields.append(pa.field(_weight(name, column), pa.float64()))
        hidden += [pa.field(f"_{name}_present", pa.bool_()), pa.field(f"_{name}_time", pa.float64())]
    place = [("_partition", pa.int32()), ("_offset", pa.int64()), ("_append_time", _APPEND), ("_source", _SOURCE)]
    return pa.schema([*fields, *hidden, *(pa.field(*field) for field in place)])


def _weight(name: str, column: Column) -> str:
    """Of `latest` it means nothing, but is kept."""
    return f"{name}_weight" if column.half_life is not None else f"_{name}_weight"


# --- writing ---


def encoded(space: Space, entity: str, partition: int, frames: Iterable[Frame]) -> Any:
    """The bytes of a file of these frames, a pyarrow Buffer; in the vectors' narrowest type that holds them all."""
    frames, spec = list(frames), space.entities[entity]
    dtypes = {}
    for name in shared(spec):
        found = {frame.vectors[name].dtype.name for frame in frames}
        dtypes[name] = "float32" if "float32" in found else "float16" if found else space.vectors
    layout = schema(spec, dtypes)
    out = pa.BufferOutputStream()
    with pq.ParquetWriter(out, layout, **settings(layout)) as writer:
        for run in _runs(frames):
            writer.write_batch(to_arrow(layout, spec, partition, run))
    return out.getvalue()


def _runs(frames: list[Frame]) -> Iterator[list[Frame]]:
    """Of up to ROWS rows, or one frame."""
    run: list[Frame] = []
    rows = 0
    for frame in frames:
        if run and rows + len(frame.rows) > ROWS:
            yield run
            run, rows = [], 0
        run.append(frame)
        rows += len(frame.rows)
    if run:
        yield run


def settings(layout: Any) -> dict[str, Any]:
    """How the columns of a file are written: as a dictionary but for those that differ in nearly every row."""
    repeated = [field.name for field in layout if not pa.types.is_fixed_size_list(field.type) and not field.name.endswith("event_time")]
    return {"compression": "zstd", "use_dictionary": repeated}


def to_arrow(layout: Any, entity: Entity, partition: int, frames: list[Frame]) -> Any:
    """Frames of one entity and partition as a record batch."""
    lengths = np.array([len(frame.rows) for frame in frames])
    ids, odd = ids_of(Keys.concatenate([frame.rows.keys for frame in frames]))
    times = np.concatenate([frame.rows.times for frame in frames])
    arrays: dict[str, Any] = {
        id_column(entity.columns): ids,
        "count": pa.array(np.concatenate([frame.rows.counts for frame in frames])),
        "event_time": timestamps(times),
        "_key": odd,
        "_event_time": pa.array(times),
        "_partition": pa.array(np.full(len(times), partition, np.int32)),
        "_offset": pa.array(np.repeat([frame.offset for frame in frames], lengths)),
        "_append_time": pa.array(np.repeat([round(frame.append_time * 1000) for frame in frames], lengths)).cast(_APPEND),
        "_source": _sources([frame.source for frame in frames], lengths),
    }
    first = shared(entity)
    for name, column in entity.columns.items():
        parts = [frame.rows.columns[name] for frame in frames]
        arrays[f"_{name}_present"] = pa.array(np.concatenate([part.present for part in parts]))
        arrays[_weight(name, column)] = pa.array(np.concatenate([part.weights for part in parts]))
        own = np.concatenate([part.times for part in parts])
        arrays[f"_{name}_time"] = pa.array(own, mask=own.view(np.int64) == times.view(np.int64))
        if column.dim:
            as_first = [first[name] != name and frame.vectors[name] is frame.vectors[first[name]] for frame in frames]
            arrays[name] = _lists(layout.field(name).type, [frame.vectors[name] for frame in frames], as_first)
    return pa.record_batch([arrays[name] for name in layout.names], layout)


def _lists(kind: Any, parts: list[NDArray[np.floating]], null: list[bool]) -> Any:
    if all(null):
        return pa.nulls(sum(map(len, parts)), kind)
    dtype = np.dtype(kind.value_type.to_pandas_dtype())
    flat = np.concatenate([part.astype(dtype, copy=False) for part in parts]).reshape(-1)
    mask = pa.array(np.repeat(null, list(map(len, parts)))) if any(null) else None
    return pa.FixedSizeListArray.from_arrays(pa.array(flat), type=kind, mask=mask)


def _sources(sources: list[str | None], lengths: NDArray[np.int64]) -> Any:
    known = {source: index for index, source in enumerate(dict.fromkeys(source for source in sources if source is not None))}
    codes = np.repeat(np.array([known.get(source, -1) if source is not None else -1 for source in sources], np.int32), lengths)
    return pa.DictionaryArray.from_arrays(pa.array(codes, mask=codes < 0), pa.array(list(known), pa.string()))


# --- reading ---


class Opened:
    """One file, open for reading."""

    def __init__(self, fs: Any, path: str, entity: str, partition: int):
        self.path, self.entity, self.partition = path, entity, partition
        try:
            self._file = pa.memory_map(path) if places.is_local(fs) else fs.open(path, "rb")
            self._parquet = pq.ParquetFile(self._file, read_dictionary=["_source"])
        except (OSError, pa.ArrowException) as error:
            raise self._damaged(error) from None
        self.groups: int = self._parquet.num_row_groups
        self.rows: int = self._parquet.metadata.num_rows

    def read(self, space: Space, group: int) -> Archived:
        """A row group's rows, vectors widened to float32. Raises DataError: it is damaged, or of another spec."""
        try:
            batches = self._parquet.read_row_group(group, use_threads=False).combine_chunks().to_batches()
            return from_arrow(space, self.entity, self.partition, batches[0])
        except (OSError, KeyError, IndexError, pa.ArrowException) as error:
            raise self._damaged(error) from None

    def table(self, columns: list[str] | None = None) -> Any:
        """The whole file, or some of its columns, as an Arrow table. Raises DataError: it is damaged."""
        try:
            return self._parquet.read(columns)
        except (OSError, pa.ArrowException) as error:
            raise self._damaged(error) from None

    def times(self) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int32], list[str]]:
        """Of all rows: offset, event time, and the header as an index into a list, -1 without one. Raises DataError: it is damaged."""
        return self._with_headers("_event_time")

    def appended(self) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int32], list[str]]:
        """The same, with the frame's append time, seconds since 1970, in the place of the event time."""
        offsets, times, sources, headers = self._with_headers("_append_time")
        return offsets, times.astype(np.int64) / 1000, sources, headers

    def _with_headers(self, name: str) -> tuple[NDArray[np.int64], NDArray[Any], NDArray[np.int32], list[str]]:
        table = self.table(["_offset", name, "_source"]).unify_dictionaries().combine_chunks()
        if not len(table):
            return np.zeros(0, np.int64), np.zeros(0), np.zeros(0, np.int32), []
        (source,) = table["_source"].chunks
        sources = source.indices.fill_null(-1).to_numpy()
        return table["_offset"].to_numpy(), table[name].to_numpy(), sources, source.dictionary.to_pylist()

    def _damaged(self, error: Exception) -> DataError:
        return DataError(f"{self.path} cannot be read: {error}. It is damaged, or was removed by another run's --keep")

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *exc: Any) -> None:
        self._parquet.close()
        self._file.close()


def from_arrow(space: Space, entity: str, partition: int, batch: Any) -> Archived:
    """The rows of the frames that `to_arrow` was given, vectors widened to float32."""
    spec, n = space.entities[entity], len(batch)
    times = batch.column("_event_time").to_numpy()
    first = shared(spec)
    columns: dict[str, ColumnRows] = {}
    for name, column in spec.columns.items():
        vectors = np.empty((n, 0), np.float32)
        if column.dim:
            vectors = _widened(batch.column(name), column.dim, lambda name=name: columns[first[name]].vectors)  # type: ignore[misc]
        own = batch.column(f"_{name}_time")
        seconds = times if own.null_count == n else np.where(_is_null(own), times, own.fill_null(0.0).to_numpy())
        present = batch.column(f"_{name}_present").to_numpy(zero_copy_only=False)
        columns[name] = ColumnRows(vectors, batch.column(_weight(name, column)).to_numpy(), seconds, present)
    keys = keys_of(batch.column(id_column(spec.columns)), batch.column("_key"))
    rows = Rows(entity, keys, times, batch.column("count").to_numpy(), columns)
    appended = batch.column("_append_time").cast(pa.int64()).to_numpy() / 1000
    source = batch.column("_source")
    sources = source.indices.fill_null(-1).to_numpy()
    return Archived(partition, rows, batch.column("_offset").to_numpy(), appended, sources, source.dictionary.to_pylist())


def _widened(lists: Any, dim: int, shared: Callable[[], NDArray[np.float32]]) -> NDArray[np.float32]:
    if lists.null_count == len(lists) and len(lists):
        return shared()
    null = _is_null(lists) if lists.null_count else None
    begin = lists.values.offset + lists.offset * dim
    values = np.frombuffer(lists.values.buffers()[1], lists.type.value_type.to_pandas_dtype())[begin : begin + len(lists) * dim]
    wide = algebra.widen(values)[0] if values.dtype == np.float16 else values
    vectors: NDArray[np.float32] = wide.reshape(-1, dim)
    return vectors if null is None else np.where(null[:, None], shared(), vectors)


def _is_null(array: Any) -> NDArray[np.bool_]:
    null: NDArray[np.bool_] = array.is_null().to_numpy(zero_copy_only=False)
    return null
