"""Reading training.<space>: labelled samples with what was known before them, in batches of arrays, for training."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping

from confluent_kafka import Message

from crossrep import kafka
from crossrep.control import groups, spaces
from crossrep.errors import DataError, SpaceError
from crossrep.spec import Space
from crossrep.training.records import TrainingBatch, TrainingLayout

POLL = 1.0  # seconds between looks for more, when following


def training_samples(
    space: str,
    bootstrap: str | None = None,
    *,
    batch_size: int = 4096,
    start: Mapping[int, int] | None = None,
    partitions: Collection[int] | None = None,
    follow: bool = False,
) -> Iterator[TrainingBatch]:
    """The training samples of a space, as `crossrep training-set --topic` has published them (docs/samples.md).

        for batch in crossrep.training_samples("kuairand-v1"):
            batch.labels, batch.known["user"]["cr"].vectors, batch.known["user"]["cr"].weights

    Each published record once, in the order of its partition; partitions are mixed. Ends with the last record that is there when that is
    reached. Nothing is committed: keep `batch.positions` with what you have learnt, and give it as `start` to go on behind it.

    Args:
        space: the name of a published space, or an alias, which is looked up once.
        batch_size: samples a batch; the last one, and with `follow` the last before a pause, may have fewer.
        start: `positions` of the batch to go on behind; partitions that it does not name are read from their beginning.
        partitions: read these alone, so that several trainers share the work: a user's samples lie in one.
        follow: wait for more, for ever.

    Raises:
        SpaceError: no such space, or no such partition.
        DataError: what `start` names is not there any more, or not yet: samples are deleted after the topic's retention.ms.
        BadRecord: a message is no training sample of this space.
        CrossrepError: the cluster does not answer, or the topic is missing.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; give at least 1")
    address = kafka.bootstrap_servers(bootstrap)
    found = spaces.resolve(space, address).space
    wanted = set(range(found.partitions)) if partitions is None else set(partitions)
    if unknown := sorted((wanted | set(start or ())) - set(range(found.partitions))):
        raise SpaceError(f"space {found.name!r} has partitions 0 to {found.partitions - 1}, not {unknown[0]}")
    bounds = _bounds(found, address, {number: (start or {}).get(number) for number in wanted})
    return _batches(found, address, batch_size, {number: begin for number, (begin, _) in bounds.items()}, follow)


def _bounds(space: Space, bootstrap: str, begins: Mapping[int, int | None]) -> dict[int, tuple[int, int]]:
    """What there is to read from here (None: the beginning) on, first and next offset. Raises DataError: that is not in the topic."""
    found, bounds = kafka.bounds(bootstrap, space.training_topic), {}
    for number, begin in begins.items():
        first, end = found[number]
        bounds[number] = (first if begin is None else max(begin, first)), end
        if begin is not None and (groups.missed(begin, first, end) or begin > end):
            raise DataError(
                f"{space.training_topic}[{number}] holds the offsets from {first} up to {end}, not {begin}: samples were deleted by "
                "retention before they were read, or the topic was created anew. Begin without `start`"
            )
    return bounds


def _batches(space: Space, bootstrap: str, size: int, positions: dict[int, int], follow: bool) -> Iterator[TrainingBatch]:
    layout = TrainingLayout(space)
    while True:
        bounds = _bounds(space, bootstrap, positions)
        left: list[Message] = []
        for run in kafka.runs(bootstrap, space.training_topic, bounds):
            left += run
            while len(left) >= size:
                yield _batch(layout, left[:size], positions)
                left = left[size:]
        if left:
            yield _batch(layout, left, positions)
        if not follow:
            return
        positions |= {number: end for number, (_, end) in bounds.items()}  # past the markers of transactions
        time.sleep(POLL)


def _batch(layout: TrainingLayout, messages: list[Message], positions: dict[int, int]) -> TrainingBatch:
    for message in messages:
        positions[message.partition()] = message.offset() + 1
    return layout.decode([message.value() for message in messages], dict(positions))
