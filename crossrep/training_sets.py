"""Training sets: labelled samples with what was known of their user and item before the impression, as Parquet.

<url>/<space>/<id>/part-00000.parquet ...     in event-time order
<url>/<space>/<id>/manifest.json              written last: its presence is publication
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from crossrep import kafka, parquet, sample_tables
from crossrep.archive import Archive
from crossrep.attach import MEMORY, Known, Moments, Used, attach, unknown
from crossrep.cuts import Cut
from crossrep.dated import Dated, DatedFolders, header
from crossrep.errors import DataError
from crossrep.extras import extra
from crossrep.spec import Space, infer_group

with extra("analytics"):
    import pyarrow as pa
    import pyarrow.parquet as pq

FILE_ROWS = 1 << 20  # a file, at most
REPEATED = ["user_id", "item_id", "scenario", "branch"]

Progressed = Callable[[str, int, int], None]  # what is done, how much further it is, of so much


class File(BaseModel):
    path: str  # within the set's folder
    rows: int
    bytes: int
    sha256: str


class Attached(BaseModel):
    """Of one entity, over all samples."""

    found: int  # samples whose key was known before
    rows: int  # archived rows looked at
    combined: int  # of these, rows of several events: `crossrep infer --no-combine` writes none
    blurred: int  # samples whose next row is one of these, which may hold events from before the impression that were left out


class TrainingSet(Dated):
    """The manifest."""

    delay: float  # seconds before the impression from which on nothing is known
    since: float | None  # event times of the impressions, seconds since 1970: since <= event_time < until
    until: float | None
    samples: dict[int, tuple[int, int]]  # partition of samples.<space> -> first and next offset
    archive: str
    cut: Cut  # of the archive: what it held in front of it was used
    clicked: int
    left_out: int  # samples whose impression is not in the archive yet
    entities: dict[str, Attached]
    files: list[File]

    def sizes(self) -> dict[str, int]:
        return {file.path: file.bytes for file in self.files}

    @property
    def rows(self) -> int:
        return sum(file.rows for file in self.files)


class TrainingSets(DatedFolders[TrainingSet]):
    """The training sets of one space."""

    what, command, described = "training set", "crossrep training-set", TrainingSet


@dataclass(frozen=True)
class Chosen:
    """Which samples, and how much is known of them."""

    since: datetime | None = None  # event times of the impressions, UTC
    until: datetime | None = None  # exclusive
    delay: float = 0.0  # seconds before the impression from which on nothing is known


def attached_entities(space: Space) -> dict[str, str]:
    """The entities whose key a sample has: entity -> its field."""
    return {entity: space.key_field(entity) for entity in space.entities if space.key_field(entity) in sample_tables.SCHEMA.names}


def make(
    space: Space,
    bootstrap: str,
    store: TrainingSets,
    archive: Archive,
    chosen: Chosen,
    memory: int = MEMORY,
    progressed: Progressed = lambda what, done, total: None,
) -> TrainingSet:
    """Write and publish a training set of the samples that there are now. A failure leaves nothing behind; a kill leaves what nobody sees.

    Memory: the samples without what is attached (150 bytes each), one partition's of them as Python objects, and `crossrep.attach.MEMORY`.
    What is attached lies in a temporary folder on the way.

    Raises:
        DataError: there is no archive, or one of another spec, or nothing can be written.
        CrossrepError: the cluster does not answer.
    """
    if archive.declared().hash != space.hash:
        raise DataError(f"the archive in {archive.url} is of another spec than the published space {space.name!r}")
    cut = archive.cut()
    if cut is None:
        raise DataError(f"the archive in {archive.url} has no cut: crossrep archive {space.name} --to {archive.url} makes one")
    bounds = kafka.bounds(bootstrap, space.samples_topic)
    total = sum(end - first for first, end in bounds.values())
    since, until = (None if time is None else round(time.timestamp() * 1000) for time in (chosen.since, chosen.until))
    table = sample_tables.read(space, bootstrap, bounds, since, until, lambda done: progressed("samples", done, total))
    table, left_out = _archived_only(table, space, cut)
    with store.begun() as id:
        with tempfile.TemporaryDirectory(prefix="crossrep-") as folder:
            found: dict[str, Known] = {}
            about: dict[str, Attached] = {}
            for entity in attached_entities(space):
                found[entity], used = _attach(space, entity, table, archive, cut, chosen.delay, memory, Path(folder), progressed)
                known = int((found[entity].counts > 0).sum())
                about[entity] = Attached(found=known, rows=used.rows, combined=used.combined, blurred=used.blurred)
            files = _write(space, table, found, store, id, progressed)
        made = TrainingSet(
            **header(space, id),
            delay=chosen.delay,
            since=None if since is None else since / 1000,
            until=None if until is None else until / 1000,
            samples=bounds,
            archive=archive.url,
            cut=cut,
            clicked=int(np.sum(table["label"].to_numpy())),
            left_out=left_out,
            entities=about,
            files=files,
        )
        store.publish(made)
    return made


def _archived_only(table: Any, space: Space, cut: Cut) -> tuple[Any, int]:
    """The samples whose impressions `infer` had consumed when the archive was last complete, and how many others there are.

    What was consumed later may lie before an impression, and is not in the archive. Where no `infer` works, nobody can tell.
    """
    reached = cut.groups.get(infer_group(space), {}).get(space.inputs.impressions)
    if not reached:
        return table, 0
    places = (id.split("-") for id in table["sample_id"].to_pylist())
    there = np.fromiter((int(offset) < reached.get(int(number), 0) for number, offset in places), np.bool_, len(table))
    return table.filter(pa.array(there)).combine_chunks(), int((~there).sum())


def moments_of(table: Any, field: str, delay: float) -> tuple[Moments, NDArray[np.int64]]:
    """What to ask of the entity keyed by `field`, and of which samples: those that have such a key."""
    texts, milliseconds = table[field].combine_chunks(), table["event_time"].cast(pa.int64()).to_numpy()
    rows = np.flatnonzero(texts.to_numpy(zero_copy_only=False) != "")
    if len(rows) < len(texts):
        texts = texts.take(pa.array(rows))
    keys = parquet.keys_of(texts, pa.nulls(len(texts), pa.binary()))
    # In whole milliseconds, so that seconds come out as those of the events do.
    return Moments(keys, (milliseconds[rows] - round(delay * 1000)) / 1000, milliseconds[rows] / 1000), rows


def _attach(
    space: Space, entity: str, table: Any, archive: Archive, cut: Cut, delay: float, memory: int, folder: Path, progressed: Progressed
) -> tuple[Known, Used]:
    """What was known before every sample, in files of the folder."""
    moments, rows = moments_of(table, space.key_field(entity), delay)

    def array(name: str, shape: tuple[int, ...], dtype: type) -> NDArray[Any]:
        return np.memmap(folder / f"{entity}-{name}", dtype, "w+", shape=shape) if 0 not in shape else np.zeros(shape, dtype)

    known, used = unknown(space.entities[entity], len(table), array), Used()
    partitions = moments.keys.partitions(space.partitions)
    for number in range(space.partitions):
        here = np.flatnonzero(partitions == number)
        if len(here):
            asked = Moments(moments.keys.take(here), moments.before[here], moments.at[here])
            attach(archive, cut, entity, number, asked, known, rows[here], used, memory)
        progressed(entity, len(here), len(rows))
    return known, used


def names_of(space: Space) -> dict[tuple[str, str], str]:
    """What columns are called in a set: their entity's name in front, an underscore behind where a sample has such a column already."""
    names: dict[tuple[str, str], str] = {}
    for entity in attached_entities(space):
        for column in space.entities[entity].columns:
            name = f"{entity}_{column}"
            taken = [*sample_tables.SCHEMA.names, f"{entity}_found", *names.values()]
            while name in taken:
                name += "_"
            names[entity, column] = name
    return names


