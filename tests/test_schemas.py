"""Schemas: what any version wrote is read with every other, released files do not change, and damaged bytes are refused."""

from __future__ import annotations

import hashlib
import itertools
import json
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import fastavro
import pytest
from fastavro.schema import parse_schema

import crossrep
import schemas
from crossrep.columnar.avro import HEADER_BYTES, Codec, single_object_header
from crossrep.errors import BadRecord

FOLDERS = [Path(schemas.__file__).parent, Path(crossrep.__file__).parent / "schemas"]


def meaning(node: Any) -> Any:
    """A schema without what is only for people."""
    if isinstance(node, dict):
        return {key: meaning(value) for key, value in node.items() if key != "doc"}
    return [meaning(part) for part in node] if isinstance(node, list) else node


# A released version never changes: its fingerprint, and a digest of everything but the docs (the fingerprint leaves defaults out).
RELEASED = {
    "click.1": ("e30771da62700a24", "1d236657eca2d7c1"),
    "dead_letter.1": ("b6c0f146dacd76f7", "820c93931e65cc8f"),
    "impression.1": ("00695d96ba15c5dc", "283d59fced6d7e13"),
    "impression.2": ("2753e9d580ed6bf8", "9d007ee14171366a"),
    "inference.1": ("d0fa57711f6d664a", "64b0d126c5e4a2b5"),
    "item_features.1": ("aae174fdf630b2a8", "b4fd4ae8dd575963"),
    "user_features.1": ("ec00216a269f4e47", "de5f6e7cdbaf5dae"),
    "frame.1": ("69e0e4f642565ea0", "f849956557fce0ca"),
    "sample.1": ("050a84ba2d1385ec", "6358814df08f67a7"),
    "forget.1": ("14dfba50cb71b8cb", "a79b792791a02d58"),
    "undo.1": ("031d2b03ed5ef8dd", "2a2fc750f8ec54e2"),
}

FILES = {path.name.removesuffix(".avsc"): path for folder in FOLDERS for path in sorted(folder.glob("*.avsc"))}
NAMES = sorted({name.rpartition(".")[0] for name in FILES})


def load(version: str) -> Any:
    return json.loads(FILES[version].read_text("utf-8"))


def versions(name: str) -> list[str]:
    return sorted((v for v in FILES if v.rpartition(".")[0] == name), key=lambda v: int(v.rpartition(".")[2]))


@cache
def codec(name: str) -> Codec:
    return Codec.load(FILES[versions(name)[-1]].parent, name)


def datum(schema: Any) -> Any:
    """Something of every type, made from the schema alone."""
    if isinstance(schema, list):
        return datum(schema[-1])
    kind = schema["type"] if isinstance(schema, dict) else schema
    if isinstance(kind, dict | list):
        return datum(kind)
    match kind:
        case "record":
            return {field["name"]: datum(field["type"]) for field in schema["fields"]}
        case "array":
            return [datum(schema["items"])] * 2
        case "map":
            return {"a": datum(schema["values"]), "ü": datum(schema["values"])}
        case "enum":
            return schema["symbols"][-1]
        case "fixed":
            return bytes(range(schema["size"]))
        case "string":
            return "ünïcode 1"
        case "bytes":
            return b"\x00\xff\x10"
        case "int" | "long":
            return 1_650_844_800
        case "double":
            return 1.5
    raise AssertionError(kind)


def write(schema: Any, value: Any) -> bytes:
    out = BytesIO()
    fastavro.schemaless_writer(out, parse_schema(plain(schema)), value)
    return out.getvalue()


def plain(schema: Any) -> Any:
    return json.loads(json.dumps(schema), object_hook=lambda node: {k: v for k, v in node.items() if k != "logicalType"})


def test_released_versions_never_change() -> None:
    now = {}
    for version in FILES:
        digest = hashlib.sha256(json.dumps(meaning(load(version)), sort_keys=True).encode()).hexdigest()[:16]
        now[version] = (single_object_header(load(version))[2:].hex(), digest)
    assert now == RELEASED, "a released schema changed, or a new version is not pinned here yet"


@pytest.mark.parametrize("name", NAMES)
def test_versions_are_numbered_from_1_without_gaps(name: str) -> None:
    assert versions(name) == [f"{name}.{i}" for i in range(1, len(versions(name)) + 1)]
    assert len({json.dumps([load(v)["name"], load(v)["namespace"]]) for v in versions(name)}) == 1


@pytest.mark.parametrize(("writer", "reader"), [pair for name in NAMES for pair in itertools.product(versions(name), repeat=2)])
def test_what_any_version_wrote_is_read_with_every_other(writer: str, reader: str) -> None:
    sent = datum(load(writer))
    stream = BytesIO(write(load(writer), sent))
    got = fastavro.schemaless_reader(stream, parse_schema(plain(load(writer))), parse_schema(plain(load(reader))))
    assert not stream.read()
    fields = {field["name"]: field for field in load(reader)["fields"]}
    assert set(got) == set(fields)
    for name, value in got.items():
        assert value == (sent[name] if name in sent else fields[name]["default"])


