"""Archiving: the frames topic read to its end, into files, and a cut behind them.

It is a reader like any other: no consumer group, no worker's help, nothing written to Kafka. What is there says where to go on.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from confluent_kafka import Message

from crossrep import kafka
from crossrep.archive import columns
from crossrep.archive.columns import Frame
from crossrep.archive.store import About, Archive, Order
from crossrep.columnar import forget, frames
from crossrep.control import binding, cuts, lineage, spaces
from crossrep.control.cuts import Cut
from crossrep.control.spaces import Published
from crossrep.errors import BadFrame, DataError, SpaceError, TopicError
from crossrep.files.dated import new_id
from crossrep.spec import Space
from crossrep.views.probe import describe

log = logging.getLogger(__name__)

FILE_ROWS = 250_000  # of one entity, at most; 110 MB of memory at 64 dims

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
    before = cuts.moment(space, bootstrap)
    bounds = _bounds(space, bootstrap)
    _say_whose(store, published, bootstrap)
    total = sum(end - first for first, end in bounds.values())
    report = Report(dict.fromkeys(space.entities, 0))
    last = store.cut()
    reached = {entity: {**(last.ends if last else {}), **store.progress(entity)} for entity in space.entities}
    gaps = _gaps(last, reached, bounds)
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
        if begin < end:
            _partition(space, bootstrap, store, number, starts, (begin, end), report, lambda offsets: progressed(offsets, total))
    report.cut = cuts.cut(space, bootstrap, before, {number: end for number, (_, end) in bounds.items()}, new_id(), last)
    if report.cut is None:
        log.warning("space %s was rewound meanwhile: no cut this time", name)
    else:
        store.keep_cut(report.cut)
    return report


def _begin(store: Archive, published: Published, bootstrap: str) -> None:
    """Is what is there of this space and topic?"""
    space = published.space
    if published.rewinding:
        raise SpaceError(f"space {space.name!r} is being rewound. Finish it first: crossrep rewind {space.name} {published.rewinding}")
    topic_id = str(describe(space.frames_topic, bootstrap).topic_id)
    about, new = store.about(), About(space=space.name, spec_hash=space.hash.hex(), spec=space.toml_dict, topic_id=topic_id)
    if about is None:
        store.begin(new)
    elif (about.spec_hash, about.topic_id) != (new.spec_hash, new.topic_id):
        raise TopicError(
            f"{store.root} is the archive of another {space.frames_topic} (id {about.topic_id}, spec {about.spec_hash}; now {topic_id}, "
            f"{new.spec_hash}): the topic was created anew. Archive to another place: --to URL"
        )


def _say_whose(store: Archive, published: Published, bootstrap: str) -> None:
    """Record the model: asked once the ends of what is to be archived are known, and written before the first file of it."""
    about, model = store.described(), binding.model_of(published, bootstrap)
    if model not in (None, about.model):
        store.begin(about.model_copy(update={"model": model}))


def _bounds(space: Space, bootstrap: str) -> dict[int, tuple[int, int]]:
    """Of every partition: first and next offset, what is not committed yet included."""
    client = kafka.consumer(bootstrap, config={"isolation.level": "read_uncommitted"})
    try:
        return {number: kafka.watermarks(client, space.frames_topic, number) for number in range(space.partitions)}
    finally:
        client.close()


def _gaps(last: Cut | None, reached: dict[str, dict[int, int]], bounds: dict[int, tuple[int, int]]) -> dict[int, tuple[int, int]]:
    """By partition: first and next offset of what retention has deleted and nothing says that it was archived."""
    found = {}
    for number, (first, _) in bounds.items():
        ends = [progress[number] for progress in reached.values() if number in progress]
        # Behind a partition's last frame lies its transaction's marker, which is in no file.
        archived = max(min(ends), last.ends.get(number, 0) if last else 0) if len(ends) == len(reached) else first
        if archived < first:
            found[number] = (archived, first)
    return found


@dataclass
class _Segment:
    """Frames of one partition that become a file for every entity, also without rows: its name says how far the archive is."""

    number: int
    starts: dict[str, int]  # by entity, the first offset of the next file
    frames: dict[str, list[Frame]] = field(default_factory=lambda: defaultdict(list))
    rows: Counter[str] = field(default_factory=Counter)
    hour: float = 0.0  # of the frames' append times

    def full(self, frame: Frame) -> bool:
        """Must it be published before this one is added?"""
        return bool(self.frames) and (self.hour != _hour(frame) or self.rows[frame.rows.entity] + len(frame.rows) > FILE_ROWS)

    def add(self, frame: Frame) -> None:
        self.frames[frame.rows.entity].append(frame)
        self.rows[frame.rows.entity] += len(frame.rows)
        self.hour = _hour(frame)

    def publish(self, space: Space, store: Archive, end: int, report: Report) -> None:
        """Everything below offset `end`; nothing if there are no frames."""
        if not self.frames:
            return
        for entity, start in self.starts.items():
            if start < end:
                found = self.frames.get(entity, [])
                data = columns.encoded(space, entity, self.number, found)
                store.put(store.path(entity, self.number, start, end, self.hour * 3600), data)
                report.files += 1
                report.bytes += data.size
                report.frames += len(found)
                report.rows[entity] += self.rows[entity]
                self.starts[entity] = end
        self.frames.clear()
        self.rows.clear()


def _hour(frame: Frame) -> float:
    return frame.append_time // 3600


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
    segment = _Segment(number, starts)
    done, end = bounds
    for message in kafka.messages(bootstrap, space.frames_topic, {number: bounds}):
        offset, found = message.offset(), _read(space, message, store, report)
        progressed(offset + 1 - done)
        done = offset + 1
        if found is not None and offset >= segment.starts[found.rows.entity]:
            if segment.full(found):
                segment.publish(space, store, offset, report)
            segment.add(found)
    progressed(end - done)
    segment.publish(space, store, end, report)


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
