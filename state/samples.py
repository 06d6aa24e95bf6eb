"""One partition number of the join of impressions and clicks: its transactions, and how its state is read back.

The inputs are the state: there is no changelog. The group's committed offsets are those of the oldest events that are still needed
(`Join.starts`), so a monitor's lag also counts what waits for its window's end; in the metadata of the impressions' offset lie the true
positions and the join's marks.
"""

from __future__ import annotations

import json
import logging
import time
from collections import deque
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from confluent_kafka import Message, Producer, TopicPartition

from crossrep import kafka
from crossrep.errors import BadEvent, BadRecord, StateError
from crossrep.keys import Keys
from crossrep.samples import CODEC
from crossrep.spec import Space
from schemas import codec
from schemas.events import check_event
from state import dead_letters, faults
from state.join import Impression, Join, Marks, Stats

log = logging.getLogger(__name__)

TRANSACTION_TIMEOUT = 10.0  # seconds; a flush takes milliseconds, a dead worker's transaction stalls readers until then
AHEAD = 10_000  # events of one topic that may wait for the other's


def group_of(space: Space) -> str:
    return f"samples.{space.name}"


@dataclass(frozen=True)
class Settings:
    """What all partitions of a worker share."""

    space: Space
    bootstrap: str
    window: int  # ms
    lateness: int  # ms
    start: str | None = None  # earliest or latest: where to begin if the group has no offsets although there are samples

    @property
    def inputs(self) -> tuple[str, str]:
        return self.space.inputs.impressions, self.space.inputs.clicks


@dataclass(frozen=True)
class Progress:
    """What is committed of a partition."""

    starts: tuple[int, int]  # offsets of the oldest impression and click that are needed again
    positions: tuple[int, int]  # the next impression and click to take in
    marks: Marks = field(default_factory=Marks)
    open: bool = False  # are there impressions that are not emitted?


@dataclass(frozen=True)
class Pending:
    """What one transaction writes."""

    samples: list[tuple[int, bytes, bytes]]  # partition, key, value
    letters: list[bytes]
    progress: Progress


