"""One partition number of the join of impressions and clicks: its transactions, and how its state is read back.

The inputs are the state: there is no changelog. The group's committed offsets are those of the oldest events that are still needed
(`Join.starts`), so a monitor's lag also counts what waits for its window's end; in the metadata of the impressions' offset lie the true
positions and the join's marks.
"""

from __future__ import annotations

import math
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

from confluent_kafka import Message, Producer, TopicPartition

from crossrep import kafka
from crossrep.errors import BadEvent, BadRecord
from crossrep.keys import Keys
from crossrep.training.samples import CODEC
from schemas import codec
from schemas.events import check_event
from state import dead_letters, faults, samples_progress
from state.join import Impression, Join, Stats
from state.samples_progress import Progress, Settings

TRANSACTION_TIMEOUT = 10.0  # seconds; a flush takes milliseconds, a dead worker's transaction stalls readers until then
AHEAD = 20_000  # events of one topic that may wait for the other's
PATIENCE = 0.5  # seconds that an event waits for earlier ones of the other topic, where that is at its end
LETTERS = 8 << 20  # bytes of dead letters that wait for a flush before the next event does


@dataclass(frozen=True)
class Pending:
    """What one transaction writes."""

    samples: list[tuple[int, bytes, bytes]]  # partition, key, value
    letters: list[bytes]
    progress: Progress


@dataclass(frozen=True)
class Waiting:
    """An event that was fetched and not joined."""

    message: Message
    event: dict[str, Any] | BadRecord
    time: float  # of the event, ms since 1970; -inf where it is bad
    fetched: float  # by the monotonic clock


class SamplesPartition:
    """Partition `number` of both inputs, merged by event time: a click is not ahead of its impression because one topic was read faster."""

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
        self._waiting: tuple[deque[Waiting], deque[Waiting]] = (deque(), deque())
        self._reached = list(at.positions)  # the same, and past what is no event at the end: markers of transactions
        self._nothing_more = [-math.inf, -math.inf]  # by the monotonic clock: when an input was last known to hold no more than that
        self._ended = [False, False]
        self._letters: list[bytes] = []
        self._letter_bytes = 0
        self._flushed = at
        self._heard = time.monotonic()
        self.restored = "nothing"

    # --- taking over ---

    def fence(self) -> None:
        """Become the only writer. Aborts what the former owner left open; its next commit fails."""
        group = self._settings.group
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
        at = samples_progress.committed(self._settings, self.number)
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
            self._reached[which] = max(self._reached[which], message.offset())
        elif message.offset() >= self._fetched[which]:
            self._fetched[which] = message.offset() + 1
            self._reached[which] = max(self._reached[which], self._fetched[which])
            self._ended[which] = False
            self._waiting[which].append(self._waits(which, message))
        self._join_all()

    def _waits(self, which: int, message: Message) -> Waiting:
        try:
            event = self._decode(which, message)
        except BadRecord as error:
            return Waiting(message, error, -math.inf, time.monotonic())
        return Waiting(message, event, event["event_time"], time.monotonic())

    def _turn(self) -> int | None:
        """Which input's next event is the earlier one; None: that cannot be said yet."""
        impressions, clicks = self._waiting
        if impressions and clicks:
            return int(clicks[0].time < impressions[0].time)
        for which, waiting in enumerate(self._waiting):
            if waiting and self._nothing_more[1 - which] - waiting[0].fetched > PATIENCE:
                return which
        return None

    @property
    def lacking(self) -> int | None:
        """The input that events of the other have waited for long enough, if it holds no more: somebody must ask, and tell `holds`.

        That a fetch once came to its end says little: what was appended since may be on its way, behind other partitions' events.
        """
        for which, waiting in enumerate(self._waiting):
            if waiting and not self._waiting[1 - which] and time.monotonic() - waiting[0].fetched > PATIENCE:
                return 1 - which
        return None

    def holds(self, which: int, end: int, asked: float) -> None:
        """The offset behind an input's last event, as of `asked` by the monotonic clock."""
        if end <= self._reached[which]:
            self._nothing_more[which] = asked

    def _join_all(self) -> None:
        while (which := self._turn()) is not None:
            self._join(which, self._waiting[which].popleft())

    def _join(self, which: int, waiting: Waiting) -> None:
        message, event = waiting.message, waiting.event
        try:
            if isinstance(event, BadRecord):
                raise event
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
        self._letter_bytes += len(letter)

    # --- flushing ---

    @property
    def full(self) -> bool:
        """Should a flush come before more events?"""
        return self.join.pending > AHEAD or self._letter_bytes > LETTERS

    @property
    def unflushed(self) -> bool:
        return tuple(self._taken) != self._flushed.positions or self.join.pending > 0 or self._quiet or self._turn() is not None

    @property
    def _quiet(self) -> bool:
        """Have impressions been open for a window's length although nothing came in all that time?"""
        idle = all(self._ended) and not any(self._waiting) and (time.monotonic() - self._heard) * 1000 > self._settings.window
        return idle and self.join.open > 0

    def copy(self) -> Pending:
        """What is to be written. Joining may go on as soon as this returns."""
        self._join_all()
        if self._quiet:
            self.join.close()
        samples, lost = self.join.take()
        for click in lost:
            id, user, item = click.key
            named = f"impression {id!r} of user {user!r} and item {item!r} has not come, or not within --window before the click"
            error = BadEvent("impression", named if id else "the click names no impression")
            self._refuse(click.message, error)
        letters, self._letters, self._letter_bytes = self._letters, [], 0
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
            TopicPartition(impressions, self.number, pending.progress.starts[0], samples_progress.metadata(pending.progress)),
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
