"""Following a compacted topic: a thread that applies what is committed, and knows how fresh that is."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Collection

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from crossrep import kafka
from crossrep.control.readers import Presence
from crossrep.errors import CrossrepError, TopicError
from crossrep.views.moments import NEVER, Moment
from crossrep.views.probe import Probe, describe

log = logging.getLogger(__name__)

Apply = Callable[[list[bytes], list[bytes | None]], object]  # keys, values (None: the key was deleted)
Begin = Callable[[str, dict[int, tuple[int, int]]], dict[int, int]]  # topic id, first and next offset by partition -> where to begin
Reached = Callable[[dict[int, int], float], None]

PROBE_EVERY = 1.0  # seconds
STALLED_AFTER = 10.0  # seconds
CLOSE_TIMEOUT = 2.0  # seconds
SHORTEST_GAP = 60.0  # seconds; brokers restart and topics are read from the beginning, however soon deletions are dropped

# Errors of one fetch, after which librdkafka goes on from where it was. Whether a topic is really gone the probe finds out.
PASSING = kafka.TRANSIENT | {
    KafkaError.BROKER_NOT_AVAILABLE,
    KafkaError.FENCED_LEADER_EPOCH,
    KafkaError.KAFKA_STORAGE_ERROR,
    KafkaError.NETWORK_EXCEPTION,
    KafkaError.OFFSET_NOT_AVAILABLE,
    KafkaError.REPLICA_NOT_AVAILABLE,
    KafkaError.REQUEST_TIMED_OUT,
    KafkaError.UNKNOWN_LEADER_EPOCH,
    KafkaError.UNKNOWN_TOPIC_OR_PART,
    KafkaError._UNKNOWN_PARTITION,
    KafkaError._UNKNOWN_TOPIC,
}
LOST = {KafkaError._AUTO_OFFSET_RESET, KafkaError._LOG_TRUNCATION}  # the next offset is not in the log
_ANEW = "What is held here is not kept fresh any more: begin anew with a new view, or by restarting the worker"


class Follower:
    """Reads the partitions of `topic`, read_committed, from the beginning (or where `begin` says) and then for ever.

    While the cluster is away it waits, and then goes on where it was; `staleness` tells. It ends, and every question raises CrossrepError,
    once what it applied is no longer the beginning of what the topic holds: the topic is deleted, created anew, or cut off beyond the place
    reached; or this was suspended, or without the cluster, for so long that deletions may be gone. A consumer alone would be silent about
    the first, might read on in the middle of the second, and would keep deleted keys for ever.

    Args:
        apply: called from the follower's thread with runs of messages, per partition in order. An exception ends the follower and is
            raised by whatever is asked of it next.
        partitions: follow these alone.
        begin: called once from that thread, before anything is read, by a reader that keeps what it applied; default: the beginning.
        reached: called from that thread after each look for messages, also if there were none, with positions up to which all is applied,
            and when (seconds since 1970, by the wall clock) that was last all there was.
        presence: tells the cluster that somebody reads.
    """

    def __init__(
        self,
        topic: str,
        apply: Apply,
        bootstrap: str,
        partitions: Collection[int] | None = None,
        begin: Begin | None = None,
        reached: Reached = lambda positions, complete: None,
        presence: Presence | None = None,
    ):
        self.topic = topic
        self.records = 0  # applied so far
        self.complete_at = NEVER  # what was in the topic then has been applied
        self._apply, self._bootstrap, self._process = apply, bootstrap, os.getpid()
        self._partitions, self._begin, self._reached, self._presence = partitions, begin, reached, presence
        self._caught_up, self._stopped = threading.Event(), threading.Event()
        self._error: BaseException | None = None
        self._topic_id = ""
        self._positions: dict[int, int] = {}
        self._ends: dict[int, int] = {}
        self._behind: set[int] = set()  # partitions whose end at the start has not been reached yet
        self._first_ends: dict[int, int] = {}
        self._probe: Probe | None = None  # on its way
        self._probe_due = 0.0
        self._strikes = 0  # probes in a row that found another topic, or none
        self._began, self._kept = NEVER, 0.0  # since when it is read, and for how many seconds the topic keeps deletions
        self._target: tuple[Moment, dict[int, int]] | None = None  # when asked, and where the topic ended then
        self._moved_to: dict[int, int] = {}  # positions, and since when
        self._moved_at, self._patience = 0.0, STALLED_AFTER
        self._thread = threading.Thread(target=self._run, name=f"follow {topic}", daemon=True)
        self._thread.start()

    @property
    def caught_up(self) -> bool:
        """Has everything that was in the topic at the start been applied? How it is now, `staleness` says. Raises as `check` does."""
        self.check()
        return self._caught_up.is_set()

    def wait(self, timeout: float | None = None) -> None:
        """Block until caught up.

        Raises:
            TimeoutError: it takes longer.
            CrossrepError: following has failed.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._caught_up.wait(0.05):
            self.check()
            if deadline is not None and time.monotonic() > deadline:
                raise self.late(timeout)
        self.check()

    def late(self, timeout: float | None) -> TimeoutError:
        """The error of who has waited so many seconds: says how far this is."""
        done, end = sum(self._positions.values()), sum(self._ends.values())
        at = f"at {done} of {end} offsets" if self._ends else "the cluster has not said where the topic ends"
        return TimeoutError(f"{self.topic}: not caught up within {timeout} s; {at}")

    @property
    def positions(self) -> dict[int, int]:
        """Per partition, the next offset to apply."""
        return dict(self._positions)

    @property
    def lag(self) -> int:
        """Offsets behind the end as it was last seen (an upper bound of the records behind: offsets hold transaction markers too).

        With the cluster away the end is not seen any more: `staleness` says for how long. Raises as `check` does.
        """
        self.check()
        return max(0, sum(self._ends.values()) - sum(self._positions.values()))

    @property
    def staleness(self) -> float:
        """Seconds: what was visible to a read_committed reader longer ago than this has been applied. Raises as `check` does.

        Every partition's leader is asked once a second where it ends. So this is about a second while all is well; it grows while the
        cluster does not answer or the follower is behind, and is infinite until the end is first reached.
        """
        self.check()
        return self.complete_at.age

    def fail(self, error: CrossrepError) -> None:
        """Let every question raise this, unless following has failed before."""
        self._error = self._error or error

    def close(self) -> bool:
        """Stop; takes no longer than CLOSE_TIMEOUT, even if the cluster is away. Returns whether nothing is applied any more."""
        self._stopped.set()
        self._thread.join(CLOSE_TIMEOUT)
        return not self._thread.is_alive()

    def check(self) -> None:
        """Raise CrossrepError if following has ended: what was applied is then old and getting older."""
        if os.getpid() != self._process:
            raise CrossrepError(
                f"{self.topic} is followed in process {self._process}, of which this one is a fork: nothing new comes here. Open a view in "
                "every process that needs one, or look up in the one that has it"
            )
        if self._error is not None:
            raise CrossrepError(f"following {self.topic} has failed: {str(self._error) or repr(self._error)}") from self._error

    def _run(self) -> None:
        try:
            self._follow()
        except BaseException as error:
            log.exception("following %s failed", self.topic)
            self._error = error

    def _follow(self) -> None:
        admin, client = kafka.admin(self._bootstrap), self._consumer()
        try:
            self._start(client)
            client.assign(self._places())
            while not self._stopped.is_set():
                self._read(client.consume(10_000, 0.02))
                for number in self._ends:
                    _, end = client.get_watermark_offsets(TopicPartition(self.topic, number), cached=True)
                    self._ends[number] = max(self._ends[number], end)  # negative while not yet known
                if self._probe is None:
                    if time.monotonic() > self._probe_due:
                        self._probe = Probe.send(admin, self.topic, list(self._positions))
                        self._probe_due = self._probe.asked.awake + PROBE_EVERY
                elif self._probe.answered:
                    probe, self._probe = self._probe, None
                    if not self._heard(probe):
                        admin = kafka.admin(self._bootstrap)
                if self._presence is not None:
                    self._presence.tell(admin, self.topic, self._positions)
                if self._target is not None and all(self._positions[number] >= end for number, end in self._target[1].items()):
                    self.complete_at, self._target = self._target[0], None
                if self._stalled():
                    log.warning("following %s: nothing comes, though there is more: connecting anew", self.topic)
                    client.close()
                    client = self._consumer()
                    client.assign(self._places())
        finally:
            client.close()
            if self._presence is not None:
                self._presence.end(admin)

    def _consumer(self) -> Consumer:
        return kafka.consumer(self._bootstrap, config={**kafka.ENDS, "reconnect.backoff.max.ms": 1000})

    def _places(self) -> list[TopicPartition]:
        return [TopicPartition(self.topic, number, position) for number, position in self._positions.items()]

    def _start(self, client: Consumer) -> None:
        described = describe(self.topic, self._bootstrap)
        self._topic_id = str(described.topic_id)
        self._kept, self._began = kafka.tombstones_kept(self._bootstrap, self.topic), Moment.now()
        numbers = {part.id for part in described.partitions if self._partitions is None or part.id in self._partitions}
        bounds = {number: kafka.watermarks(client, self.topic, number) for number in numbers}
        self._ends = {number: end for number, (_, end) in bounds.items()}
        first = {number: first for number, (first, _) in bounds.items()}
        self._positions = first if self._begin is None else self._begin(self._topic_id, bounds)
        self._behind, self._first_ends = set(self._positions), dict(self._ends)

    def _read(self, messages: list[Message]) -> None:
        runs: dict[int, list[Message]] = {}
        reached = {}
        for message in messages:
            number, error = message.partition(), message.error()
            if error is None:
                runs.setdefault(number, []).append(message)
                reached[number] = message.offset() + 1
            elif kafka.is_end(message):
                reached[number] = self._ends[number] = message.offset()
                self._behind.discard(number)
            elif error.code() in LOST:
                self._check_id(str(describe(self.topic, self._bootstrap).topic_id))
                raise TopicError(
                    f"offset {self._positions[number]} of partition {number}, the next to be read, is no longer in the topic: records were "
                    f"deleted or lost before they were seen here. {_ANEW}"
                )
            elif not error.retriable() and error.code() not in PASSING:
                raise CrossrepError(error.str())
        self._check_gap(reached)
        for run in runs.values():
            self._apply([message.key() for message in run], [message.value() for message in run])
            self.records += len(run)
        self._positions |= reached
        # Where the stream never pauses, nobody says that an end is reached: everything that was there at the start is enough.
        self._behind = {number for number in self._behind if self._positions[number] < self._first_ends[number]}
        self._reached(self._positions, self.complete_at.wall)
        if not self._behind:
            self._caught_up.set()

    def _check_gap(self, reached: dict[int, int]) -> None:
        """Refuse what comes after so long that deletions may be missing in it. If nothing comes, nothing was missed.

        A half of the time that the topic keeps them is for clocks that differ, and for disks: a reader may begin from one as old as a half.
        """
        gap = (self._began if self.complete_at is NEVER else self.complete_at).age
        if gap > max(self._kept / 2, SHORTEST_GAP) and any(self._positions[number] != offset for number, offset in reached.items()):
            raise TopicError(
                f"the topic was last read to its end {gap / 3600:.1f} h ago, and keeps deletions for {self._kept / 3600:.1f} h: some "
                f"may be gone from it, unseen here. {_ANEW}"
            )

    def _heard(self, probe: Probe) -> bool:
        """Is this still the same topic, and where does it end now? False if the cluster did not say."""
        try:
            found = probe.topic_id
        except KafkaException:
            self._moved_at = time.monotonic()  # nothing can come: that is no stall
            return False
        # One broker alone may be late to learn of a topic.
        self._strikes = 0 if found == self._topic_id else self._strikes + 1
        if self._strikes > 1:
            self._check_id(found)
        if self._target is None and not self._strikes and probe.ends is not None:
            self._target = probe.asked, probe.ends
        return True

    def _stalled(self) -> bool:
        """Has nothing come for long, though the cluster answers, and holds more?

        librdkafka drops every broker it knows, for good, when one that is just starting answers that there are none.
        """
        now = time.monotonic()
        if self._target is None or self._positions != self._moved_to:
            self._moved_at, self._moved_to, self._patience = now, dict(self._positions), STALLED_AFTER
        if now < self._moved_at + self._patience:
            return False
        # On a slow connection the first records may take longer than that, and connecting anew begins anew.
        self._moved_at, self._patience = now, min(2 * self._patience, 300.0)
        return True

    def _check_id(self, found: str | None) -> None:
        if found is None:
            raise TopicError(f"the topic was deleted. Create it again (crossrep topics create SPEC.toml) and start its writers. {_ANEW}")
        if found != self._topic_id:
            raise TopicError(f"the topic was deleted and created anew (id {found}, not {self._topic_id}). {_ANEW}")
