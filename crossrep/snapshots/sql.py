"""SQL over a snapshot: DuckDB with a view per entity, named like it, and macros for what SQL lacks.

cosine(a, b)                                   of two vectors; 0 if one is all zeros, null if one is null
half_life('user.cr')                           of a column, in seconds
confidence(weight, time, at, half_life)        the weight that is left at a time; without half_life where the space has only one
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from datetime import date, datetime
from typing import Any, TextIO

from rich.table import Table

from crossrep.columnar.records import RecordLayout
from crossrep.errors import CrossrepError, DataError
from crossrep.extras import extra
from crossrep.files.parquet import id_column
from crossrep.snapshots.store import Manifest, Store
from crossrep.spec import Space

with extra("analytics"):
    import duckdb
    import pyarrow.parquet as pq

BATCH = 10_000  # rows fetched at a time
SHOWN = 200  # rows of a table for people

_COSINE = "list_cosine_similarity(a::FLOAT[], b::FLOAT[])"
_LEFT = (
    'CASE WHEN "time" IS NULL THEN 0.0 ELSE weight '
    '* pow(2.0, -greatest(epoch("moment"::TIMESTAMPTZ) - epoch("time"::TIMESTAMPTZ), 0.0) / {half_life}) END'
)


def connect() -> Any:
    """A DuckDB connection of its own, in memory, with UTC as its time zone."""
    connection = duckdb.connect()
    connection.execute("SET TimeZone = 'UTC'")
    return connection


def attach(connection: Any, store: Store, manifest: Manifest, schema: str = "main") -> None:
    """A view for every entity of a snapshot, in a schema of the connection."""
    if "file" not in store.fs.protocol and not connection.filesystem_is_registered(_protocol(store)):
        connection.register_filesystem(store.fs)
    connection.execute(f'CREATE SCHEMA IF NOT EXISTS "{schema}"')
    space = manifest.declared()
    for entity in space.entities:
        paths = [store.fs.unstrip_protocol(store.path(manifest.id, part.path)) for part in manifest.parts[entity]]
        files = ", ".join("'" + path.removeprefix("file://").replace("'", "''") + "'" for path in paths)
        columns = ", ".join(_columns(RecordLayout(space, entity)))
        connection.execute(f'CREATE VIEW "{schema}"."{entity}" AS SELECT {columns} FROM read_parquet([{files}])')


def define_macros(connection: Any, space: Space) -> None:
    half_lives = {f"{e}.{c}": s.half_life for e, spec in space.entities.items() for c, s in spec.columns.items() if s.half_life}
    known = " ".join(f"WHEN '{name}' THEN {seconds!r}::DOUBLE" for name, seconds in half_lives.items())
    unknown = f"error('no half-life of ' || name || '; there are ' || '{', '.join(half_lives)}')"
    connection.execute(
        f"CREATE MACRO half_life(name) AS CASE name {known} ELSE {unknown} END" if known else f"CREATE MACRO half_life(name) AS {unknown}"
    )
    forms = [f'(weight, "time", moment, half_life) AS {_LEFT.format(half_life="half_life")}']
    if len(set(half_lives.values())) == 1:
        forms.append(f'(weight, "time", moment) AS {_LEFT.format(half_life=repr(next(iter(half_lives.values()))))}')
    connection.execute(f"CREATE MACRO confidence{', '.join(forms)}")
    cosine = f"CASE WHEN a IS NULL OR b IS NULL THEN NULL WHEN isnan({_COSINE}) THEN 0.0 ELSE {_COSINE} END"
    connection.execute(f"CREATE MACRO cosine(a, b) AS {cosine}")


def ask(store: Store, manifest: Manifest, query: str) -> Any:
    """The answer to one query, as DuckDB's relation: lazily, it is computed as it is fetched.

    Raises:
        CrossrepError: it is not one query that only reads, or DuckDB does not understand it; says why.
    """
    connection = connect()
    attach(connection, store, manifest)
    define_macros(connection, manifest.declared())
    try:
        kinds = [statement.type.name for statement in connection.extract_statements(query)]
        if len(kinds) != 1 or kinds[0] not in ("SELECT", "EXPLAIN"):
            raise CrossrepError(f"{' and '.join(kinds) or 'nothing'} is no query: write one SELECT. Snapshots are never changed")
        return connection.sql(query)
    except duckdb.Error as error:
        raise _failed(error, manifest) from None


def batches(answer: Any, manifest: Manifest) -> Iterator[Any]:
    """An answer as Arrow record batches of at most BATCH rows. Raises CrossrepError if it cannot be computed."""
    try:
        yield from answer.to_arrow_reader(BATCH)
    except duckdb.Error as error:
        raise _failed(error, manifest) from None


def table(answer: Any, manifest: Manifest) -> tuple[Table, int]:
    """The first SHOWN rows as people read them, and how many more there are."""
    shown, rows = Table(*answer.columns, box=None), 0
    for batch in batches(answer, manifest):
        for row in zip(*(column.slice(0, max(0, SHOWN - rows)).to_pylist() for column in batch.columns)):
            shown.add_row(*map(_text, row))
        rows += len(batch)
    return shown, max(0, rows - SHOWN)


def write_csv(answer: Any, manifest: Manifest, out: TextIO) -> None:
    """With a header; vectors and times as in JSON."""
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(answer.columns)
    for batch in batches(answer, manifest):
        for row in zip(*(column.to_pylist() for column in batch.columns)):
            values = map(_json, row)
            writer.writerow(["" if v is None else json.dumps(v) if isinstance(v, list | dict) else v for v in values])


def write_json(answer: Any, manifest: Manifest, out: TextIO) -> None:
    """An object a line; times as ISO 8601; what is not finite is null."""
    for batch in batches(answer, manifest):
        for row in zip(*(column.to_pylist() for column in batch.columns)):
            out.write(json.dumps(dict(zip(answer.columns, map(_json, row)))) + "\n")


def write_parquet(answer: Any, manifest: Manifest, path: str) -> None:
    reader = answer.to_arrow_reader(BATCH)
    try:
        with pq.ParquetWriter(path, reader.schema) as writer:
            for batch in reader:
                writer.write_batch(batch)
    except duckdb.Error as error:
        raise _failed(error, manifest) from None
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error}") from None


def _columns(layout: RecordLayout) -> Iterator[str]:
    yield from (f'"{id_column(layout.columns)}"', '"count"', '"event_time"')
    for name, column in layout.columns.items():
        if column.dim:
            yield f'"{name}"::FLOAT[{column.dim}] AS "{name}"'
        if column.half_life is not None:
            yield f'"{name}_weight"'
        yield f'"{name}_time"'
    yield '"source_offset"'


def _protocol(store: Store) -> str:
    return store.fs.protocol if isinstance(store.fs.protocol, str) else str(store.fs.protocol[0])


def _failed(error: Exception, manifest: Manifest) -> CrossrepError:
    return CrossrepError(
        f"{str(error).strip()}\nsnapshot {manifest.id} has the views {', '.join(manifest.parts)}; what one holds: crossrep sql 'describe "
        f"{next(iter(manifest.parts))}'"
    )


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value[:4]))}{', …' if len(value) > 4 else ''}]"
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%d %H:%M:%S}"
    return str(value)


def _json(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list):
        return [_json(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _json(item) for key, item in value.items()}
    if isinstance(value, date):  # and datetime
        return value.isoformat()
    return value if value is None or isinstance(value, str | int) else str(value)
