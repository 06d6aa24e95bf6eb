"""Which messages a frame was made of: a Kafka header on every frame of `infer` and `frame`, so that a rewind knows what to read again."""

from __future__ import annotations

import json
from dataclasses import dataclass

from confluent_kafka import Message

HEADER = "crossrep.source"

Place = tuple[str, int]  # topic, partition


@dataclass(frozen=True)
class Source:
    """A batch's part of each input partition: the offset of its first message, and the offset behind its last."""

    group: str  # the consumer group that reads the input
    spans: dict[Place, tuple[int, int]]
    rewound: int = 0  # how often the space had been, so that a batch is told apart from the same events read again

    @property
    def ends(self) -> dict[Place, int]:
        """The offset behind the last message of each partition."""
        return {place: end for place, (_, end) in self.spans.items()}


def of(group: str, messages: list[Message], rewound: int) -> Source:
    spans: dict[Place, tuple[int, int]] = {}
    for topic, partition, offset in zip(map(Message.topic, messages), map(Message.partition, messages), map(Message.offset, messages)):
        place = (topic, partition)
        spans[place] = (spans[place][0] if place in spans else offset, offset + 1)
    return Source(group, spans, rewound)


def encode(source: Source) -> list[tuple[str, bytes]]:
    """The headers of a frame."""
    topics: dict[str, dict[str, tuple[int, int]]] = {}
    for (topic, partition), span in source.spans.items():
        topics.setdefault(topic, {})[str(partition)] = span
    return [(HEADER, json.dumps({"group": source.group, "rewound": source.rewound, "topics": topics}).encode())]


def decode(message: Message) -> Source | None:
    """What a frame says of its source; None if it says nothing: another team's writer made it."""
    found = dict(message.headers() or []).get(HEADER)
    if found is None:
        return None
    return parse(found)


def parse(header: bytes | str) -> Source:
    """What the header says."""
    said = json.loads(header)
    spans = {(topic, int(number)): (a, b) for topic, numbers in said["topics"].items() for number, (a, b) in numbers.items()}
    return Source(said["group"], spans, said.get("rewound", 0))
