"""One partition of a representation topic, read from its beginning to an offset that is then recorded.

Exact means: the state is what any read_committed reader of these offsets gets. Compaction is the one thing that could take something away
while it is read: a key's record below the end goes once a newer one is written above it. So what was added meanwhile is read too, until
there is so little of it that no cleaner, which leaves the newest segment alone, can have come by.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from crossrep import kafka
from crossrep.control.spaces import Published
from crossrep.errors import SpaceError, TopicError
from crossrep.spec import Space
from crossrep.views.probe import describe
from crossrep.views.table import RecordTable

TAIL = 2.0  # seconds the last part of a partition may take to read

Progressed = Callable[[int], None]  # how many offsets further


@dataclass(frozen=True)
class PartitionState:
    """What a partition holds of one entity at `end`."""

    number: int
    first: int  # the first offset there was
    end: int  # everything committed below it is in the table
    table: RecordTable


def read(space: Space, entity: str, number: int, bootstrap: str, progressed: Progressed = lambda offsets: None) -> PartitionState:
    """The state of partition `number` of an entity's topic, at the end it has now or a little later.

    Memory: the partition's keys, as `LocalView` holds them.

    Raises:
        BadRecord: a record is not one of this space.
        CrossrepError: the cluster does not answer, or there is no memory.
    """
    topic, table = space.representations_topic(entity), RecordTable(space, entity)
    client = kafka.consumer(bootstrap)
    try:
        start, _ = kafka.watermarks(client, topic, number)
        done = start
        while True:
            asked = time.monotonic()
            _, end = kafka.watermarks(client, topic, number)  # in front of any open transaction: the consumer is read_committed
            for run in kafka.runs(bootstrap, topic, {number: (done, end)}):
                table.apply([message.key() for message in run], [message.value() for message in run])
                reached = run[-1].offset() + 1
                progressed(reached - done)
                done = reached
            progressed(end - done)  # transaction markers
            done = end
            if time.monotonic() - asked < TAIL:
                return PartitionState(number, start, end, table)
    finally:
        client.close()


def refuse_changed(published: Published, entities: list[str], bootstrap: str) -> None:
    """Are the entities' topics those that were published, and not in the middle of a rewind?

    Raises:
        TopicError, SpaceError: no; says what to do.
    """
    space = published.space
    if published.rewinding:
        raise SpaceError(
            f"space {space.name!r} is being rewound, or a rewind was interrupted: half of its state is of before. Finish it first: "
            f"crossrep rewind {space.name} {published.rewinding}"
        )
    for topic in map(space.representations_topic, entities):
        found, known = str(describe(topic, bootstrap).topic_id), published.topic_ids.get(topic)
        if found != known:
            raise TopicError(
                f"{topic} was deleted and created anew (id {found}, not {known} as published). Publish it again: crossrep topics create "
                "SPEC.toml"
            )


def sizes(space: Space, entities: list[str], bootstrap: str) -> int:
    """Offsets there are to read, in all partitions; for progress bars.

    Raises:
        CrossrepError: the cluster does not answer.
    """
    return sum(end - first for entity in entities for first, end in kafka.bounds(bootstrap, space.representations_topic(entity)).values())