@pytest.mark.parametrize(("older", "newer"), [pair for name in NAMES for pair in itertools.pairwise(versions(name))])
def test_a_new_version_follows_the_rule(older: str, newer: str) -> None:
    """Fields are added and removed only with a default, never change type, and symbols are only added."""
    before, after = ({f["name"]: f for f in plain(load(v))["fields"]} for v in (older, newer))
    for name in set(before) ^ set(after):
        assert "default" in (before.get(name) or after[name]), name
    for name in set(before) & set(after):
        a, b = before[name]["type"], after[name]["type"]
        if isinstance(a, dict) and a.get("type") == "enum":
            assert b["symbols"][: len(a["symbols"])] == a["symbols"], name
            assert "default" in b, name
        else:
            assert meaning(a) == meaning(b), name


@pytest.mark.parametrize("version", [v for v in FILES if v.rpartition(".")[0] != "frame"])
def test_every_enum_has_a_default(version: str) -> None:
    def enums(node: Any) -> list[Any]:
        children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else []
        return ([node] if isinstance(node, dict) and node.get("type") == "enum" else []) + [e for child in children for e in enums(child)]

    assert all(enum["default"] in enum["symbols"] for enum in enums(load(version)))


# --- the codec ---


@pytest.mark.parametrize("name", NAMES)
def test_a_codec_writes_the_newest_version(name: str) -> None:
    sent = datum(load(versions(name)[-1]))
    value = codec(name).encode(sent)
    assert value[:HEADER_BYTES] == single_object_header(load(versions(name)[-1]))
    assert value[HEADER_BYTES:] == write(load(versions(name)[-1]), sent)
    assert codec(name).decode(value) == sent


@pytest.mark.parametrize("version", FILES)
def test_a_codec_reads_every_version_as_the_newest_sees_it(version: str) -> None:
    name = version.rpartition(".")[0]
    got = codec(name).decode(single_object_header(load(version)) + write(load(version), datum(load(version))))
    assert set(got) == {field["name"] for field in load(versions(name)[-1])["fields"]}


def test_a_codec_sorts_versions_by_number(tmp_path: Path) -> None:
    for number in (1, 2, 9, 10):
        fields = [{"name": f"f{i}", "type": "int", "default": i} for i in range(number)]
        (tmp_path / f"thing.{number}.avsc").write_text(json.dumps({"type": "record", "name": "Thing", "fields": fields}))
    (tmp_path / "thing_else.11.avsc").write_text(json.dumps({"type": "record", "name": "Else", "fields": []}))
    loaded = Codec.load(tmp_path, "thing")
    assert len(loaded.decode(loaded.encode({}))) == 10
    assert len(loaded.versions) == 4


def reason(name: str, value: bytes | None) -> str:
    with pytest.raises(BadRecord) as caught:
        codec(name).decode(value)
    assert caught.value.detail
    return caught.value.reason


@pytest.mark.parametrize("name", NAMES)
def test_a_codec_refuses_what_is_damaged(name: str) -> None:
    good = codec(name).encode(datum(load(versions(name)[-1])))
    assert reason(name, None) == reason(name, b"") == "empty"
    for foreign in (b"\x00", good[:9], good[1:], b"\xc3\x01" + bytes(8) + good[10:], b"{}", b"\xc3\x01"):
        assert reason(name, foreign) == "schema"
    for length in range(HEADER_BYTES, len(good)):
        assert reason(name, good[:length]) == "undecodable"
    assert reason(name, good + b"\x00") == reason(name, good + good) == "undecodable"


@pytest.mark.parametrize("name", NAMES)
def test_a_codec_survives_any_changed_byte(name: str) -> None:
    good = codec(name).encode(datum(load(versions(name)[-1])))
    for place in range(len(good)):
        for byte in (0x00, 0x01, 0x7F, 0x80, 0xFE, 0xFF):
            try:
                codec(name).decode(good[:place] + bytes([byte]) + good[place + 1 :])
            except BadRecord as error:
                assert error.reason in ("schema", "undecodable")  # noqa: PT017


def test_event_times_are_plain_milliseconds() -> None:
    """Not datetimes: those cannot hold every long, and cost more than the rest of the event."""
    assert isinstance(schemas.codec("click").decode(schemas.codec("click").encode(datum(load("click.1"))))["event_time"], int)


def test_an_older_event_gets_the_defaults() -> None:
    old = {"event_id": "e", "user_id": "u", "item_id": "i", "event_time": 5}
    got = schemas.codec("impression").decode(single_object_header(load("impression.1")) + write(load("impression.1"), old))
    assert got == {**old, "scenario": "", "branch": "content"}
