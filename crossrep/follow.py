"""Following a compacted topic: a thread that applies what is committed, and knows whether it has caught up."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from confluent_kafka import Consumer, TopicPartition

from crossrep import kafka
from crossrep.errors import CrossrepError

log = logging.getLogger(__name__)

Apply = Callable[[list[bytes], list[bytes | None]], None]  # keys, values (None: the key was deleted)


class Follower:
    """Reads all partitions of `topic`, read_committed, from the beginning and then for ever.

    Args:
        apply: called from the follower's thread with runs of messages, per partition in order. An exception ends the follower and is
            raised by whatever is asked of it next.
    """

    def __init__(self, topic: str, apply: Apply, bootstrap: str):
        self.topic = topic
        self.records = 0  # applied so far
        self._apply = apply
        self._bootstrap = bootstrap
        self._caught_up = threading.Event()
        self._stopped = threading.Event()
        self._error: BaseException | None = None
        self._positions: dict[int, int] = {}
        self._ends: dict[int, int] = {}
        self._thread = threading.Thread(target=self._run, name=f"follow {topic}", daemon=True)
        self._thread.start()

    @property
    def caught_up(self) -> bool:
        """Has everything that was in the topic at the start been applied? How it is now, `lag` says. Raises as `check` does."""
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
                done, end = sum(self._positions.values()), sum(self._ends.values())
                raise TimeoutError(f"{self.topic}: not caught up within {timeout} s; at {done} of {end} offsets")
        self.check()

    @property
    def positions(self) -> dict[int, int]:
        """Per partition, the next offset to apply."""
        return dict(self._positions)

    @property
    def lag(self) -> int:
        """Offsets behind the end as it was last seen (an upper bound of the records behind: offsets hold transaction markers too)."""
        return max(0, sum(self._ends.values()) - sum(self._positions.values()))

    def close(self) -> None:
        self._stopped.set()
        self._thread.join(10)

    def check(self) -> None:
        """Raise CrossrepError if following has ended: what was applied is then old and getting older."""
        if self._error is not None:
            raise CrossrepError(f"following {self.topic} has failed: {self._error}") from self._error

    def _run(self) -> None:
        try:
            self._follow()
        except BaseException as error:
            log.exception("following %s failed", self.topic)
            self._error = error

    def _follow(self) -> None:
        client = kafka.consumer(self._bootstrap, config=kafka.ENDS)
        try:
            self._assign(client)
            behind = set(self._positions)
            while not self._stopped.is_set():
                runs: dict[int, tuple[list[bytes], list[bytes | None], int]] = {}
                for message in client.consume(10_000, 0.02):
                    number = message.partition()
                    if kafka.is_end(message):
                        behind.discard(number)
                        self._positions[number] = self._ends[number] = message.offset()
                    elif message.error():
                        if not message.error().retriable():
                            raise CrossrepError(message.error().str())
                    else:
                        if number not in runs:
                            runs[number] = ([], [], 0)
                        keys, values, _ = runs[number]
                        keys.append(message.key())
                        values.append(message.value())
                        runs[number] = (keys, values, message.offset() + 1)
                for number, (keys, values, end) in runs.items():
                    self._apply(keys, values)
                    self.records += len(keys)
                    self._positions[number] = max(self._positions[number], end)
                if not behind:
                    self._caught_up.set()
                for number in self._ends:
                    _, end = client.get_watermark_offsets(TopicPartition(self.topic, number), cached=True)
                    self._ends[number] = max(self._ends[number], end)  # negative while not yet known
        finally:
            client.close()

    def _assign(self, client: Consumer) -> None:
        metadata = client.list_topics(self.topic, timeout=kafka.REQUEST_TIMEOUT).topics[self.topic]
        if metadata.error is not None:
            raise CrossrepError(f"topic {self.topic} does not exist. Create the space's topics: crossrep topics create SPEC.toml")
        starts = []
        for number in metadata.partitions:
            first, end = kafka.watermarks(client, self.topic, number)
            self._positions[number], self._ends[number] = first, end
            starts.append(TopicPartition(self.topic, number, first))
        client.assign(starts)
