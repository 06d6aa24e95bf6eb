"""What a reader asks the cluster: once, and a follower every second."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass

from confluent_kafka import IsolationLevel, KafkaError, KafkaException, TopicCollection, TopicPartition
from confluent_kafka.admin import AdminClient, ListOffsetsResultInfo, OffsetSpec, TopicDescription

from crossrep import kafka
from crossrep.errors import CrossrepError, TopicError
from crossrep.views.moments import Moment

TIMEOUT = 5.0  # seconds


@dataclass(frozen=True)
class Probe:
    """What the cluster is asked, without waiting: which topic has this name, and where does it end?"""

    asked: Moment
    _topic: Future[TopicDescription]
    _ends: dict[TopicPartition, Future[ListOffsetsResultInfo]]

    @classmethod
    def send(cls, admin: AdminClient, topic: str, partitions: list[int]) -> Probe:
        latest = {TopicPartition(topic, number): OffsetSpec.latest() for number in partitions}
        asked = Moment.now()
        ends = admin.list_offsets(latest, isolation_level=IsolationLevel.READ_COMMITTED, request_timeout=TIMEOUT)
        return cls(asked, admin.describe_topics(TopicCollection([topic]), request_timeout=TIMEOUT)[topic], ends)

    @property
    def answered(self) -> bool:
        return self._topic.done() and all(end.done() for end in self._ends.values())

    @property
    def topic_id(self) -> str | None:
        """None: there is no such topic. Raises KafkaException if the cluster did not answer."""
        try:
            return str(self._topic.result().topic_id)
        except KafkaException as error:
            if error.args[0].code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
                return None
            raise

    @property
    def ends(self) -> dict[int, int] | None:
        """Per partition; None unless every leader answered."""
        if any(end.exception() for end in self._ends.values()):
            return None
        ends = {place.partition: end.result().offset for place, end in self._ends.items()}
        return None if min(ends.values()) < 0 else ends  # negative, without an error: no answer in time


def describe(topic: str, bootstrap: str) -> TopicDescription:
    """A topic's id and partitions.

    Raises:
        TopicError: there is no such topic.
        CrossrepError: the cluster does not answer for a minute, or refuses.
    """

    def ask() -> TopicDescription:
        admin = kafka.admin(bootstrap)
        return admin.describe_topics(TopicCollection([topic]), request_timeout=TIMEOUT)[topic].result()

    try:
        return kafka.retried(ask, kafka.TRANSIENT)
    except KafkaException as error:
        if error.args[0].code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
            raise TopicError("the topic does not exist. Create the space's topics: crossrep topics create SPEC.toml") from None
        raise CrossrepError(f"the cluster does not describe the topic: {error.args[0].str()}") from None
