"""Consumer groups of workers: who is in them, how far they are, and moving them while nobody is."""

from __future__ import annotations

import json
from collections.abc import Iterable

from confluent_kafka import ConsumerGroupState, ConsumerGroupTopicPartitions, KafkaError, KafkaException, TopicPartition

from crossrep import kafka
from crossrep.errors import CrossrepError, StateError
from crossrep.spec import Space, fold_group

Offsets = dict[str, dict[int, int]]  # topic -> partition -> the next message to consume


def refuse_active(bootstrap: str, group: str) -> None:
    """Raises StateError if the group has members, and names them; CrossrepError: the cluster does not answer."""
    admin = kafka.admin(bootstrap)  # held: what a client that is gone was asked is never answered
    try:
        about = admin.describe_consumer_groups([group], request_timeout=kafka.REQUEST_TIMEOUT)[group].result()
    except KafkaException as error:
        if error.args[0].code() == KafkaError.GROUP_ID_NOT_FOUND:
            return
        raise CrossrepError(f"the cluster does not say who is in group {group}: {error.args[0].str()}") from None
    if about.state not in (ConsumerGroupState.EMPTY, ConsumerGroupState.DEAD, ConsumerGroupState.UNKNOWN):
        names = ", ".join(sorted(member.group_instance_id or member.member_id for member in about.members)) or "joining just now"
        raise StateError(
            f"workers of group {group} are running ({names}): stop them all first. One that has just ended counts until its session is "
            "over (10 s unless told otherwise)"
        )


def offsets(bootstrap: str, group: str) -> Offsets:
    """All offsets of a group, as of one moment, none of an open transaction. Empty: there is no such group.

    Raises:
        CrossrepError: the cluster does not answer for a minute, or a transaction stays open.
    """
    admin = kafka.admin(bootstrap)

    def ask() -> Offsets:
        asked = admin.list_consumer_group_offsets(
            [ConsumerGroupTopicPartitions(group)], require_stable=True, request_timeout=kafka.REQUEST_TIMEOUT
        )
        found: Offsets = {}
        for part in asked[group].result().topic_partitions:
            if part.error is not None:
                raise KafkaException(part.error)
            if part.offset >= 0:
                found.setdefault(part.topic, {})[part.partition] = part.offset
        return found

    try:
        return kafka.retried(ask, kafka.TRANSIENT)
    except KafkaException as error:
        raise CrossrepError(f"the cluster does not say how far group {group!r} is: {error.args[0].str()}") from None


def missed(position: int, first: int, end: int) -> bool:
    """Was anything deleted that a group had not consumed, whose next offset is `position`, of a partition that holds [first, end)?

    The last transaction's marker is nothing to consume, and stands alone behind the last message: retention takes it with the rest, and a
    group that was done stays one offset short. What was aborted behind that cannot be told from what was deleted unread.
    """
    return position < first and not first == end == position + 1


def lost(bootstrap: str, group: str, inputs: Iterable[str], output: str) -> bool:
    """Has a group no offset of its inputs at all, although its output holds something? Whoever calls commits both together.

    Raises:
        CrossrepError: the cluster does not answer.
    """
    held = kafka.bounds(bootstrap, output)  # before the offsets: what another member commits in between says nothing
    known = offsets(bootstrap, group)
    if any(known.get(topic) for topic in inputs):
        return False
    # The end alone also counts what was aborted, which is all there is when a first worker was killed in its first transaction.
    return any(first > 0 for first, _ in held.values()) or any(True for _ in kafka.runs(bootstrap, output, held))


def move(bootstrap: str, group: str, to: Offsets) -> None:
    """Set a group's offsets. Raises KafkaException: somebody is in it, or the cluster is away."""
    places = [TopicPartition(topic, number, offset) for topic, numbers in to.items() for number, offset in numbers.items()]
    admin = kafka.admin(bootstrap)
    for future in admin.alter_consumer_group_offsets([ConsumerGroupTopicPartitions(group, places)]).values():
        for part in future.result().topic_partitions:
            if part.error is not None:
                raise KafkaException(part.error)


def folded(space: Space, bootstrap: str) -> dict[int, tuple[int, list[tuple[int, int]]]]:
    """By partition: the next frame to fold, and [first, next) offsets of frames that a rewind has left out."""
    client = kafka.consumer(bootstrap, fold_group(space))
    try:
        parts = kafka.committed(client, [TopicPartition(space.frames_topic, number) for number in range(space.partitions)])
    except KafkaException as error:
        raise CrossrepError(f"the cluster does not say how far {space.frames_topic} is folded: {error.args[0].str()}") from None
    finally:
        client.close()
    return {part.partition: (max(part.offset, 0), _skipped(part.metadata)) for part in parts}


def _skipped(metadata: str | None) -> list[tuple[int, int]]:
    try:
        return [(a, b) for a, b in json.loads(metadata or "{}").get("skipped", [])]  # as state/progress.py writes it
    except (ValueError, AttributeError):
        return []
