"""Rewinding: the state as it was at an earlier time, and what was made of the events since, made again.

After a bad model has written three hours of nonsense: stop all workers, `crossrep rewind SPACE --to TIME`, start them with the good model.

1. *The cut.* Every partition of the frames topic is cut at the first frame appended at TIME or later; frames of one batch are never
   cut apart, and no events are read again of which a frame stays. The frames behind the cut are left out for good, and the events they
   were made of are read again: every frame says which those were, and after how many rewinds (`crossrep.control.lineage`).
2. *The state.* The history holds what every key was at certain points (`state.history`). The newest point before the cut is restored by
   writing former records over those that changed since, with the progress, in one transaction a partition: the same protocol as a flush.
3. The workers fold the good frames between point and cut again, pass those behind it, and go on with the new ones.

It can be repeated: a rewind that was interrupted, or the same one twice, leads to the same state.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from confluent_kafka import TopicPartition
from rich.table import Table

from crossrep import kafka
from crossrep.columnar.records import RecordLayout
from crossrep.control import groups, lineage, spaces
from crossrep.control.lineage import Place
from crossrep.errors import StateError
from crossrep.spec import Space, fold_group, frame_group, infer_group
from state import history, progress
from state.changelog import Changelog, Flush
from state.progress import Point, Progress
from state.writes import Writes
from streams import topics

MARGIN = 60.0  # seconds before the cut in which a batch may have begun that ends behind it
TIMEOUT = 600.0  # seconds a partition's transaction may take

Spans = dict[int, tuple[int, int]]  # partition of frames -> two offsets


@dataclass
class Step:
    """What happens to one partition."""

    number: int
    now: Progress
    cut: int  # frames from here on are left out, or folded again
    end: int  # behind the last frame
    point: Point | None = None  # where the state goes; None: nothing behind the cut is folded yet
    records: dict[str, Writes] = field(default_factory=dict)  # by entity: what the keys that changed were


@dataclass
class Plan:
    """What a rewind does. Nothing is changed until `apply`."""

    to: int  # seconds since 1970
    steps: list[Step]
    leave_out: bool
    rereads: dict[str, dict[Place, int]]  # consumer group -> where it goes on
    foreign: int  # frames behind the cut that no worker of ours wrote: their writers must send again


def plan(
    space: Space, bootstrap: str, to: int, leave_out: bool = True, progressed: Callable[[int, int], None] = lambda done, total: None
) -> Plan:
    """Find out what a rewind would do.

    Args:
        to: by the brokers' clock, whole seconds since 1970.
        leave_out: leave out the frames written since, and read their events again; else fold the same frames again.

    Raises:
        StateError: workers are running, or the history, frames or events do not reach back that far; says how far they do.
    """
    _refuse_if_anybody_runs(space, bootstrap)
    now = progress.committed(space, bootstrap)
    bounds = kafka.bounds(bootstrap, space.frames_topic)
    cuts = _offsets_at(space, bootstrap, to, bounds)
    rereads: dict[str, dict[Place, int]] = {}
    foreign = 0
    if leave_out:
        cuts, behind, foreign = _cut(space, bootstrap, to, cuts, bounds, progressed)
        rereads = {group: _not_forward(bootstrap, group, places) for group, places in behind.items()}
        _refuse_if_events_are_gone(bootstrap, rereads)
    steps = []
    for number, (first, end) in sorted(bounds.items()):
        at = now.get(number, Progress(first))
        at = replace(at, skipped=tuple(span for span in at.skipped if span[1] > first))  # of what is deleted nothing need be remembered
        if len(at.skipped) >= progress.MOST_SKIPPED:
            raise StateError(f"{space.frames_topic}[{number}] was rewound {len(at.skipped)} times within its retention; create a new space")
        steps.append(Step(number, at, cuts[number], end))
    for step in steps:
        if step.cut < step.now.offset:
            _find_former_state(space, bootstrap, step, bounds[step.number][0])
    return Plan(to, steps, leave_out, rereads, foreign)


def apply(space: Space, bootstrap: str, plan: Plan, stepped: Callable[[], None] = lambda: None) -> None:
    """Do it: one transaction a partition, then the offsets of those who read events. No worker starts before it is complete.

    Raises:
        KafkaException: the cluster is away, or a worker was started meanwhile. Repeat the rewind: every step is safe to repeat.
    """
    published = spaces.find(space.name, bootstrap)
    topics.publish(replace(published, rewinding=called(plan)), bootstrap)
    for step in plan.steps:
        at = step.now
        if step.point is not None:
            at = Progress(step.point.offset, step.point.append_time, step.point.stream_time, step.point, step.now.skipped)
        if plan.leave_out and step.cut < step.end:
            kept = tuple((first, end) for first, end in at.skipped if first < step.cut)
            at = Progress(at.offset, at.append_time, at.stream_time, at.point, (*kept, (step.cut, step.end)))
        if at != step.now:
            changelog = Changelog(space, step.number, bootstrap, TIMEOUT)
            changelog.fence()
            changelog.commit(Flush({entity: [writes] for entity, writes in step.records.items()}, at))
        stepped()
    for group, places in plan.rereads.items():
        to: groups.Offsets = defaultdict(dict)
        for (topic, number), offset in places.items():
            to[topic][number] = offset
        groups.move(bootstrap, group, to)
    topics.publish(replace(published, rewinding="", rewound=published.rewound + plan.leave_out), bootstrap)


def called(plan: Plan) -> str:
    """The command's arguments that make this plan."""
    return f"--to {datetime.fromtimestamp(plan.to, UTC):%Y-%m-%dT%H:%M:%S}" + ("" if plan.leave_out else " --keep-frames")


