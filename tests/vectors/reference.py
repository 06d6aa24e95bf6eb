"""A reader of frames, records and training samples in plain Python, written from docs/formats.md alone: what a port to another language
looks like.

It imports nothing but `struct`, and is used by the tests to check crossrep's own codecs and the test vectors.
"""

from __future__ import annotations

import struct
from typing import Any

HALVES = {"float16": "e", "float32": "f"}


def murmur2(key: bytes) -> int:
    """Kafka's murmur2, as an unsigned 32-bit number."""
    m, h = 0x5BD1E995, 0x9747B28C ^ len(key)
    whole = len(key) - len(key) % 4
    for i in range(0, whole, 4):
        k = int.from_bytes(key[i : i + 4], "little") * m & 0xFFFFFFFF
        k = (k ^ k >> 24) * m & 0xFFFFFFFF
        h = (h * m & 0xFFFFFFFF) ^ k
    if tail := key[whole:]:
        h = (h ^ int.from_bytes(tail, "little")) * m & 0xFFFFFFFF
    h = (h ^ h >> 13) * m & 0xFFFFFFFF
    return h ^ h >> 15


def partition(key: bytes, partitions: int) -> int:
    return (murmur2(key) & 0x7FFFFFFF) % partitions


def fingerprint(canonical_schema: str) -> bytes:
    """CRC-64-AVRO of a schema in Parsing Canonical Form, in the order of the wire."""
    crc = 0xC15D213AA4D7A795
    for byte in canonical_schema.encode():
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0xC15D213AA4D7A795 & -(crc & 1))
    return crc.to_bytes(8, "little")


def record(value: bytes, header: bytes, fields: list[dict[str, Any]]) -> dict[str, Any]:
    """`fields` are name, offset and dim (absent: a double) of docs/formats.md."""
    assert value[:10] == header
    out: dict[str, Any] = {}
    end = 10
    for field in fields:
        assert field["offset"] == end
        if "dim" in field:
            out[field["name"]] = list(struct.unpack_from(f"<{field['dim']}f", value, end))
            end += 4 * field["dim"]
        else:
            (out[field["name"]],) = struct.unpack_from("<d", value, end)
            end += 8
    assert end == len(value)
    return out


class Cursor:
    """Reads Avro, and notes what lies where."""

    def __init__(self, data: bytes, place: int):
        self.data, self.place = data, place
        self.trace: list[tuple[int, int, str]] = []

    def take(self, size: int, what: str) -> bytes:
        start, self.place = self.place, self.place + size
        assert self.place <= len(self.data)
        if size:
            self.trace.append((start, self.place, what))
        return self.data[start : self.place]

    def long(self, what: str) -> int:
        """A zigzag varint."""
        start, shift, value = self.place, 0, 0
        while True:
            byte = self.data[self.place]
            self.place += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        number = (value >> 1) ^ -(value & 1)
        self.trace.append((start, self.place, f"{what}: {number}"))
        return number

    def bytes(self, what: str) -> bytes:
        return self.take(self.long(f"{what}, length"), what)

    def text(self, what: str) -> str:
        return self.bytes(what).decode()

    def floats(self, kind: str, n: int, what: str) -> list[float]:
        """Of kind "d" or "f"; what they are stands in the trace."""
        found = list(struct.unpack(f"<{n}{kind}", self.take(struct.calcsize(f"<{n}{kind}"), what)))
        self.trace[-1] = (*self.trace[-1][:2], f"{what} = {found[0] if kind == 'd' else found}")
        return found


def frame(value: bytes, header: bytes) -> tuple[dict[str, Any], list[tuple[int, int, str]]]:
    """A frame as rows, and what lies where."""
    cursor = Cursor(value, 0)
    assert cursor.take(10, "C3 01 and the frame schema's fingerprint") == header
    space_hash = cursor.take(8, "space_hash")
    entity = cursor.bytes("entity").decode()
    n = cursor.long("rows")
    offsets = struct.unpack(f"<{n + 1}i", cursor.bytes("key_offsets, int32"))
    keys = cursor.bytes("keys")
    times = struct.unpack(f"<{n}d", cursor.bytes("times, float64"))
    counts = _column(cursor.bytes("counts, int64"), "q", n, (1,) * n)
    blocks, columns = [], []
    while count := cursor.long("vectors, blocks that follow"):
        for _ in range(count):
            kind = ("float16", "float32")[cursor.long("dtype")]
            dim = cursor.long("dim")
            flat = struct.unpack(f"<{n * dim}{HALVES[kind]}", cursor.bytes(f"values, {kind}"))
            blocks.append([list(flat[i * dim : (i + 1) * dim]) for i in range(n)])
    while count := cursor.long("columns that follow"):
        for _ in range(count):
            name = cursor.bytes("name").decode()
            present = _column(cursor.bytes("present, uint8"), "B", n, (1,) * n)
            weights = _column(cursor.bytes("weights, float64"), "d", n, (1.0,) * n)
            own_times = _column(cursor.bytes("times, float64"), "d", n, times)
            columns.append((name, present, weights, own_times, cursor.long("vectors, index")))
    assert cursor.place == len(value)
    rows = []
    for i in range(n):
        parts: dict[str, Any] = {}
        for name, present, weights, own_times, index in columns:
            if present[i]:
                parts[name] = {"weight": weights[i], "time": own_times[i], "vector": blocks[index][i] if index >= 0 else []}
        rows.append({"key": keys[offsets[i] : offsets[i + 1]].decode(), "time": times[i], "count": counts[i], "columns": parts})
    return {"space_hash": space_hash.hex(), "entity": entity, "rows": rows}, cursor.trace


def training_sample(
    value: bytes, header: bytes, entities: dict[str, list[dict[str, Any]]]
) -> tuple[dict[str, Any], list[tuple[int, int, str]]]:
    """A training sample, and what lies where. `entities`: each one's record fields, as `record` takes them; their offsets are not used."""
    cursor = Cursor(value, 0)
    assert cursor.take(10, "C3 01 and the training schema's fingerprint") == header
    (before,) = cursor.floats("d", 1, "known_before")
    known: dict[str, dict[str, Any]] = {}
    for entity, fields in entities.items():
        known[entity] = {}
        for field in fields:
            found = cursor.floats("f" if "dim" in field else "d", field.get("dim", 1), f"{entity}.{field['name']}")
            known[entity][field["name"]] = found if "dim" in field else found[0]
    sample: dict[str, Any] = {name: cursor.text(name) for name in ("sample_id", "impression_id", "user_id", "item_id")}
    sample["event_time"] = cursor.long("event_time")
    sample["scenario"] = cursor.text("scenario")
    sample["branch"] = ("content", "ad")[cursor.long("branch")]
    sample["label"] = cursor.long("label")
    sample["clicked_at"] = cursor.long("clicked_at") if cursor.long("clicked_at, 1: there is one") else None
    assert cursor.place == len(value)
    return {"known_before": before, "known": known, "sample": sample}, cursor.trace


def _column(data: bytes, kind: str, n: int, default: tuple[Any, ...]) -> tuple[Any, ...]:
    return struct.unpack(f"<{n}{kind}", data) if data else default
