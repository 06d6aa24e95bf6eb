"""The order to forget a key: a message on the frames topic, so that it is ordered with the frames of its partition.

What came before it is deleted; what comes behind it begins anew. Frames written later of events that happened earlier count as later:
erase the key at the source first.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files

from crossrep.columnar.avro import HEADER_BYTES, Codec
from crossrep.errors import BadFrame, BadRecord
from crossrep.keys import Keys
from crossrep.spec import MAX_KEY_BYTES, Space

CODEC = Codec.load(files("crossrep") / "schemas", "forget")


@dataclass(frozen=True)
class Forget:
    """Delete what is held of `key`."""

    entity: str
    key: bytes


def encode(space: Space, order: Forget) -> bytes:
    return CODEC.encode({"space_hash": space.hash, "entity": order.entity, "key": order.key})


def is_order(value: bytes | None) -> bool:
    """Does this message of the frames topic claim to be an order, rather than a frame?"""
    return value is not None and value[:HEADER_BYTES] in CODEC.versions


def decode(space: Space, value: bytes, partition: int) -> Forget:
    """A validated order.

    Raises:
        BadFrame: with a reason: undecodable, spec, entity, key, partition.
    """
    try:
        order = CODEC.decode(value)
    except BadRecord as error:
        raise BadFrame(error.reason, error.detail) from None
    entity, key = order["entity"], order["key"]
    if order["space_hash"] != space.hash:
        raise BadFrame("spec", f"written for spec {order['space_hash'].hex()}, this space {space.name!r} has {space.hash.hex()}")
    if entity not in space.entities:
        raise BadFrame("entity", f"{entity!r} is not an entity of space {space.name!r}")
    if not 0 < len(key) <= MAX_KEY_BYTES:
        raise BadFrame("key", f"a key has 1 to {MAX_KEY_BYTES} bytes, this one {len(key)}")
    if partition_of(space, key) != partition:
        raise BadFrame("partition", f"key {key!r} belongs to another partition than {partition}")
    return Forget(entity, key)


def partition_of(space: Space, key: bytes) -> int:
    """The partition number that holds a key."""
    return int(Keys.of([key]).partitions(space.partitions)[0])