def table(plan: Plan) -> Table:
    """A plan as people read it."""
    rows = Table("partition", "folded to", "cut at", "state from", "folded again", "keys put back", "frames left out", box=None)
    for step in plan.steps:
        state = "as it is" if step.point is None else f"{step.point.offset:,} ({_text(step.point.append_time)})"
        again = max(0, step.cut - (step.point.offset if step.point else step.now.offset))
        keys = sum(map(len, step.records.values()))
        left_out = step.end - step.cut if plan.leave_out else 0
        rows.add_row(str(step.number), f"{step.now.offset:,}", f"{step.cut:,}", state, f"{again:,}", f"{keys:,}", f"{left_out:,}")
    return rows


def _text(time: float) -> str:
    return datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d %H:%M:%S") if time else "the beginning"


# --- the cut ---


def _offsets_at(space: Space, bootstrap: str, to: float, bounds: Spans) -> dict[int, int]:
    """Per partition, the first frame appended at `to` or later."""
    client = kafka.consumer(bootstrap)
    try:
        asked = [TopicPartition(space.frames_topic, number, math.ceil(to * 1000)) for number in bounds]
        found = kafka.retried(lambda: client.offsets_for_times(asked, timeout=kafka.REQUEST_TIMEOUT), kafka.TRANSIENT)
        return {part.partition: part.offset if part.offset >= 0 else bounds[part.partition][1] for part in found}
    finally:
        client.close()


def _cut(
    space: Space, bootstrap: str, to: float, cuts: dict[int, int], bounds: Spans, progressed: Callable[[int, int], None]
) -> tuple[dict[int, int], dict[str, dict[Place, int]], int]:
    """Cuts moved back until no batch is cut apart; where the events behind them begin, per group and partition; and frames of others."""
    starts = _offsets_at(space, bootstrap, to - MARGIN, bounds)
    total, foreign = sum(bounds[n][1] - starts[n] for n in bounds), 0
    batches: dict[bytes, Spans] = defaultdict(dict)  # header -> first and last frame
    for done, message in enumerate(kafka.messages(bootstrap, space.frames_topic, {n: (starts[n], bounds[n][1]) for n in bounds})):
        header = dict(message.headers() or []).get(lineage.HEADER)
        if header is None:
            foreign += message.offset() >= cuts[message.partition()]
        else:
            first, _ = batches[header].get(message.partition(), (message.offset(), 0))
            batches[header][message.partition()] = first, message.offset()
        if done % 1000 == 0:
            progressed(done, total)
    return *_behind(batches, cuts), foreign


def _behind(batches: dict[bytes, Spans], cuts: dict[int, int]) -> tuple[dict[int, int], dict[str, dict[Place, int]]]:
    """Cuts moved back, and where the events of all batches behind them begin.

    A batch is behind if a frame of it is, or one of its events is read again: it may lie in front although an earlier batch of its events
    is behind, since other batches move cuts back, and since brokers' clocks differ. Those made before an earlier rewind are not drawn
    behind by those made after it: of the same events, they are left out already.
    """
    left, cuts = {header: lineage.parse(header) for header in batches}, dict(cuts)
    newest = max((source.rewound for source in left.values()), default=0)
    begins: dict[tuple[str, int, Place], int] = {}  # group, times rewound, place -> the first event that is read again

    def lies_behind(header: bytes, source: lineage.Source) -> bool:
        return any(last >= cuts[number] for number, (_, last) in batches[header].items()) or any(
            end > begins.get((source.group, source.rewound, place), math.inf) for place, end in source.ends.items()
        )

    while more := [header for header, source in left.items() if lies_behind(header, source)]:
        for header in more:
            source = left.pop(header)
            cuts.update((number, min(cuts[number], first)) for number, (first, _) in batches[header].items())
            for place, (first, _) in source.spans.items():
                for rewound in range(source.rewound, newest + 1):
                    at = source.group, rewound, place
                    begins[at] = min(begins.get(at, first), first)
    rereads: dict[str, dict[Place, int]] = defaultdict(dict)
    for (group, rewound, place), first in begins.items():
        if rewound == newest:
            rereads[group][place] = first
    return cuts, rereads


