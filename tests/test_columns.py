"""Columns hold what `Codec.decode` says of each event, or are not sure of it."""

from __future__ import annotations

import json
import random
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastavro import schemaless_writer
from hypothesis import given
from hypothesis import strategies as st

import schemas
from crossrep.columnar.avro import HEADER_BYTES, Codec
from crossrep.errors import BadRecord
from schemas import codec
from schemas.columns import ColumnDecoder, Columns

KINDS = ["impression", "click"]
FIELDS = ["user_id", "item_id", "event_time", "scenario", "branch"]
DECODER = ColumnDecoder([codec(kind) for kind in KINDS], FIELDS)
TEXT = st.text(max_size=70) | st.text("abc019-_", max_size=20)
EVENTS = st.fixed_dictionaries(
    {
        **dict.fromkeys(("event_id", "user_id", "item_id", "scenario", "impression_id"), TEXT),
        "event_time": st.integers(-(2**63), 2**63 - 1),
        "branch": st.sampled_from(["content", "ad"]),
    }
)


def encoded(version: str, event: dict[str, Any]) -> bytes:
    """As a producer that knows this version would write it."""
    kind, number = version.split(".")
    header, schema = list(codec(kind).versions.items())[int(number) - 1]
    out = BytesIO(header)
    out.seek(HEADER_BYTES)
    schemaless_writer(out, schema, {field["name"]: event[field["name"]] for field in schema["fields"]})
    return out.getvalue()


def row(columns: Columns, i: int) -> dict[str, Any]:
    at = np.array([i])
    texts = {name: columns.texts(name, at)[0] for name in FIELDS if name != "event_time"}
    return {**texts, "event_time": int(columns.of("event_time")[i])}


def agrees(columns: Columns, i: int, kind: str, value: bytes | None) -> None:
    try:
        event = codec(kind).decode(value)
    except BadRecord:
        assert not columns.sure[i]
        return
    if columns.whole[i]:
        assert row(columns, i) == {name: event[name] for name in FIELDS}
        assert columns.sure[i] == all(text.isascii() for text in event.values() if isinstance(text, str))


@given(st.lists(st.tuples(EVENTS, st.sampled_from(["impression.1", "impression.2", "click.1"])), max_size=20))
def test_every_version_of_every_event(events: list[tuple[dict[str, Any], str]]) -> None:
    values = [encoded(version, event) for event, version in events]
    kinds = [version.split(".")[0] for _, version in events]
    columns = DECODER.decode(values, np.array([KINDS.index(kind) for kind in kinds], np.int8))
    assert columns.whole.all()
    for i, (kind, value) in enumerate(zip(kinds, values)):
        agrees(columns, i, kind, value)


@given(EVENTS, st.sampled_from(["impression.1", "impression.2", "click.1"]), st.randoms(use_true_random=False))
def test_damaged_bytes_are_never_taken_for_sure(event: dict[str, Any], version: str, chance: random.Random) -> None:
    good = encoded(version, event)
    kind = version.split(".")[0]
    values: list[bytes | None] = [None, b"", good + b"\0"]
    for _ in range(40):
        bad = bytearray(good[: chance.randrange(len(good) + 1)] if chance.random() < 0.3 else good)
        for _ in range(chance.randrange(3)):
            if bad:
                bad[chance.randrange(len(bad))] = chance.randrange(256)
        values.append(bytes(bad))
    columns = DECODER.decode(values, np.full(len(values), KINDS.index(kind), np.int8))
    for i, value in enumerate(values):
        agrees(columns, i, kind, value)


def test_a_click_is_no_impression() -> None:
    value = encoded(
        "click.1", {**dict.fromkeys(["event_id", "user_id", "item_id", "scenario", "impression_id"], "x"), "event_time": 1, "branch": "ad"}
    )
    assert DECODER.decode([value, value], np.array([1, 0], np.int8)).sure.tolist() == [True, False]


def test_keys_are_cut_out_of_the_values() -> None:
    events = [
        {"event_id": "e", "user_id": f"u{n}" * (n + 1), "item_id": "i", "event_time": n, "scenario": "", "branch": "ad"} for n in range(9)
    ]
    columns = DECODER.decode([codec("impression").encode(event) for event in events], np.zeros(9, np.int8))
    assert columns.keys("user_id", np.array([7, 0, 3])).tolist() == [events[n]["user_id"].encode() for n in (7, 0, 3)]
    assert len(columns.keys("user_id", np.array([], np.int64))) == 0
    assert columns.keys("branch", np.array([1, 2])).tolist() == [b"ad", b"ad"]
    assert columns.empty("scenario", np.arange(9)).all() and not columns.empty("branch", np.arange(9)).any()


def test_a_symbol_that_only_the_writer_knows_becomes_the_default(tmp_path: Path) -> None:
    older = json.loads((Path(schemas.__file__).parent / "impression.2.avsc").read_text())
    newer = json.loads(json.dumps(older).replace('["content", "ad"]', '["content", "video", "ad"]'))
    both = Codec([newer, older])  # the reader's newest is the one without "video"
    event = {"event_id": "e", "user_id": "u", "item_id": "i", "event_time": 1, "scenario": "s"}
    values = [Codec([newer]).encode({**event, "branch": branch}) for branch in ("content", "video", "ad")]
    columns = ColumnDecoder([both], FIELDS).decode(values, np.zeros(3, np.int8))
    assert columns.texts("branch", np.arange(3)) == [both.decode(value)["branch"] for value in values] == ["content", "content", "ad"]


def test_a_field_that_is_no_column() -> None:
    with pytest.raises(ValueError, match="'values' is of type"):
        ColumnDecoder([codec("user_features")], ["user_id"])
