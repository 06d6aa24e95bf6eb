"""Training sets from a real broker and archive: the last word on every sample, what was known before it, and planted leaks found."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crossrep import kafka
from crossrep.archive.store import Archive
from crossrep.errors import DataError
from crossrep.spec import Space
from crossrep.training import leaks
from crossrep.training.sets import Chosen, make, names_of, schema
from tests.cluster import SPEC
from tests.crossrep.training.training_world import ALL, HOUR, START, World, made_world

NAMES = ["sample_id", "user_id", "item_id", "event_time", "label", "clicked_at"]


@pytest.fixture(scope="module")
def world(bootstrap: str, tmp_path_factory: pytest.TempPathFactory) -> World:
    return made_world(bootstrap, tmp_path_factory.mktemp("training"))


def test_the_last_word_on_every_sample_that_the_archive_knows(world: World) -> None:
    made = world.make()
    rows = world.read(made)
    found = rows.select(NAMES).set_column(3, "event_time", rows["event_time"].cast(pa.int64())).to_pylist()
    for row in found:
        row["clicked_at"] = row["clicked_at"] and round(row["clicked_at"].timestamp() * 1000)
    assert found == [{name: sample[name] for name in NAMES} for sample in world.samples]
    assert (made.rows, made.left_out, made.clicked) == (500, 100, sum(sample["label"] for sample in world.samples))
    assert made.samples == kafka.bounds(world.bootstrap, world.space.samples_topic)
    assert rows.schema.equals(schema(world.space)) and made.entities["user"].combined == 0
    assert leaks.check(world.sets, made, world.archive) == (500, [])
    first = rows.slice(0, 1).to_pylist()[0]
    assert not first["user_found"] and first["user_count"] == 0 and first["user_cr"] is None and first["user_cr_weight"] == 0
    assert all(row["user_event_time"] < row["event_time"] for row in rows.to_pylist() if row["user_found"])


def test_one_part_of_the_day_served_a_minute_old_with_little_memory(world: World) -> None:
    since, until = (datetime.fromtimestamp(START + hours * HOUR, UTC) for hours in (6, 12))
    made = world.make(Chosen(since, until, delay=60.0), memory=1000)
    rows = world.read(made).to_pylist()
    assert [row["sample_id"] for row in rows] == [
        sample["sample_id"] for sample in world.samples if START + 6 * HOUR <= sample["event_time"] / 1000 < START + 12 * HOUR
    ]
    assert leaks.check(world.sets, made, world.archive) == (len(rows), [])
    assert all((row["event_time"] - row["item_event_time"]).total_seconds() > 60 for row in rows)


def test_a_planted_leak_is_found(world: World) -> None:
    """Attached as of an hour after the impression: whatever happened in that hour, its own click included, is the future."""
    made = world.make(Chosen(delay=-float(HOUR)))
    checked, findings = leaks.check(world.sets, made, world.archive, rows=300)
    future = {found.sample_id for found in findings if found.future}
    assert checked == 300 and len(future) > 290  # all but those after which nothing happened
    assert any("events are attached" in found.problem for found in findings)
    assert any("not before" in found.problem for found in findings)


def test_a_leak_of_the_same_second_is_found(world: World) -> None:
    """One millisecond too much, and each sample knows its own impression."""
    made = world.make(Chosen(delay=-0.001))
    _, findings = leaks.check(world.sets, made, world.archive)
    assert {(found.sample_id, found.entity) for found in findings if found.future} == {
        (sample["sample_id"], entity) for sample in world.samples for entity in ("user", "item")
    }


def test_a_vector_that_is_not_what_was_known_is_found(world: World) -> None:
    made = world.make()
    path = Path(world.sets.path(made.id, made.files[0].path))
    table = pq.read_table(path)
    turned = pa.FixedSizeListArray.from_arrays(pa.array(np.roll(table["user_cr"].combine_chunks().flatten().to_numpy(), 1)), 8)
    nulls = table["user_cr"].combine_chunks().is_null()
    turned = pa.array([None] * nulls.sum().as_py() + turned.to_pylist(), turned.type)
    at = table.schema.get_field_index("user_cr")
    pq.write_table(table.set_column(at, "user_cr", turned), path)
    _, findings = leaks.check(world.sets, made, world.archive, rows=50)
    assert findings and {found.problem for found in findings} == {"cr is not the aggregate of what was known before"}
    world.sets.remove(made.id)


def test_an_archive_of_another_spec_or_none_is_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no archive of space"):
        make(world.space, world.bootstrap, world.sets, Archive(str(tmp_path), world.space.name), ALL)
    other = Space.parse(SPEC.format(name=world.space.name, partitions=2).replace("4.0", "5.0"))
    with pytest.raises(DataError, match="another spec"):
        make(other, world.bootstrap, world.sets, world.archive, ALL)
    assert all(manifest.files for manifest in world.sets.published())


def test_no_column_hides_one_of_the_sample() -> None:
    spec = SPEC.format(name="ids", partitions=1).replace("[entities.user.columns.ur]", "[entities.user.columns.id]")
    space = Space.parse(spec)
    assert names_of(space)["user", "id"] == "user_id_" and len(set(schema(space).names)) == len(schema(space))
