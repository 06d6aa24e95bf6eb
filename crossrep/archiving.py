"""Archiving: the frames topic read to its end, into files, and a cut behind them.

It is a reader like any other: no consumer group, no worker's help, nothing written to Kafka. What is there says where to go on.

A *cut* says for which events the archive is complete. `crossrep infer` commits a batch's frames and the offsets of its events in one
transaction. So:

1. The group's committed offsets G are read, all as of one moment.
2. Then the ends E of the frames topic, open transactions included: every frame whose transaction set an offset of G was appended before.
3. Everything committed below E is read and archived, once no transaction is open below it.

Every batch that ends at G or before it is then in the archive, whole; and none lies across G, since offsets of G are ends of batches. The
frames of later batches below E are told apart by what each says of its events (crossrep/lineage.py).

A rewind in between would take frames out and set G back: such a cut is not kept.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from confluent_kafka import Message

from crossrep import archive_columns, follow, forget, frames, groups, kafka, lineage, spaces
from crossrep.archive import About, Archive, Cut, Order, new_cut
from crossrep.archive_columns import Frame
from crossrep.errors import BadFrame, DataError, SpaceError, TopicError
from crossrep.spaces import Published
from crossrep.spec import Space, frame_group, infer_group

log = logging.getLogger(__name__)

FILE_ROWS = 1_000_000  # of one entity, at most

Progressed = Callable[[int, int], None]  # offsets further, of so many


@dataclass
class Report:
    """What one run did."""

    rows: dict[str, int]  # by entity
    bytes: int = 0
    files: int = 0
    frames: int = 0
    orders: int = 0  # to forget a key
    refused: int = 0  # frames that the fold refuses too
    first: dict[int, int] = field(default_factory=dict)  # partition -> the first offset read, where the archive began with this run
    cut: Cut | None = None  # None: a rewind was under way


def archive(
    name: str, bootstrap: str, store: Archive, accept_gap: bool = False, progressed: Progressed = lambda offsets, total: None
) -> Report:
    """Archive every frame that is committed now and not archived yet, and record a cut.

    A run that is killed leaves what it has published; the next goes on from there. Memory: FILE_ROWS rows of every entity.

    Args:
        accept_gap: go on though frames were deleted before they were archived.

    Raises:
        SpaceError, TopicError: the space is unknown or being rewound, or its topic is not the one that was archived before.
        DataError: frames were deleted before they were archived, or nothing can be written there.
        CrossrepError: the cluster does not answer.
    """
    published = spaces.find(name, bootstrap)
    space = published.space
    _begin(store, published, bootstrap)
    before = _moment(space, bootstrap)
    bounds = _bounds(space, bootstrap)
    total = sum(end - first for first, end in bounds.values())
    report = Report(dict.fromkeys(space.entities, 0))
    reached = {entity: store.progress(entity) for entity in space.entities}
    gaps = _gaps(store, reached, bounds)
    if gaps and not accept_gap:
        places = ", ".join(f"[{number}] {first} to {end}" for number, (first, end) in gaps.items())
        raise DataError(
            f"frames of {space.frames_topic} were deleted before they were archived (partition, offsets: {places}). Archive more often "
            "than retention deletes. To go on behind the gap, which replays will name: --accept-gap"
        )
    for number, (first, end) in bounds.items():
        starts = {entity: first if number in gaps else reached[entity].get(number, first) for entity in space.entities}
        if not any(number in reached[entity] for entity in reached):
            report.first[number] = first
        begin = max(first, min(starts.values()))
        progressed(begin - first, total)
        _partition(space, bootstrap, store, number, starts, (begin, end), report, lambda offsets: progressed(offsets, total))
    report.cut = _cut(space, bootstrap, before, {number: end for number, (_, end) in bounds.items()})
    if report.cut is not None:
        store.keep_cut(report.cut)
    return report


@dataclass(frozen=True)
class _Moment:
    """What tells whether a rewind came in between."""

    groups: dict[str, groups.Offsets]
    skipped: dict[int, list[tuple[int, int]]]


def _moment(space: Space, bootstrap: str) -> _Moment:
    skipped = {number: skipped for number, (_, skipped) in groups.folded(space, bootstrap).items()}
    committed = {group: groups.offsets(bootstrap, group) for group in (infer_group(space), frame_group(space))}
    return _Moment({group: offsets for group, offsets in committed.items() if offsets}, skipped)


def _cut(space: Space, bootstrap: str, before: _Moment, ends: dict[int, int]) -> Cut | None:
    """The cut of what was committed before the ends were asked for; None if a rewind came in between."""
    after = _moment(space, bootstrap)
    went_back = any(
        after.groups.get(group, {}).get(topic, {}).get(number, -1) < offset
        for group, topics in before.groups.items()
        for topic, numbers in topics.items()
        for number, offset in numbers.items()
    )
    if went_back or after.skipped != before.skipped or spaces.find(space.name, bootstrap).rewinding:
        log.warning("space %s was rewound meanwhile: no cut this time", space.name)
        return None
    return new_cut(before.groups, ends, before.skipped)


def _begin(store: Archive, published: Published, bootstrap: str) -> None:
    """Is what is there of this space and topic?"""
    space = published.space
    if published.rewinding:
        raise SpaceError(f"space {space.name!r} is being rewound. Finish it first: crossrep rewind {space.name} {published.rewinding}")
    topic_id = str(follow.describe(space.frames_topic, bootstrap).topic_id)
    about, new = store.about(), About(space=space.name, spec_hash=space.hash.hex(), spec=space.toml_dict, topic_id=topic_id)
    if about is None:
        store.begin(new)
    elif (about.spec_hash, about.topic_id) != (new.spec_hash, new.topic_id):
        raise TopicError(
            f"{store.root} is the archive of another {space.frames_topic} (id {about.topic_id}, spec {about.spec_hash}; now {topic_id}, "
            f"{new.spec_hash}): the topic was created anew. Archive to another place: --to URL"
        )


def _bounds(space: Space, bootstrap: str) -> dict[int, tuple[int, int]]:
    """Of every partition: first and next offset, what is not committed yet included."""
    client = kafka.consumer(bootstrap, config={"isolation.level": "read_uncommitted"})
    try:
        return {number: kafka.watermarks(client, space.frames_topic, number) for number in range(space.partitions)}
    finally:
        client.close()


def _gaps(store: Archive, reached: dict[str, dict[int, int]], bounds: dict[int, tuple[int, int]]) -> dict[int, tuple[int, int]]:
    """By partition: first and next offset of what retention has deleted and nothing says that it was archived."""
    cut = store.cut()  # behind the last frame lies its transaction's marker, which is in no file
    found = {}
    for number, (first, _) in bounds.items():
        ends = [progress[number] for progress in reached.values() if number in progress]
        archived = max(min(ends), cut.ends.get(number, 0) if cut else 0) if len(ends) == len(reached) else first
        if archived < first:
            found[number] = (archived, first)
    return found


def _partition(
    space: Space,
    bootstrap: str,
    store: Archive,
    number: int,
    starts: dict[str, int],
    bounds: tuple[int, int],
    report: Report,
    progressed: Callable[[int], None],
) -> None:
    """Read one partition to its end and publish its files."""
    segment: dict[str, list[Frame]] = {entity: [] for entity in space.entities}
    done, end = bounds
    for message in kafka.messages(bootstrap, space.frames_topic, {number: bounds}):
        offset, found = message.offset(), _read(space, message, store, report)
        progressed(offset + 1 - done)
        done = offset + 1
        if found is None or offset < starts[found.rows.entity]:
            continue
        if _hour(found) != _hour(next((fs[0] for fs in segment.values() if fs), found)) or _rows(segment) + len(found.rows) > FILE_ROWS:
            starts = _publish(space, store, number, starts, offset, segment, report)
            segment = {entity: [] for entity in space.entities}
        segment[found.rows.entity].append(found)
    progressed(end - done)
    _publish(space, store, number, starts, end, segment, report)


def _hour(frame: Frame) -> float:
    return frame.append_time // 3600


def _rows(segment: dict[str, list[Frame]]) -> int:
    return max(sum(len(frame.rows) for frame in found) for found in segment.values())


def _read(space: Space, message: Message, store: Archive, report: Report) -> Frame | None:
    """A frame as it was sent; None: an order to forget, which is kept, or what the fold refuses too."""
    value, number, append_time = message.value(), message.partition(), message.timestamp()[1] / 1000
    try:
        if forget.is_order(value):
            order = forget.decode(space, value, number)
            where = {"partition": number, "offset": message.offset(), "append_time": append_time}
            store.keep_order(Order(entity=order.entity, key=order.key.hex(), **where))
            report.orders += 1
            return None
        rows = frames.decode(space, value, append_time, number)
    except BadFrame:
        report.refused += 1
        return None
    header = dict(message.headers() or []).get(lineage.HEADER)
    return Frame(rows, frames.vectors_as_sent(value), message.offset(), append_time, header.decode() if header else None)


def _publish(
    space: Space, store: Archive, number: int, starts: dict[str, int], end: int, segment: dict[str, list[Frame]], report: Report
) -> dict[str, int]:
    """A file for every entity, also without rows: its name says how far the archive is. Returns where the next ones begin."""
    last = max((found[-1].append_time for found in segment.values() if found), default=None)
    if last is None:
        return starts
    for entity, found in segment.items():
        if starts[entity] < end:
            data = archive_columns.encoded(space, entity, number, found)
            store.put(store.path(entity, number, starts[entity], end, last), data)
            report.files += 1
            report.bytes += data.size
            report.frames += len(found)
            report.rows[entity] += sum(len(frame.rows) for frame in found)
    return {entity: max(start, end) for entity, start in starts.items()}
