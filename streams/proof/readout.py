"""What the changelog shows at one moment: the newest record of every key, and the progress before and after it was read.

A transaction's parts become visible one by one: the group's offset may already be there while the records of the same flush are still on
their way. So the progress is read first, and the changelog only once everything that lay in it then is committed or aborted: every frame
below the first progress is in what is seen, and no frame from the second one on.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

import numpy as np
from confluent_kafka import IsolationLevel, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec
from numpy.typing import NDArray

from crossrep import kafka
from crossrep.columnar.records import RecordLayout
from crossrep.errors import CrossrepError
from crossrep.keys import Keys
from crossrep.spec import Space, fold_group
from state import progress
from state.progress import Progress

PATIENCE = 30.0  # seconds an open transaction is waited for: a dead worker's is aborted after 10

Bounds = dict[int, tuple[int, int]]  # partition -> first and next offset
Place = tuple[int, bytes]  # partition, key: a key in a partition that is not its own is another one


@dataclass(frozen=True)
class Records:
    """Keys and their records, in the same order."""

    keys: list[Place]
    values: NDArray[np.void]


@dataclass(frozen=True)
class Seen:
    """What readers see of every key of a sample."""

    before: dict[int, Progress]  # every frame below is in the records
    after: dict[int, Progress]  # no frame from here on is
    records: dict[str, Records]


def look(space: Space, bootstrap: str, share: float = 1.0) -> Seen:
    """Read the changelog of every entity to its end, while it is written.

    Args:
        share: of all keys, chosen by their hash.

    Raises:
        CrossrepError: the state was rewound meanwhile, the group's offsets are lost, or the cluster does not answer.
    """
    before = _progress(space, bootstrap)
    topics = {space.representations_topic(entity): entity for entity in space.entities}
    bounds = settled(bootstrap, topics)
    records = {}
    for topic, entity in topics.items():
        found = {place: value for place, value in newest(bootstrap, topic, bounds[topic], share).items() if value}
        records[entity] = Records(list(found), RecordLayout(space, entity).decode(list(found.values()), f"a record of {topic}:"))
    after = _progress(space, bootstrap)
    lost = {number for about in records.values() for number, _ in about.keys if after[number].offset < 0}
    if lost:
        raise CrossrepError(
            f"group {fold_group(space)!r} has no offsets of partitions {sorted(lost)}, though there are records: they have expired. "
            "Start a fold worker: it finds its place again by the records"
        )
    refuse_rewound(before, after)
    return Seen(before, after, records)


def refuse_rewound(before: dict[int, Progress], after: dict[int, Progress]) -> None:
    """Raises CrossrepError if the state went back in between."""
    if any(after[n].offset < before[n].offset or after[n].skipped != before[n].skipped for n in before):
        raise CrossrepError("the state was rewound meanwhile; verify again")


def newest(bootstrap: str, topic: str, bounds: Bounds, share: float = 1.0) -> dict[Place, bytes]:
    """The newest value of every key of the sample within the bounds; empty where the key was deleted."""
    found: dict[Place, bytes] = {}
    messages = kafka.messages(bootstrap, topic, bounds)
    while run := list(islice(messages, 10_000)):
        for i in np.flatnonzero(chosen(Keys.of([message.key() for message in run]), share)).tolist():
            found[run[i].partition(), run[i].key()] = run[i].value() or b""
    return found


def chosen(keys: Keys, share: float) -> NDArray[np.bool_]:
    """Which keys belong to a sample: always the same, whatever their partition."""
    hashes = keys.partitions(2**31 - 1).astype(np.uint64)  # nearly all of murmur2
    return (hashes * np.uint64(0x9E3779B1) & np.uint64(0xFFFFFFFF)) < share * 2**32


def settled(bootstrap: str, topics: Iterable[str]) -> dict[str, Bounds]:
    """First and next offset of every partition, once all that lies there now is committed or aborted.

    Raises:
        CrossrepError: a transaction stays open, or the cluster does not answer.
    """
    admin = kafka.admin(bootstrap)
    try:
        known = kafka.retried(lambda: admin.list_topics(timeout=kafka.REQUEST_TIMEOUT), kafka.TRANSIENT).topics
        missing = sorted(set(topics) - set(known))
        if missing:
            raise CrossrepError(f"topics {', '.join(missing)} do not exist. Create them: crossrep topics create SPEC.toml")
        parts = [TopicPartition(topic, number) for topic in topics for number in known[topic].partitions]
        firsts = _offsets(admin, parts, OffsetSpec.earliest())
        ends = _offsets(admin, parts, OffsetSpec.latest(), IsolationLevel.READ_UNCOMMITTED)
        deadline = time.monotonic() + PATIENCE
        while True:
            visible = _offsets(admin, parts, OffsetSpec.latest())
            still_open = [f"{topic}[{number}]" for (topic, number), end in ends.items() if visible[topic, number] < end]
            if not still_open:
                break
            if time.monotonic() > deadline:
                raise CrossrepError(f"a transaction on {', '.join(still_open)} has been open for over {PATIENCE:.0f} s: who writes there?")
            time.sleep(0.05)
    except KafkaException as error:
        raise CrossrepError(f"the cluster does not say where its topics end: {error.args[0].str()}") from None
    found: dict[str, Bounds] = {topic: {} for topic in topics}
    for (topic, number), first in firsts.items():
        found[topic][number] = first, visible[topic, number]
    return found


def _offsets(
    admin: AdminClient, parts: list[TopicPartition], which: OffsetSpec, isolation: IsolationLevel = IsolationLevel.READ_COMMITTED
) -> dict[tuple[str, int], int]:
    def ask() -> dict[tuple[str, int], int]:
        asked = admin.list_offsets(dict.fromkeys(parts, which), isolation_level=isolation, request_timeout=kafka.REQUEST_TIMEOUT)
        return {(part.topic, part.partition): future.result().offset for part, future in asked.items()}

    return kafka.retried(ask, kafka.TRANSIENT)


def _progress(space: Space, bootstrap: str) -> dict[int, Progress]:
    """Every partition's committed progress; offset -1 where there is none."""
    try:
        found = progress.committed(space, bootstrap)
    except KafkaException as error:
        raise CrossrepError(f"the cluster does not say how far {space.frames_topic} is folded: {error.args[0].str()}") from None
    return {number: found.get(number, Progress(-1)) for number in range(space.partitions)}
