"""A replay's tables: those of the stream, from an archive, in another space, and from files of samples."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crossrep.columnar.records import RecordLayout
from crossrep.columnar.rows import Rows
from crossrep.control.binding import Model
from crossrep.errors import DataError, SpaceError
from crossrep.keys import Keys
from crossrep.rollout import replay_archive, replay_files, replay_tables
from crossrep.snapshots.store import Replayed, Store
from crossrep.spec import Space
from tests.cluster import SPEC
from tests.crossrep.archive_world import Samples, put, rows, samples, store_of
from tests.crossrep.snapshot_world import rows as snapshot_rows

Records = dict[str, dict[bytes, np.void]]  # entity -> key -> record

SPACE = Space.parse(SPEC.format(name="old", partitions=4))
OTHER = Space.parse(
    SPEC.format(name="new", partitions=3)
    .replace('half_life = "1h"', 'half_life = "5h"')
    .replace("click = 4.0", "click = 9.0")
    .replace("columns.clicks", "columns.clicked")
)


def of(tables: dict[str, replay_tables.Table]) -> Records:
    found: Records = {}
    for entity, table in tables.items():
        slots = table.index.slots()
        found[entity] = dict(zip(table.index.keys(slots).tolist(), table.state.records(slots)))
    return found


def streamed(space: Space, runs: list[Rows]) -> Records:
    """What a fold worker holds: frame by frame, in one thread."""
    tables = {entity: replay_tables.Table(space, entity) for entity in space.entities}
    for run in runs:
        tables[run.entity].fold(run)
    return of(tables)


def refuse_differences(space: Space, found: Records, expected: Records) -> None:
    for entity, spec in space.entities.items():
        assert found[entity].keys() == expected[entity].keys()
        for key, record in found[entity].items():
            other = expected[entity][key]
            for name in ("count", "event_time", *(f"{column}_time" for column in spec.columns)):
                assert record[name] == other[name], (entity, key, name)
            for name, column in spec.columns.items():
                for field in ([f"{name}_weight"] if column.half_life else []) + ([name] if column.dim else []):
                    np.testing.assert_allclose(record[field], other[field], rtol=1e-5, atol=1e-6, err_msg=f"{entity} {key!r} {field}")


@pytest.mark.parametrize("combined", [False, True])
def test_the_streams_tables_whoever_folds_them(tmp_path: Path, combined: bool) -> None:
    store, given = store_of(SPACE, tmp_path), samples(SPACE, 3000)
    frames = put(store, SPACE, given, combined=combined)
    expected = streamed(SPACE, [frame.rows for frame in frames])
    assert sum(record["count"] for record in expected["user"].values()) == 3000
    for threads in (1, 3):
        source = replay_archive.of_archive(store, SPACE, None)
        told: list[int] = []
        found = replay_tables.fold(SPACE, source.tasks, threads, told.append)
        assert sum(told) == source.rows == sum(len(frame.rows) for frame in frames)
        refuse_differences(SPACE, of(found), expected)


def test_another_half_life_other_weights_and_partitions(tmp_path: Path) -> None:
    store, given = store_of(SPACE, tmp_path), samples(SPACE, 3000)
    put(store, SPACE, given)
    tables = replay_tables.fold(OTHER, replay_archive.of_archive(store, OTHER, None).tasks, 2)
    expected = streamed(OTHER, [rows(OTHER, entity, given) for entity in OTHER.entities])
    refuse_differences(OTHER, of(tables), expected)
    snapshots = Store(str(tmp_path / "snapshots"), OTHER.name)
    manifest = replay_tables.publish(snapshots, OTHER, tables, Replayed(source=store.root, cut=None))
    assert snapshots.find() == manifest and [part.partition for part in manifest.parts["user"]] == [0, 1, 2]
    for entity in OTHER.entities:
        layout = RecordLayout(OTHER, entity)
        kept = {key: layout.decode([value])[0] for key, value in snapshot_rows(snapshots, manifest, entity).items()}
        refuse_differences(OTHER, {**expected, entity: kept}, expected)


def test_keys_expire_as_in_the_stream(tmp_path: Path) -> None:
    space = Space.parse(SPEC.format(name="old", partitions=2) + '[entities.user]\nexpire_after = "1h"\n')
    store, given = store_of(space, tmp_path), samples(space, 3000)
    frames = put(store, space, given)
    tables = {entity: replay_tables.Table(space, entity) for entity in space.entities}
    newest = [-np.inf, -np.inf]
    for frame in sorted(frames, key=lambda frame: frame.offset):
        partition = int(frame.rows.keys.partitions(2)[0])
        expired_before = newest[partition] - 3600 if frame.rows.entity == "user" else -np.inf
        tables[frame.rows.entity].fold(frame.rows, expired_before)
        newest[partition] = max(newest[partition], float(frame.rows.times.max()))
    expected = of(tables)
    assert 0 < sum(record["count"] for record in expected["user"].values()) < 3000  # some have begun anew
    found = replay_tables.fold(space, replay_archive.of_archive(store, space, None).tasks, 2)
    refuse_differences(space, of(found), expected)
    snapshots = Store(str(tmp_path / "snapshots"), space.name)
    manifest = replay_tables.publish(snapshots, space, found, Replayed(source=store.root, cut=None))
    limits = [time - 3600 for time in newest]
    alive = {key for key, record in expected["user"].items() if record["event_time"] >= limits[int(Keys.of([key]).partitions(2)[0])]}
    assert snapshot_rows(snapshots, manifest, "user").keys() == alive and len(alive) < len(expected["user"])


def test_what_cannot_be_known_any_more_is_refused(tmp_path: Path) -> None:
    store = store_of(SPACE, tmp_path)
    put(store, SPACE, samples(SPACE, 300, keys=5), combined=True)
    with pytest.raises(DataError, match=r"user.cr has another half-life .* runs with --no-combine"):
        replay_tables.fold(OTHER, replay_archive.of_archive(store, OTHER, None).tasks, 2)
    foreign = Space.parse(
        SPEC.format(name="new", partitions=3)
        .replace('source = "ur"', 'source = "vr"')
        .replace("click = 4.0", "click = 1.0")
        .replace('events = ["click"]', 'events = ["impression"]')
    )
    with pytest.raises(SpaceError) as unlike:
        replay_archive.of_archive(store, foreign, None)
    assert "user.ur: no column with this source" in str(unlike.value) and "user.clicks: no column" in str(unlike.value)


def table_of(given: Samples) -> pa.Table:
    columns = {name: pa.array(values) for name, values in given.items() if not isinstance(values, np.ndarray) or values.ndim == 1}
    lists = {
        name: pa.FixedSizeListArray.from_arrays(pa.array(v.reshape(-1)), v.shape[1]) for name, v in given.items() if name not in columns
    }
    return pa.table({**columns, **lists})


def test_files_of_samples(tmp_path: Path) -> None:
    given = samples(SPACE, 3000)
    table = table_of(given)
    named = [i for i in range(3000) if i % 10]  # an event without an item counts for its user alone
    items = pa.array([id if i % 10 else "" for i, id in enumerate(given["item_id"])])
    table = table.set_column(table.schema.get_field_index("item_id"), "item_id", items.dictionary_encode())
    seconds = table["event_time"]
    for number, times in enumerate(
        (seconds, pa.array(np.round(seconds.to_numpy() * 1000).astype(np.int64)).cast(pa.timestamp("ms", "UTC")))
    ):
        one = table.set_column(table.schema.get_field_index("event_time"), "event_time", times)
        pq.write_table(one.slice(number * 1500, 1500), tmp_path / f"{number}.parquet", row_group_size=400)
    found = of(replay_tables.fold(SPACE, replay_files.of_files(str(tmp_path), SPACE).tasks, 2))
    expected = streamed(SPACE, [rows(SPACE, "user", given), rows(SPACE, "item", given, np.array(named))])
    refuse_differences(SPACE, found, expected)


@pytest.mark.parametrize(
    ("column", "values", "why"),
    [
        ("event", ["like"] * 9, "event 'like' is not in the space's"),
        ("event_time", pa.array([1] * 9), "event_time is int64; it must be a timestamp"),
        ("event_time", [-1.0] * 9, "event_time of row 0 is -1.0: before 1970"),
        ("user_id", ["u" * 65] * 9, "an id is empty, or has over 64 bytes"),
        ("cr", [[1.0] * 7] * 9, "a source must hold 8 numbers"),
        ("cr", [[np.inf] * 8] * 9, "not finite"),
    ],
)
def test_bad_samples_are_named(tmp_path: Path, column: str, values: object, why: str) -> None:
    table = table_of(samples(SPACE, 9))
    pq.write_table(table.set_column(table.schema.get_field_index(column), column, pa.array(values)), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=f"row group 0 of .*a.parquet cannot be replayed: .*{why}"):
        replay_tables.fold(SPACE, replay_files.of_files(str(tmp_path / "a.parquet"), SPACE).tasks, 1)


def test_files_of_two_models_are_refused(tmp_path: Path) -> None:
    table = table_of(samples(SPACE, 9))
    for name, model in (("a", Model("m@1", "1")), ("b", Model("elsewhere/m", "1")), ("c", None)):
        said = {} if model is None else {replay_files.MODEL: json.dumps(asdict(model))}
        pq.write_table(table.replace_schema_metadata(said), tmp_path / f"{name}.parquet")
    of = replay_files.of_files(str(tmp_path), SPACE).model
    assert of is not None and of.digest == "1"  # one model in two places, and a file that says nothing
    pq.write_table(table.replace_schema_metadata({replay_files.MODEL: json.dumps(asdict(Model("m@2", "2")))}), tmp_path / "d.parquet")
    with pytest.raises(DataError, match=r"vectors of several models \(elsewhere/m, m@2\), which are never averaged"):
        replay_files.of_files(str(tmp_path), SPACE)


def test_missing_columns_are_named(tmp_path: Path) -> None:
    pq.write_table(table_of(samples(SPACE, 9)).drop_columns(["ur", "event"]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="has no column event, ur; space 'old' needs user_id, item_id, event, event_time"):
        replay_files.of_files(str(tmp_path / "*.parquet"), SPACE)
