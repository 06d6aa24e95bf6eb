"""Nothing is published only where the cluster says so: what a reader must not read, or a broker does not know yet, is no empty topic."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Consumer
from confluent_kafka.admin import (
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    NewTopic,
    ResourcePatternType,
    ResourceType,
)

from crossrep import kafka
from crossrep.control import spaces
from crossrep.errors import SpaceError, TopicError
from streams import broker
from streams.broker import server
from tests.cluster import new_space, wait_for


@pytest.fixture
def guarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A broker that asks who may do what: everybody everything, but for what an ACL names."""
    monkeypatch.setitem(server.SETTINGS, "authorizer.class.name", "org.apache.kafka.metadata.authorizer.StandardAuthorizer")
    monkeypatch.setitem(server.SETTINGS, "allow.everyone.if.no.acl.found", "true")
    yield broker.up(tmp_path / "guarded", progress=False).bootstrap
    broker.down(tmp_path / "guarded", kill=True)


def allow(bootstrap: str, user: str, operation: AclOperation) -> None:
    """On the topic `spaces`: from the first one on, nobody may do what no ACL allows them."""
    anywhere = spaces.SPACES_TOPIC, ResourcePatternType.LITERAL
    binding = AclBinding(ResourceType.TOPIC, *anywhere, user, "*", operation, AclPermissionType.ALLOW)
    admin = kafka.admin(bootstrap)  # held: else its futures never end
    for future in admin.create_acls([binding]).values():
        future.result(30)


def refused(bootstrap: str) -> bool:
    try:
        spaces.read_all(bootstrap)
    except TopicError as error:
        return "topic spaces cannot be read" in str(error) and "needs READ" in str(error)
    return False


def test_who_may_not_read_is_told_so(guarded: str, tmp_path: Path) -> None:
    assert spaces.read_all(guarded) == {}, "there is no such topic"
    space, _ = new_space(guarded, tmp_path, partitions=1)
    allow(guarded, "User:somebody", AclOperation.READ)
    wait_for(lambda: refused(guarded), "who may not even know of the topic")
    with pytest.raises(TopicError, match="cannot be read"):
        spaces.find(space.name, guarded)
    allow(guarded, "User:ANONYMOUS", AclOperation.DESCRIBE)
    client = kafka.consumer(guarded)
    wait_for(lambda: client.list_topics(spaces.SPACES_TOPIC, 10).topics[spaces.SPACES_TOPIC].error is None, "who may know of it")
    client.close()
    assert refused(guarded)
    everything = AclBindingFilter(ResourceType.ANY, None, ResourcePatternType.ANY, None, None, AclOperation.ANY, AclPermissionType.ANY)
    admin = kafka.admin(guarded)
    for future in admin.delete_acls([everything]).values():
        future.result(30)
    wait_for(lambda: not refused(guarded), "who may read it")
    assert spaces.find(space.name, guarded).space == space


def test_a_broker_that_has_not_heard_of_the_topic_is_asked_again(bootstrap: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    topic = f"spaces-{tmp_path.name}"

    class Early(Consumer):
        """Asks just before the topic is there."""

        def list_topics(self, *args: Any, **more: Any) -> Any:
            found = super().list_topics(*args, **more)
            if found.topics[topic].error is not None:
                admin = kafka.admin(bootstrap)
                admin.create_topics([NewTopic(topic, 1, 1)])[topic].result(30)
                producer = kafka.producer(bootstrap)
                producer.produce(topic, b"said", "name", partition=0)
                assert producer.flush(30) == 0
            return found

    monkeypatch.setattr(kafka, "Consumer", Early)
    assert spaces.read_all(bootstrap, topic) == {"name": b"said"}
    monkeypatch.setattr(kafka, "Consumer", Consumer)
    assert spaces.read_all(bootstrap, f"no-{topic}") == {}
    with pytest.raises(SpaceError, match="no space 'nobody'"):
        spaces.find("nobody", bootstrap)
