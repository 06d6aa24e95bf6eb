"""Training sets: labelled samples with what was known of their user and item before the impression, as Parquet.

<url>/<space>/<id>/part-00000.parquet ...     in event-time order
<url>/<space>/<id>/manifest.json              written last: its presence is publication
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from crossrep import kafka
from crossrep.archive.store import Archive
from crossrep.columnar.rows import Known
from crossrep.control.cuts import Cut
from crossrep.extras import extra
from crossrep.files import parquet
from crossrep.files.dated import Dated, DatedFolders, header
from crossrep.spec import Space
from crossrep.training import sample_tables
from crossrep.training.attach import Attached, Progressed, archived, attach_all, event_times, usable_cut
from crossrep.training.samples import attached_entities
from crossrep.training.sweep import MEMORY, weights_at

with extra("analytics"):
    import pyarrow as pa
    import pyarrow.parquet as pq

FILE_ROWS = 1 << 20  # a file, at most


class File(BaseModel):
    path: str  # within the set's folder
    rows: int
    bytes: int
    sha256: str


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

    Memory: the samples without what is attached (150 bytes each), one partition's of them as Python objects, and
    `crossrep.training.sweep.MEMORY`. What is attached lies in a temporary folder on the way.

    Raises:
        DataError: there is no archive, or one of another spec, or nothing can be written.
        CrossrepError: the cluster does not answer.
    """
    cut = usable_cut(space, archive)
    bounds = kafka.bounds(bootstrap, space.samples_topic)
    total = sum(end - first for first, end in bounds.values())
    since, until = (None if time is None else round(time.timestamp() * 1000) for time in (chosen.since, chosen.until))
    table = sample_tables.read(space, bootstrap, bounds, since, until, lambda done: progressed("samples", done, total))
    there = archived(space, cut, table["sample_id"].to_pylist())
    table = table.filter(pa.array(there)).combine_chunks()
    with store.begun() as id:
        with tempfile.TemporaryDirectory(prefix="crossrep-") as folder:
            found, about = attach_all(space, table, archive, cut, chosen.delay, memory, Path(folder), progressed)
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
            left_out=int((~there).sum()),
            entities=about,
            files=files,
        )
        store.publish(made)
    return made


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


def _columns(space: Space, known: dict[str, Known], at: NDArray[np.float64], rows: slice) -> Iterator[Any]:
    """The attached columns of these samples, whose impressions were `at` [n], in the schema's order."""
    for entity in attached_entities(space):
        found = known[entity].part(rows)
        yield pa.array(found.counts > 0)
        yield pa.array(found.counts)
        yield parquet.timestamps(found.event_times)
        for name, column in space.entities[entity].columns.items():
            answer = found.columns[name]
            if column.dim:
                flat = pa.array(np.ascontiguousarray(answer.vectors).reshape(-1))
                yield pa.FixedSizeListArray.from_arrays(flat, column.dim, mask=pa.array(~answer.present))
            if column.half_life is not None:
                yield pa.array(weights_at(answer, column.half_life, at[rows]))


def _write(space: Space, table: Any, known: dict[str, Known], store: TrainingSets, id: str, progressed: Progressed) -> list[File]:
    layout, files, at = schema(space), [], event_times(table) / 1000
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
                        writer.write_batch(pa.record_batch([*own, *_columns(space, known, at, rows)], layout))
                        progressed("writing", rows.stop - rows.start, len(table))
        except OSError as error:
            raise store.unusable("written", error) from error
        files.append(File(path=path, rows=end - first, bytes=hashed.bytes, sha256=hashed.sha256))
    return files