def schema(space: Space) -> Any:
    """The Arrow schema of a set's files."""
    fields, names = list(sample_tables.SCHEMA), names_of(space)
    for entity in attached_entities(space):
        about = {"found": pa.bool_(), "count": pa.int64(), "event_time": pa.timestamp("us", "UTC")}
        fields += [pa.field(f"{entity}_{name}", kind) for name, kind in about.items()]
        for column, spec in space.entities[entity].columns.items():
            if spec.dim:
                fields.append(pa.field(names[entity, column], pa.list_(pa.float32(), spec.dim)))
            if spec.half_life is not None:
                fields.append(pa.field(f"{names[entity, column]}_weight", pa.float64()))
    return pa.schema(fields)


def _columns(space: Space, known: dict[str, Known], rows: slice) -> Iterator[Any]:
    """The attached columns of these samples, in the schema's order."""
    for entity in attached_entities(space):
        found = known[entity]
        yield pa.array(found.counts[rows] > 0)
        yield pa.array(found.counts[rows])
        yield parquet.timestamps(found.event_times[rows])
        for name, column in space.entities[entity].columns.items():
            answer = found.columns[name]
            if column.dim:
                flat = pa.array(np.ascontiguousarray(answer.vectors[rows]).reshape(-1))
                yield pa.FixedSizeListArray.from_arrays(flat, column.dim, mask=pa.array(~answer.present[rows]))
            if column.half_life is not None:
                yield pa.array(answer.weights[rows])


def _write(space: Space, table: Any, known: dict[str, Known], store: TrainingSets, id: str, progressed: Progressed) -> list[File]:
    layout, files = schema(space), []
    for number, first in enumerate(range(0, len(table), FILE_ROWS)):
        end, path = min(first + FILE_ROWS, len(table)), f"part-{number:05d}.parquet"
        try:
            with store.fs.open(store.path(id, path), "wb") as file:
                hashed = parquet.Hashed(file)
                with pq.ParquetWriter(
                    hashed, layout, compression="zstd", use_dictionary=["user_id", "item_id", "scenario", "branch"]
                ) as writer:
                    for start in range(first, end, parquet.ROWS):
                        rows = slice(start, min(start + parquet.ROWS, end))
                        own = [table[name][rows].combine_chunks() for name in sample_tables.SCHEMA.names]
                        writer.write_batch(pa.record_batch([*own, *_columns(space, known, rows)], layout))
                        progressed("writing", rows.stop - rows.start, len(table))
        except OSError as error:
            raise store.unusable("written", error) from error
        files.append(File(path=path, rows=end - first, bytes=hashed.bytes, sha256=hashed.sha256))
    return files
