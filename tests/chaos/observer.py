"""What a reader sees all along: does any key ever go back, and how long does each partition stand still?"""

from __future__ import annotations

import threading
import time
from collections import defaultdict

from confluent_kafka import KafkaError, Message, TopicPartition

from crossrep import kafka
from crossrep.columnar.records import RecordLayout
from crossrep.errors import CrossrepError
from crossrep.spec import Space


class Observer(threading.Thread):
    """Reads all representation topics of a space, read_committed, from the beginning."""

    def __init__(self, space: Space, bootstrap: str):
        super().__init__(name="observer", daemon=True)
        self.records = 0
        self.went_back: list[str] = []
        self.problems: list[str] = []
        self._address = bootstrap
        self._layouts = {space.representations_topic(entity): RecordLayout(space, entity) for entity in space.entities}
        self._seen: dict[str, dict[bytes, tuple[float, float]]] = defaultdict(dict)  # topic → key → source offset, count
        self._ends = {(topic, number): 0 for topic in self._layouts for number in range(space.partitions)}  # up to where all is read
        self._lock = threading.Lock()
        self._last: dict[int, float] = {}  # partition number → when it last went on
        self._gaps: dict[int, float] = {}  # partition number → its longest stall since `measure`, seconds
        self._ended = threading.Event()

    # --- from other threads ---

    @property
    def keys(self) -> int:
        """Keys of all entities."""
        return sum(map(len, self._seen.values()))

    def rest(self) -> None:
        """Nothing is being sent, so what follows is no stall."""
        with self._lock:
            self._last = {}

    def measure(self) -> None:
        """Forget the stalls that are over."""
        with self._lock:
            self._gaps = {}

    def gaps(self) -> dict[int, float]:
        """Per partition number, the longest time in seconds without a new record, of those that ended since `measure`."""
        with self._lock:
            return dict(self._gaps)

    def went_on_since(self, moment: float) -> set[int]:
        """The partition numbers with a record since that moment of time.monotonic()."""
        with self._lock:
            return {number for number, last in self._last.items() if last > moment}

    def caught_up(self) -> bool:
        """Is everything committed read? Asked while nothing is written."""
        client = kafka.consumer(self._address)
        try:
            return all(self._ends[place] >= kafka.watermarks(client, *place)[1] for place in self._ends)
        except CrossrepError:
            return False
        finally:
            client.close()

    def stop(self) -> None:
        self._ended.set()
        if self.is_alive():
            self.join(10)

    # --- the thread ---

    def run(self) -> None:
        client = kafka.consumer(self._address, config=kafka.ENDS)
        try:
            client.assign([TopicPartition(topic, number, 0) for topic, number in self._ends])
            while not self._ended.is_set():
                messages = []
                for message in client.consume(10_000, 0.02):
                    if message.error() is None:
                        messages.append(message)
                    elif kafka.is_end(message):
                        self._ends[message.topic(), message.partition()] = message.offset()
                    elif message.error().code() == KafkaError._AUTO_OFFSET_RESET:
                        raise CrossrepError(f"{message.topic()}[{message.partition()}] lost what was read: {message.error().str()}")
                if messages:
                    self._note_progress({message.partition() for message in messages})
                    self._compare(messages)
        except Exception as error:
            self.problems.append(f"the observer ended: {error!r}")
        finally:
            client.close()

    def _note_progress(self, numbers: set[int]) -> None:
        now = time.monotonic()
        with self._lock:
            for number in numbers:
                if number in self._last:
                    self._gaps[number] = max(self._gaps.get(number, 0.0), now - self._last[number])
                self._last[number] = now

    def _compare(self, messages: list[Message]) -> None:
        for topic, layout in self._layouts.items():
            seen, mine = self._seen[topic], [message for message in messages if message.topic() == topic]
            records = layout.decode([message.value() for message in mine if message.value()], topic)
            states = iter(zip(records["source_offset"].tolist(), records["count"].tolist()))
            for message in mine:
                if not message.value():
                    seen.pop(message.key(), None)
                    continue
                now = next(states)
                before = seen.get(message.key(), now)
                if now[0] < before[0] or now[1] < before[1]:
                    place = f"{topic}[{message.partition()}]@{message.offset()}"
                    self.went_back.append(f"{place}: {message.key()!r} went from (source offset, count) {before} to {now}")
                seen[message.key()] = now
            self.records += len(mine)