def _not_forward(bootstrap: str, group: str, places: dict[Place, int]) -> dict[Place, int]:
    """The same, or where the group is before that: an earlier rewind has set it back, and what it is to read is not made again yet."""
    now = groups.offsets(bootstrap, group)
    return {(topic, number): min(first, now.get(topic, {}).get(number, first)) for (topic, number), first in places.items()}


def _refuse_if_events_are_gone(bootstrap: str, rereads: dict[str, dict[Place, int]]) -> None:
    client = kafka.consumer(bootstrap)
    try:
        for places in rereads.values():
            for (topic, number), offset in places.items():
                first, _ = kafka.watermarks(client, topic, number)
                if offset < first:
                    raise StateError(
                        f"the events to read again begin at {topic}[{number}]@{offset}, but only those from {first} on are kept. Rewind "
                        "to a later time, or fold the frames as they are: --keep-frames"
                    )
    finally:
        client.close()


def _refuse_if_anybody_runs(space: Space, bootstrap: str) -> None:
    for group in (fold_group(space), infer_group(space), frame_group(space)):
        groups.refuse_active(bootstrap, group)


# --- the former state ---


def _find_former_state(space: Space, bootstrap: str, step: Step, first_frame: int) -> None:
    """Fill in the newest rewind point before the cut, and what every key that changed since was there."""
    left_out = step.now.skipped
    log = kafka.bounds(bootstrap, space.history_topic)[step.number]
    told = _timeline(space, bootstrap, step, log)
    # Retention may have deleted the first messages of the oldest point.
    oldest = None if log[0] == 0 else min(told.values(), key=lambda point: point.offset, default=step.now.point).offset
    known = {point.offset: point for point in (*told.values(), step.now.point)}
    points = [
        point
        for offset, point in known.items()
        if -1 < offset <= step.cut and offset >= first_frame and offset != oldest and not any(a < offset < b for a, b in left_out)
    ]
    if not points:
        raise StateError(
            f"the history of {space.frames_topic}[{step.number}] does not reach back to offset {step.cut}: it holds "
            f"{_span(known.values())}, and the frames from {first_frame} on. The space declares history = "
            f'"{space.toml_dict["history"]}": a longer one must be declared, and published, before it is needed. An archive '
            f"reaches further: crossrep replay {space.name} --into NEW --until TIME"
        )
    step.point = max(points, key=lambda point: point.offset)
    former: dict[str, dict[bytes, bytes]] = {entity: {} for entity in space.entities}
    for offset, undo in _undos(space, bootstrap, step.number, log):
        if offset in told and undo.point.offset >= step.point.offset:
            for key, record in zip(undo.keys, undo.records):
                former[undo.entity].setdefault(key, record or b"")
    step.records = {
        entity: Writes.of(list(records), list(records.values()), RecordLayout(space, entity).size)
        for entity, records in former.items()
        if records
    }


def _timeline(space: Space, bootstrap: str, step: Step, log: tuple[int, int]) -> dict[int, Point]:
    """The history's messages that tell how the state became what it is: offset -> point.

    An earlier rewind went back to a point. What was written at later points until then tells of a state that never was.
    """
    told: dict[int, Point] = {}
    for offset, undo in _undos(space, bootstrap, step.number, log):
        while told and told[last := next(reversed(told))].offset > undo.point.offset:
            del told[last]
        told[offset] = undo.point
    return {offset: point for offset, point in told.items() if point.offset <= step.now.point.offset}


def _undos(space: Space, bootstrap: str, number: int, log: tuple[int, int]) -> Iterator[tuple[int, history.Undo]]:
    for message in kafka.messages(bootstrap, space.history_topic, {number: log}):
        yield message.offset(), history.decode(message.value())


def _span(points: Iterable[Point]) -> str:
    times = sorted(point.append_time for point in points if point.offset >= 0)
    return f"points from {_text(times[0])} on" if times else "no point yet"
