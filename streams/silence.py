"""A consumer can lose all brokers for good, and stay silent for ever without an error (confluentinc/librdkafka#5301). This notices."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence

from confluent_kafka import KafkaException, Message, TopicPartition

from crossrep import kafka
from crossrep.errors import CrossrepError

log = logging.getLogger(__name__)

SILENCE = 15.0  # seconds without a word after which it is asked whether there is anything to hear

Place = tuple[str, int]  # topic, partition


class Silence:
    """Told what a consumer hears, it asks the cluster whether that is all. The consumer must have `kafka.ENDS`."""

    def __init__(self, bootstrap: str):
        self._bootstrap = bootstrap
        self._reached: dict[Place, int] = {}  # next offset
        self._heard = time.monotonic()
        self._suspected = False

    def assigned(self, positions: Mapping[Place, int]) -> None:
        """What is consumed too from now on, and from where."""
        self._reached.update(positions)
        self._heard, self._suspected = time.monotonic(), False

    def unassigned(self) -> None:
        """Nothing is consumed any more."""
        self._reached = {}

    def heard(self, reached: Mapping[Place, int]) -> None:
        """The next offset to hear of each partition that messages, or its end, came from."""
        if reached:
            self.assigned(reached)

    def check(self) -> None:
        """Call when nothing came. Blocks for seconds, every 15 seconds, if the cluster is away.

        Raises:
            CrossrepError: there is something to hear, for longer than a connection takes to come back. A new process hears it.
        """
        if time.monotonic() - self._heard < SILENCE:
            return
        self._heard = time.monotonic()
        other = kafka.consumer(self._bootstrap)
        try:
            for (topic, number), reached in self._reached.items():
                _, end = other.get_watermark_offsets(TopicPartition(topic, number), timeout=5.0)
                if end > reached:
                    if self._suspected:
                        raise CrossrepError(
                            f"nothing was heard for {2 * SILENCE:.0f} s, though {topic}[{number}] goes on to {end}: the connection is gone "
                            "for good. Start the worker again; nothing else is lost"
                        )
                    self._suspected = True
                    return
            self._suspected = False
        except KafkaException:
            self._suspected = False
            log.info("nothing was heard for %.0f s, and the cluster does not answer", SILENCE)
        finally:
            other.close()


def reached(events: Sequence[Message]) -> dict[Place, int]:
    """The next offset to hear of each partition, by what a consumer gave: messages, and the ends of partitions."""
    return {
        (event.topic(), event.partition()): event.offset() + (event.error() is None)
        for event in events
        if event.error() is None or kafka.is_end(event)
    }
