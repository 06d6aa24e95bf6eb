"""Training sets from a real broker and archive: the last word on every sample, what was known before it, and planted leaks found."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from confluent_kafka import TopicPartition

import crossrep
from crossrep import kafka, leaks
from crossrep.archive import Archive
from crossrep.archiving import archive
from crossrep.errors import DataError
from crossrep.samples import CODEC
from crossrep.spec import Space, infer_group
from crossrep.training_sets import Chosen, TrainingSet, TrainingSets, make, names_of, schema
from tests.cluster import SPEC, new_space

HOUR, ALL = 3600, Chosen()
START = 1_650_000_000
NAMES = ["sample_id", "user_id", "item_id", "event_time", "label", "clicked_at"]


@dataclass
class World:
    space: Space
    bootstrap: str
    sets: TrainingSets
    archive: Archive
    samples: list[dict[str, Any]]  # the last word on each, in event-time order

    def make(self, chosen: Chosen = ALL, **options: Any) -> TrainingSet:
        return make(self.space, self.bootstrap, self.sets, self.archive, chosen, **options)

    def read(self, made: TrainingSet) -> Any:
        return pa.concat_tables([pq.read_table(self.sets.path(made.id, file.path)) for file in made.files])


@pytest.fixture(scope="module")
def world(bootstrap: str, tmp_path_factory: pytest.TempPathFactory) -> World:
    """A day of impressions and clicks of 20 users and 10 items: events as another team's model writes them, and the samples they make."""
    folder = tmp_path_factory.mktemp("training")
    space, _ = new_space(bootstrap, folder, partitions=2)
    random, n = np.random.default_rng(0), 600
    users, items = random.integers(0, 20, n), random.integers(0, 10, n)
    times = np.sort(random.integers(0, 24 * HOUR, n)) + START  # some at the same second
    with crossrep.FrameWriter(space.name, "w", bootstrap, combine=False) as writer:
        for part in np.array_split(np.arange(n), 5):
            sources = {name: random.normal(size=(len(part), dim)).astype(np.float32) for name, dim in space.sources.items()}
            kinds = np.where(random.random(len(part)) < 0.3, "click", "impression")
            for entity, ids in (("user", users), ("item", items)):
                writer.write(entity, [f"{entity[0]}{i}" for i in ids[part]], kinds, times[part], sources)
            writer.commit()
    producer, last = kafka.producer(bootstrap, partitioner="murmur2_random"), {}
    for number, label in [*((i, 0) for i in range(n)), *((i, 1) for i in range(0, n, 7))]:  # every seventh is corrected
        sample = {"sample_id": f"0-{number}", "impression_id": f"e{number}", "user_id": f"u{users[number]}", "item_id": f"i{items[number]}"}
        moment = int(times[number]) * 1000
        sample |= {"event_time": moment, "scenario": "feed", "branch": "ad", "label": label, "clicked_at": moment + 5 if label else None}
        producer.produce(space.samples_topic, CODEC.encode(sample), sample["user_id"])
        last[sample["sample_id"]] = sample
    assert producer.flush(30) == 0
    infer = kafka.consumer(bootstrap, infer_group(space))
    infer.commit(offsets=[TopicPartition(space.inputs.impressions, 0, 500)], asynchronous=False)
    infer.close()
    store = Archive(str(folder / "archive"), space.name)
    archive(space.name, bootstrap, store)
    known = sorted((s for s in last.values() if int(s["sample_id"][2:]) < 500), key=lambda s: (s["event_time"], s["sample_id"]))
    return World(space, bootstrap, TrainingSets(str(folder / "sets"), space.name), store, known)


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
    assert findings and {found.problem for found in findings} == {"user_cr is not the aggregate of what was known before"}
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