class SamplesPartition:
    """Partition `number` of both inputs, merged by append time: however fast they are read, the same log gives the same samples."""

    def __init__(self, settings: Settings, number: int):
        self._settings = settings
        self._space = settings.space
        self.number = number
        self.stats = Stats()
        self._codecs = codec("impression"), codec("click")
        self._producer: Producer | None = None
        self._group: Any = None
        self._begin(Progress((0, 0), (0, 0)))
        self._committed: Progress | None = None  # by us

    def _begin(self, at: Progress) -> None:
        self.join = Join(self._settings.window, self._settings.lateness, self.stats, at.marks)
        self._taken = list(at.positions)  # next offsets to take in
        self._fetched = list(at.positions)  # next offsets to fetch
        self._waiting: tuple[deque[Message], deque[Message]] = (deque(), deque())
        self._ended = [False, False]
        self._letters: list[bytes] = []
        self._flushed = at
        self._heard = time.monotonic()
        self.restored = "nothing"

    # --- taking over ---

    def fence(self) -> None:
        """Become the only writer. Aborts what the former owner left open; its next commit fails."""
        group = group_of(self._space)
        self._producer = kafka.transactional_producer(self._settings.bootstrap, f"{group}-{self.number}", TRANSACTION_TIMEOUT)
        kafka.retried(lambda: self._producer.init_transactions(kafka.REQUEST_TIMEOUT))  # type: ignore[union-attr]
        outsider = kafka.consumer(self._settings.bootstrap, group)  # the transactional id fences here, not the group's generation
        self._group = outsider.consumer_group_metadata()
        outsider.close()
        faults.point("samples.fenced")

    def reopen(self) -> None:
        """Read what is committed, and of the log what is needed again. Memory is kept if nobody else has committed since our last flush.

        Raises:
            StateError: the log no longer holds what is needed, or the group has lost its offsets; says how to go on.
        """
        at = self._read_progress()
        self._ended = [False, False]
        if at == self._committed:
            self.restored = "kept in memory"
            return
        self._begin(at)
        began = time.monotonic()
        impressions = [(m.offset(), event) for m, event in self._read_again(0, at)]
        clicks = [(m.offset(), event, m) for m, event in self._read_again(1, at)]
        self.join.restore(impressions, clicks)
        self._committed = at
        self.restored = f"{len(impressions) + len(clicks)} events read again in {time.monotonic() - began:.2f} s"
        faults.point("samples.restored")

    def _read_again(self, which: int, at: Progress) -> list[tuple[Message, dict[str, Any]]]:
        bounds = {self.number: (at.starts[which], at.positions[which])}
        found = []
        for message in kafka.messages(self._settings.bootstrap, self._settings.inputs[which], bounds):
            try:
                found.append((message, self._decode(which, message)))
            except BadRecord:
                continue  # it is a dead letter already
        return found

    def _read_progress(self) -> Progress:
        parts = [TopicPartition(topic, self.number) for topic in self._settings.inputs]
        client = kafka.consumer(self._settings.bootstrap, group_of(self._space))
        try:
            found = kafka.committed(client, parts)
            bounds = [kafka.watermarks(client, part.topic, self.number) for part in parts]
        finally:
            client.close()
        if any(part.offset < 0 for part in found):
            if self._settings.start is None and self._offsets_are_lost():
                raise StateError(
                    f"group {group_of(self._space)!r} has no offsets, but {self._space.samples_topic} holds samples already. If the "
                    "offsets expired: --start latest goes on with what comes from now on, --start earliest writes all samples "
                    "again, under the same ids"
                )
            begins = [end if self._settings.start == "latest" else first for first, end in bounds]
            begins = [part.offset if part.offset >= 0 else begin for part, begin in zip(found, begins)]
            return Progress((begins[0], begins[1]), (begins[0], begins[1]))
        at = decode(found[0].metadata, (found[0].offset, found[1].offset))
        return self._within_log(at, bounds)

    def _offsets_are_lost(self) -> bool:
        """Has the group no offset at all, although there are samples? They are committed together."""
        client = kafka.consumer(self._settings.bootstrap, group_of(self._space))
        try:
            everywhere = [
                TopicPartition(topic, n) for topic in self._settings.inputs for n in kafka.bounds(self._settings.bootstrap, topic)
            ]
            if any(part.offset >= 0 for part in kafka.committed(client, everywhere)):
                return False
        finally:
            client.close()
        return any(end > 0 for _, end in kafka.bounds(self._settings.bootstrap, self._space.samples_topic).values())

    def _within_log(self, at: Progress, bounds: list[tuple[int, int]]) -> Progress:
        """The same, where the log holds what is needed; what is not needed any more may be gone."""
        starts, positions = list(at.starts), list(at.positions)
        for which, (topic, (first, end)) in enumerate(zip(self._settings.inputs, bounds)):
            if positions[which] > end:
                raise StateError(
                    f"{topic}[{self.number}] ends at {end}, but the next to join is {positions[which]}: the topic was created anew. To "
                    f"begin anew too, beside the old one's samples: stop all workers, kafka-consumer-groups.sh --delete --group "
                    f"{group_of(self._space)}, and start with --start earliest"
                )
            if (first > positions[which] and not first == end == positions[which] + 1) or (first > starts[which] and at.open):
                raise StateError(
                    f"{topic}[{self.number}] begins at {first}, but is needed from {starts[which]} on: events were deleted before they "
                    f"were joined. To accept the gap: kafka-consumer-groups.sh --group {group_of(self._space)} "
                    f"--topic {topic}:{self.number} --reset-offsets --to-earliest --execute"
                )
            starts[which], positions[which] = max(starts[which], first), max(positions[which], first)
        return replace(at, starts=(starts[0], starts[1]), positions=(positions[0], positions[1]))

    # --- joining ---

    @property
    def positions(self) -> tuple[int, int]:
        """The next impression and click to fetch: what waits in memory need not come again."""
        return self._fetched[0], self._fetched[1]

    @property
    def ahead(self) -> tuple[bool, bool]:
        """Of which input so much waits for the other that no more should come for now."""
        return len(self._waiting[0]) > AHEAD, len(self._waiting[1]) > AHEAD

    def take_in(self, message: Message) -> None:
        """An event, or the news that there are no more of them for now."""
        which = self._settings.inputs.index(message.topic())
        if message.error() is not None:
            self._ended[which] = True
        elif message.offset() >= self._fetched[which]:
            self._fetched[which] = message.offset() + 1
            self._ended[which] = False
            self._waiting[which].append(message)
        while (turn := self._turn()) is not None:
            self._join(turn, self._waiting[turn].popleft())

    def _turn(self) -> int | None:
        """Which input's next event was appended first; None: that cannot be said yet."""
        impressions, clicks = self._waiting
        if impressions and clicks:
            return int(clicks[0].timestamp()[1] < impressions[0].timestamp()[1])
        if impressions and self._ended[1]:
            return 0
        if clicks and self._ended[0]:
            return 1
        return None

    def _join(self, which: int, message: Message) -> None:
        try:
            event = self._decode(which, message)
            if which == 0:
                self.join.impression(message.offset(), event)
            else:
                self.join.click(message.offset(), event, message)
        except BadRecord as error:
            self.stats.dead_letters += 1
            self._refuse(message, error)
        self._taken[which] = message.offset() + 1
        self._heard = time.monotonic()
        faults.point("samples.joined")

    def _decode(self, which: int, message: Message) -> dict[str, Any]:
        event = self._codecs[which].decode(message.value())
        check_event(event, message.timestamp()[1] / 1000)
        return event

    def _refuse(self, message: Message, error: BadRecord) -> None:
        letter = dead_letters.encode(message.topic(), message.partition(), message.offset(), message.key(), message.value(), error)
        self._letters.append(letter)

    # --- flushing ---

    @property
    def full(self) -> bool:
        """Should a flush come before more events?"""
        return self.join.pending + len(self._letters) > 2 * AHEAD

    @property
    def unflushed(self) -> bool:
        return tuple(self._taken) != self._flushed.positions or self.join.pending > 0 or self._quiet

    @property
    def _quiet(self) -> bool:
        """Have impressions been open for a window's length although nothing came in all that time?"""
        idle = all(self._ended) and not any(self._waiting) and (time.monotonic() - self._heard) * 1000 > self._settings.window
        return idle and self.join.open > 0

    def copy(self) -> Pending:
        """What is to be written. Joining may go on as soon as this returns."""
        if self._quiet:
            self.join.close()
        samples, lost = self.join.take()
        for click in lost:
            named = f"impression {click.key[0]!r} of user {click.key[1]!r} and item {click.key[2]!r}"
            error = BadEvent(
                "impression", f"{named} has not come, or was more than --window before" if click.key[0] else "names no impression"
            )
            self._refuse(click.message, error)
        letters, self._letters = self._letters, []
        starts = [start if start is not None else taken for start, taken in zip(self.join.starts, self._taken)]
        positions = (self._taken[0], self._taken[1])
        progress = Progress((starts[0], starts[1]), positions, self.join.marks, self.join.open > 0)
        users = [sample.key[1].encode() for sample in samples]
        partitions = Keys.of(users).partitions(self._space.partitions).tolist() if users else []
        encoded = [(n, user, encode(self.number, sample)) for n, user, sample in zip(partitions, users, samples)]
        faults.point("samples.copied")
        return Pending(encoded, letters, progress)

    def commit(self, pending: Pending) -> None:
        """Samples, dead letters and progress in one transaction.

        Raises:
            KafkaException: fenced, or the cluster was away for too long; the caller must end the process.
        """
        kafka.within(TRANSACTION_TIMEOUT + 5, lambda: self._commit(pending))

    def _commit(self, pending: Pending) -> None:
        producer = self._producer
        assert producer is not None, "fence first"
        producer.begin_transaction()
        faults.point("samples.begun")
        for partition, key, value in pending.samples:
            producer.produce(self._space.samples_topic, value, key, partition=partition)
        for letter in pending.letters:
            producer.produce(self._space.dead_letters_topic, letter)
        producer.flush(kafka.RETRY_FOR)
        faults.point("samples.produced")
        impressions, clicks = self._settings.inputs
        offsets = [
            TopicPartition(impressions, self.number, pending.progress.starts[0], metadata(pending.progress)),
            TopicPartition(clicks, self.number, pending.progress.starts[1]),
        ]
        kafka.retried(lambda: producer.send_offsets_to_transaction(offsets, self._group))
        faults.point("samples.offsets")
        kafka.retried(producer.commit_transaction)
        faults.point("samples.committed")

    def done(self, pending: Pending) -> None:
        self._flushed = self._committed = pending.progress

    def close(self) -> None:
        """Give up what is in memory; what was not flushed is joined again by the next owner."""
        self._begin(Progress((0, 0), (0, 0)))
        self._committed = None


def encode(number: int, sample: Impression) -> bytes:
    """A sample as it goes to its topic."""
    impression_id, user_id, item_id = sample.key
    return CODEC.encode(
        {
            "sample_id": f"{number}-{sample.offset}",
            "impression_id": impression_id,
            "user_id": user_id,
            "item_id": item_id,
            "event_time": sample.time,
            "scenario": sample.scenario,
            "branch": sample.branch,
            "label": int(sample.clicked_at is not None),
            "clicked_at": sample.clicked_at,
        }
    )


def metadata(progress: Progress) -> str:
    """Of the impressions' committed offset; brokers take 4,096 bytes, this has some 200."""
    return json.dumps({"positions": progress.positions, "open": progress.open, "marks": asdict(progress.marks)})


def decode(text: str | None, starts: tuple[int, int]) -> Progress:
    """Progress as committed. Where the metadata is not ours, somebody has moved the group: it begins there, knowing nothing."""
    try:
        found = json.loads(text or "")
        return Progress(starts, (found["positions"][0], found["positions"][1]), Marks(**found["marks"]), found["open"])
    except (ValueError, KeyError, TypeError, IndexError):
        return Progress(starts, starts)
