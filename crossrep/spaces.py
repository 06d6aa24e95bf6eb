"""The control topic `spaces`: from it readers learn everything about a space, knowing only its name."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass

from confluent_kafka import KafkaException, TopicPartition

from crossrep import kafka
from crossrep.errors import CrossrepError, SpaceError
from crossrep.spec import Space

SPACES_TOPIC = "spaces"  # compacted, one partition; space name -> JSON
MODELS_TOPIC = "models"  # likewise: space name -> the model that writes to it (streams/binding.py)
READ_WITHIN = 20.0  # seconds, of the whole topic


@dataclass(frozen=True)
class Published:
    """A space as its owner published it."""

    space: Space
    topic_ids: dict[str, str]  # topic -> the id Kafka gave it when it was created
    rewinding: str = ""  # while a rewind is under way: how it was called; no worker may start on half of it


def encode(published: Published) -> bytes:
    """The value on the control topic."""
    space = published.space
    said = {"spec": space.toml_dict, "hash": space.hash.hex(), "topic_ids": published.topic_ids, "rewinding": published.rewinding}
    return json.dumps(said, indent=1).encode()


def read_all(bootstrap: str | None = None, topic: str = SPACES_TOPIC) -> dict[str, bytes]:
    """What is published, by name, still to be decoded: one space that this version cannot read must not hide the others.

    Raises:
        CrossrepError: the cluster does not answer, within READ_WITHIN.
    """
    address = kafka.bootstrap_servers(bootstrap)
    deadline = time.monotonic() + READ_WITHIN

    def in_time() -> None:
        if time.monotonic() > deadline:
            raise CrossrepError(
                f"Kafka at {address} answers, but does not hand out topic {topic} within {READ_WITHIN:g} s: it fell silent, or the "
                "partition has no leader. Try again when the cluster is healthy"
            )

    def watermarks() -> tuple[int, int]:
        in_time()
        first, end = client.get_watermark_offsets(TopicPartition(topic, 0), timeout=READ_WITHIN / 4)
        return first, end

    client = kafka.consumer(address, config=kafka.ENDS)
    try:
        try:
            metadata = client.list_topics(topic, timeout=READ_WITHIN / 2)
            if metadata.topics[topic].error is not None:
                return {}
            first, _ = kafka.retried(watermarks, kafka.TRANSIENT)
        except KafkaException as error:
            raise CrossrepError(
                f"no Kafka answers at {address} ({error.args[0].str()}). Start one: crossrep kafka up, or set KAFKA_BOOTSTRAP"
            ) from None
        client.assign([TopicPartition(topic, 0, first)])
        found: dict[str, bytes] = {}
        while True:
            in_time()
            for message in client.consume(100, 0.1):
                if kafka.is_end(message):
                    return found
                if message.error():
                    if message.error().code() in kafka.TRANSIENT:
                        continue
                    raise CrossrepError(f"reading {topic}: {message.error().str()}")
                name = message.key().decode(errors="replace")
                if message.value() is None:
                    found.pop(name, None)
                else:
                    found[name] = message.value()
    finally:
        client.close()


def find(name: str, bootstrap: str | None = None) -> Published:
    """One published space.

    Raises:
        SpaceError: there is none of that name; says which there are.
    """
    published = read_all(bootstrap)
    if name not in published:
        known = ", ".join(sorted(published)) or "none yet"
        raise SpaceError(
            f"no space {name!r} at {kafka.bootstrap_servers(bootstrap)} (known: {known}). Create it: crossrep topics create SPEC.toml"
        )
    return decode(name, published[name])


def decode(name: str, value: bytes) -> Published:
    """A space as published.

    Raises:
        SpecError, SpaceError: it is invalid here, or has not the hash it was published with: this crossrep is too old or too new for it.
    """
    try:
        declared = json.loads(value)
        spec, digest, topic_ids = declared["spec"], declared["hash"], declared["topic_ids"]
    except (ValueError, KeyError, TypeError) as error:
        raise SpaceError(f"what topic {SPACES_TOPIC} says of space {name!r} cannot be read: {error!r}") from None
    space = Space.from_dict(spec, source=f"space {name!r} on topic {SPACES_TOPIC}")
    if space.hash.hex() != digest:
        raise SpaceError(
            f"space {name!r} was published with hash {digest}, read here as {space.hash.hex()}: use the crossrep version that published it"
        )
    return Published(space, topic_ids, declared.get("rewinding", ""))
