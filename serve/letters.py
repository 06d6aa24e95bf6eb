"""The newest dead letters, counted by reason with an example of each, for the page."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from confluent_kafka import Consumer, TopicPartition

from crossrep import kafka
from crossrep.errors import BadRecord
from serve.cluster import LIMIT
from state.dead_letters import CODEC

TAIL = 500  # offsets before the end to begin with: a letter may hold half a MiB
AT_ONCE = 200  # letters read in one go
MAX_REASONS = 50
SHOWN = 300  # characters of a text that others wrote
SMALL = {"fetch.message.max.bytes": 1 << 20, "queued.max.messages.kbytes": 8 << 10, "queued.min.messages": AT_ONCE}


@dataclass
class DeadLetters:
    """Follows the topic from shortly before its end on."""

    bootstrap: str
    topic: str
    first: int = 0  # offset counted from
    end: int = 0  # next offset, of all there are
    kept: int = 0  # offset of the oldest that the broker still has
    reasons: dict[str, dict[str, Any]] = field(default_factory=dict)
    _client: Consumer | None = None

    def look(self) -> None:
        """Count what has come. Raises KafkaException."""
        if self._client is None:
            self._client = kafka.consumer(self.bootstrap, config=SMALL)
            self.kept, self.end = self._client.get_watermark_offsets(TopicPartition(self.topic, 0), timeout=LIMIT)
            self.first, self.reasons = max(self.kept, self.end - TAIL), {}
            self._client.assign([TopicPartition(self.topic, 0, self.first)])
        self.kept, self.end = self._client.get_watermark_offsets(TopicPartition(self.topic, 0), timeout=LIMIT)
        for message in self._client.consume(AT_ONCE, 0.05):
            if message.error() is None:
                self._count(message)
            elif message.error().code() not in kafka.TRANSIENT:  # deleted behind our back: begin anew
                self.close()
                return

    def said(self) -> dict[str, Any]:
        reasons = sorted(self.reasons.values(), key=lambda reason: -reason["count"])
        return {"topic": self.topic, "kept": self.kept, "end": self.end, "counted_from": self.first, "reasons": reasons}

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    def _count(self, message: Any) -> None:
        try:
            letter = CODEC.decode(message.value())
        except BadRecord as error:
            letter = {"topic": "", "partition": -1, "offset": -1, "key": None, "value": None, "reason": "unreadable", "detail": str(error)}
        name = letter["reason"][:SHOWN]
        if name not in self.reasons and len(self.reasons) >= MAX_REASONS:
            name = "others"
        so_far = self.reasons.get(name, {"count": 0})["count"]
        example = {
            "topic": letter["topic"][:SHOWN],
            "partition": letter["partition"],
            "offset": letter["offset"],
            "time": message.timestamp()[1] / 1000,
            "detail": letter["detail"][:SHOWN],
            "key": _text(letter["key"]),
            "value": _text(letter["value"]),
            "bytes": len(letter["value"] or b""),
        }
        self.reasons[name] = {"reason": name, "count": so_far + 1, "example": example}


def _text(value: bytes | None) -> str | None:
    """Bytes for people: UTF-8 if that is what they are, else what is ASCII among them."""
    if value is None:
        return None
    start = value[: SHOWN * 4]
    try:
        text = start.decode("utf-8") if len(start) == len(value) else start.decode("utf-8", "ignore")
    except UnicodeDecodeError:
        text = start.decode("ascii", "replace")
    return "".join(character if character.isprintable() and character != "\ufffd" else "·" for character in text[:SHOWN])
