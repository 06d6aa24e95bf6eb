"""A day of impressions and clicks with all that training sets are made of: frames, an archive of them, and samples."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from confluent_kafka import TopicPartition

import crossrep
from crossrep import kafka
from crossrep.archive.archiving import archive
from crossrep.archive.store import Archive
from crossrep.spec import Space, infer_group
from crossrep.training.samples import CODEC
from crossrep.training.sets import Chosen, TrainingSet, TrainingSets, make
from tests.cluster import new_space

HOUR, START, ALL = 3600, 1_650_000_000, Chosen()


@dataclass
class World:
    space: Space
    bootstrap: str
    sets: TrainingSets
    archive: Archive
    samples: list[dict[str, Any]]  # the last word on each that the archive knows, in event-time order

    def make(self, chosen: Chosen = ALL, **options: Any) -> TrainingSet:
        return make(self.space, self.bootstrap, self.sets, self.archive, chosen, **options)

    def read(self, made: TrainingSet) -> Any:
        return pa.concat_tables([pq.read_table(self.sets.path(made.id, file.path)) for file in made.files])

    def archive_up_to(self, impressions: int) -> None:
        """As if `infer` had consumed so many of the first partition by now."""
        infer = kafka.consumer(self.bootstrap, infer_group(self.space))
        infer.commit(offsets=[TopicPartition(self.space.inputs.impressions, 0, impressions)], asynchronous=False)
        infer.close()
        archive(self.space.name, self.bootstrap, self.archive)


def made_world(bootstrap: str, folder: Path, n: int = 600) -> World:
    """Of 20 users and 10 items: events as another team's model writes them, and the samples they make; 5 of 6 are archived."""
    space, _ = new_space(bootstrap, folder, partitions=2)
    random = np.random.default_rng(0)
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
    known = [sample for sample in last.values() if int(sample["sample_id"][2:]) < n * 5 // 6]
    known.sort(key=lambda sample: (sample["event_time"], sample["sample_id"]))
    world = World(space, bootstrap, TrainingSets(str(folder / "sets"), space.name), Archive(str(folder / "archive"), space.name), known)
    world.archive_up_to(n * 5 // 6)
    return world
