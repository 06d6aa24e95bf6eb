"""Training samples as a topic: every record of samples.<space>, with what was known before its impression, to training.<space>.

One record for one, in the same partition and order, under the same key. Samples and the offsets up to which samples.<space> is done, those
of the consumer group training.<space>, are one Kafka transaction: whoever repeats the command goes on from there, and fences the one
before. Samples whose impressions the archive does not know yet wait for a later run, and so does what lies behind them in the partition.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from confluent_kafka import KafkaException, Producer, TopicPartition
from numpy.typing import NDArray

from crossrep import kafka
from crossrep.archive.store import Archive
from crossrep.columnar.rows import Known
from crossrep.control import groups
from crossrep.control.cuts import Cut
from crossrep.errors import CrossrepError, StateError, TopicError
from crossrep.extras import extra
from crossrep.spec import Space, training_group
from crossrep.training import sample_tables
from crossrep.training.attach import Attached, Progressed, archived, attach_all, event_times, keys_in, known_before, usable_cut
from crossrep.training.records import TrainingLayout
from crossrep.training.samples import CODEC
from crossrep.training.sweep import MEMORY

with extra("analytics"):
    import pyarrow as pa

TIMEOUT = 60.0  # seconds a transaction may stay open; one takes far less than one
TRANSACTION_BYTES = 16 << 20  # of samples, about
_SCHEMA = sample_tables.SCHEMA.append(pa.field("partition", pa.int32())).append(pa.field("offset", pa.int64()))

Positions = dict[int, int]  # partition of samples.<space> -> the next sample to publish


@dataclass(frozen=True)
class Added:
    """What one run has published."""

    samples: int
    clicked: int  # of these
    waiting: int  # samples that are left for a later run: the archive does not know their impressions yet
    entities: dict[str, Attached]


def publish(
    space: Space,
    bootstrap: str,
    archive: Archive,
    delay: float = 0.0,
    start: str | None = None,
    accept_gap: bool = False,
    memory: int = MEMORY,
    progressed: Progressed = lambda what, done, total: None,
) -> Added:
    """Publish the samples that came since the last run. Killed at any moment and repeated, no sample is missing or there twice.

    Memory: as of `sets.make`, for the samples since the last run; and each run reads the whole archive, if there are any.

    Args:
        delay: seconds before the impression from which on nothing is known.
        start: earliest or latest: where to begin if the group has no offsets although there are training samples.
        accept_gap: go on though samples were deleted before they were published.

    Raises:
        DataError: there is no archive, or one of another spec or without a cut, or a file is damaged.
        TopicError: the topic is missing, or does not fit.
        StateError: the group has lost its offsets, or samples were deleted before they were published; says how to go on.
        CrossrepError: the cluster does not answer, or another run has taken over. Repeating is safe.
    """
    cut = usable_cut(space, archive)
    producer = kafka.transactional_producer(bootstrap, training_group(space), TIMEOUT)
    client = kafka.consumer(bootstrap, training_group(space))
    group = client.consumer_group_metadata()
    try:
        refuse_unfit(space, bootstrap)
        kafka.retried(lambda: producer.init_transactions(kafka.REQUEST_TIMEOUT))  # ends what a killed run has left open
        bounds = _bounds(space, bootstrap, client, start, accept_gap)
        table, ends, waiting = _samples(space, bootstrap, bounds, cut, progressed)
        positions = {number: first for number, (first, _) in bounds.items()}
        with tempfile.TemporaryDirectory(prefix="crossrep-") as folder:
            known, about = attach_all(space, table, archive, cut, delay, memory, Path(folder), progressed)
            for values in _encoded(space, table, known, cut, delay):
                positions |= {number: offset + 1 for number, offset, _, _ in values}
                _commit(producer, group, space, values, positions)
                progressed("publishing", len(values), len(table))
        _commit(producer, group, space, [], ends)  # past markers too; and offsets that nobody commits for a week expire
    except KafkaException as error:
        raise CrossrepError(
            f"publishing to {space.training_topic} stopped: {error.args[0].str()}. If no other run has taken over, repeat the command: "
            "what is published already is not published again"
        ) from error
    finally:
        client.close()
    return Added(len(table), int(np.sum(table["label"].to_numpy())), waiting, about)


def refuse_unfit(space: Space, bootstrap: str) -> None:
    """Is the topic there, as `crossrep topics create` makes it? Raises TopicError that says what to do."""
    topic, admin = space.training_topic, kafka.admin(bootstrap)
    found = kafka.retried(lambda: admin.list_topics(timeout=kafka.REQUEST_TIMEOUT), kafka.TRANSIENT).topics.get(topic)
    if found is None:
        raise TopicError(f"topic {topic} is missing. Create it: crossrep topics create SPEC.toml")
    if len(found.partitions) != space.partitions:
        raise TopicError(
            f"{topic} has {len(found.partitions)} partitions, {space.samples_topic} {space.partitions}: samples would not lie where their "
            "users do. Delete it, and crossrep topics create SPEC.toml"
        )
    policy = kafka.settings(bootstrap, topic)["cleanup.policy"]
    if policy != "delete":
        raise TopicError(
            f"{topic} has cleanup.policy={policy}: compaction would leave one sample of each user. Set it: kafka-configs.sh --alter "
            f"--topic {topic} --add-config cleanup.policy=delete"
        )


def _bounds(space: Space, bootstrap: str, client: Any, start: str | None, accept_gap: bool) -> sample_tables.Bounds:
    """What is to be published: by partition, first and next offset of samples."""
    topic, group = space.samples_topic, training_group(space)
    found = kafka.committed(client, [TopicPartition(topic, number) for number in range(space.partitions)])
    bounds = kafka.bounds(bootstrap, topic)
    if start is None and groups.lost(bootstrap, group, [topic], space.training_topic):
        raise StateError(
            f"group {group!r} has no offsets, but {space.training_topic} holds samples already. If the offsets expired: --start latest "
            "goes on with the samples that come from now on, --start earliest publishes all of them again, under the same ids"
        )
    begins: sample_tables.Bounds = {}
    for part in found:
        first, end = bounds[part.partition]
        begin = part.offset if part.offset >= 0 else end if start == "latest" else first
        if begin > end:
            raise StateError(
                f"{topic}[{part.partition}] ends at {end}, but the next to publish is {begin}: the topic was created anew. To begin anew "
                f"too, beside the old one's samples: kafka-consumer-groups.sh --delete --group {group}, and --start earliest"
            )
        if first > begin and not accept_gap:
            raise StateError(
                f"{topic}[{part.partition}] begins at {first}, but is published only up to {begin}: samples were deleted before they were "
                "published. To go on without them: --accept-gap. Run the command more often than the topic's retention.ms"
            )
        begins[part.partition] = max(begin, first), end
    return begins


def _samples(space: Space, bootstrap: str, bounds: sample_tables.Bounds, cut: Cut, progressed: Progressed) -> tuple[Any, Positions, int]:
    """The samples to publish, in order; up to where that is; and how many must wait."""
    total = sum(end - first for first, end in bounds.values())
    tables, ends, waiting = [_SCHEMA.empty_table()], {}, 0
    for number, (first, end) in sorted(bounds.items()):
        read = sample_tables.in_order(space, bootstrap, number, first, end, lambda done: progressed("samples", done, total))
        samples = [{**sample, "partition": number, "offset": offset} for offset, sample in read]
        there = archived(space, cut, [sample["sample_id"] for sample in samples])
        ready = len(samples) if there.all() else int(np.argmin(there))
        ends[number] = end if ready == len(samples) else samples[ready]["offset"]
        waiting += len(samples) - ready
        tables.append(pa.Table.from_pylist(samples[:ready], _SCHEMA))
    return pa.concat_tables(tables).combine_chunks(), ends, waiting


def _encoded(space: Space, table: Any, known: dict[str, Known], cut: Cut, delay: float) -> Iterator[list[tuple[int, int, str, bytes]]]:
    """A transaction's samples at a time: partition, offset of the sample, key, value."""
    layout, times = TrainingLayout(space), event_times(table)
    before = known_before(times, delay)
    reached = {entity: _archived_to(space, table, entity, cut) for entity in known}
    step = max(1, TRANSACTION_BYTES // (layout.size + 200))
    for at in range(0, len(table), step):
        rows = slice(at, min(at + step, len(table)))
        part = table[rows]
        for name in ("event_time", "clicked_at"):
            part = part.set_column(part.schema.get_field_index(name), name, part[name].cast(pa.int64()))
        samples = part.to_pylist()
        values = layout.encode(
            list(map(CODEC.encode, samples)),
            before[rows],
            {entity: found.part(rows) for entity, found in known.items()},
            {entity: offsets[rows] for entity, offsets in reached.items()},
        )
        yield [(sample["partition"], sample["offset"], sample["user_id"], value) for sample, value in zip(samples, values)]


def _archived_to(space: Space, table: Any, entity: str, cut: Cut) -> NDArray[np.int64]:
    """[n], the last offset of the key's partition that the cut covers; -1: none, or the sample has no such key."""
    keys, rows = keys_in(table, space.key_field(entity))
    ends = np.array([cut.ends.get(number, 0) for number in range(space.partitions)])
    reached = np.full(len(table), -1)
    reached[rows] = ends[keys.partitions(space.partitions)] - 1
    return reached


def _commit(producer: Producer, group: Any, space: Space, values: list[tuple[int, int, str, bytes]], positions: Positions) -> None:
    """Samples and progress, in one transaction. Raises KafkaException: it may be repeated by a new producer."""
    producer.begin_transaction()
    for number, _, user, value in values:
        producer.produce(space.training_topic, value, user, partition=number)
    places = [TopicPartition(space.samples_topic, number, offset) for number, offset in positions.items()]
    kafka.retried(lambda: producer.send_offsets_to_transaction(places, group))
    kafka.retried(producer.commit_transaction)
