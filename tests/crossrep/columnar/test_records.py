"""Records: fixed places, and an Avro record to anybody else."""

from __future__ import annotations

import json
from io import BytesIO
from typing import Any

import fastavro
import numpy as np
import pytest
from fastavro.schema import fingerprint, parse_schema, to_parsing_canonical_form
from hypothesis import given
from hypothesis import strategies as st

from crossrep.columnar.aggregates import Aggregates
from crossrep.columnar.records import HEADER, RecordLayout, avro_schema
from crossrep.errors import BadRecord
from crossrep.spec import Space, column_fields
from tests.crossrep.columnar.wire_samples import TOML, raw_rows, space

SPACE = space()
USER = RecordLayout(SPACE, "user")


def some_records(seed: int, n: int = 20) -> np.ndarray:
    rng = np.random.default_rng(seed)
    state = Aggregates(USER, n)
    state.fold(rng.integers(0, n, 3 * n).astype(np.int32), raw_rows(SPACE, "user", [b"x"] * 3 * n, rng))
    return state.records(np.arange(n, dtype=np.int32), int(rng.integers(0, 2**50)))


def canonical(schema: Any, namespace: str = "") -> str:
    """Avro's Parsing Canonical Form, for the types records use, written from the specification."""
    if isinstance(schema, str):
        return json.dumps(schema)
    name = schema["name"] if "." in schema["name"] else f"{schema.get('namespace', namespace)}.{schema['name']}"
    within = name.rpartition(".")[0]
    if schema["type"] == "fixed":
        return f'{{"name":"{name}","type":"fixed","size":{schema["size"]}}}'
    fields = ",".join(f'{{"name":"{f["name"]}","type":{canonical(f["type"], within)}}}' for f in schema["fields"])
    return f'{{"name":"{name}","type":"record","fields":[{fields}]}}'


def crc_64_avro(data: bytes) -> int:
    """The fingerprint algorithm of the Avro specification."""
    empty = 0xC15D213AA4D7A795
    table = []
    for i in range(256):
        value = i
        for _ in range(8):
            value = (value >> 1) ^ (empty & -(value & 1))
        table.append(value)
    found = empty
    for byte in data:
        found = (found >> 8) ^ table[(found ^ byte) & 0xFF]
    return found


def test_the_independent_crc_is_avros() -> None:
    assert crc_64_avro(b'"null"') == 0x63DD24E7CC258F8A  # published in Avro's own schema-tests.txt


@pytest.mark.parametrize("entity", ["user", "item"])
def test_the_header_is_the_fingerprint_of_the_schema(entity: str) -> None:
    layout = RecordLayout(SPACE, entity)
    assert len(layout.header) == HEADER
    assert layout.header[:2] == b"\xc3\x01"
    assert layout.header[2:] == crc_64_avro(canonical(layout.schema).encode()).to_bytes(8, "little")
    fastavros_own = fingerprint(to_parsing_canonical_form(json.loads(json.dumps(layout.schema))), "CRC-64-AVRO")
    assert layout.header[2:].hex() == fastavros_own


@given(st.integers(0, 2**32 - 1))
def test_plain_avro_reads_a_record(seed: int) -> None:
    schema = parse_schema(json.loads(json.dumps(USER.schema)))
    for record in some_records(seed, n=5):
        stream = BytesIO(record.tobytes()[HEADER:])
        datum = fastavro.schemaless_reader(stream, schema, None)
        assert not stream.read()
        for name in (n for n in USER.dtype.names if n != "header"):
            value = np.frombuffer(datum[name], "<f4") if isinstance(datum[name], bytes) else datum[name]
            assert np.array_equal(value, record[name])


def test_avro_schema_is_what_fastavro_wants() -> None:
    (record,) = some_records(1, n=1)
    assert fastavro.schemaless_reader(BytesIO(record.tobytes()[HEADER:]), avro_schema(USER), None)["count"] == record["count"]


def test_plain_avro_writes_a_record() -> None:
    (record,) = some_records(2, n=1)
    datum = {n: record[n].tobytes() if record[n].ndim else float(record[n]) for n in USER.dtype.names if n != "header"}
    out = BytesIO()
    fastavro.schemaless_writer(out, avro_schema(USER), datum)
    assert USER.header + out.getvalue() == record.tobytes()


def test_every_field_lies_where_the_documentation_says() -> None:
    """docs/formats.md: header, count, event_time, source_offset, then per column [weight] time [vector], nothing between."""
    expected, place = {"header": 0, "count": 10, "event_time": 18, "source_offset": 26}, 34
    for name, column in SPACE.entities["user"].columns.items():
        for field in column_fields(name, column):
            expected[field] = place
            place += 4 * column.dim if field == name else 8
    assert {name: USER.dtype.fields[name][1] for name in USER.dtype.names} == expected
    assert USER.size == place
    assert [field["name"] for field in USER.schema["fields"]] == list(USER.dtype.names)[1:]


def test_the_fields_of_every_kind_of_column() -> None:
    fields = {name: column_fields(name, column) for name, column in SPACE.entities["user"].columns.items()}
    assert fields["cr"] == ["cr_weight", "cr_time", "cr"]
    assert fields["rate"] == ["rate_weight", "rate_time"]
    assert fields["ur"] == ["ur_time", "ur"]


def test_numbers_are_little_endian() -> None:
    (record,) = some_records(3, n=1)
    assert record.tobytes()[10:18] == np.array(record["count"], "<f8").tobytes()
    assert record.tobytes()[-12:] == record["ur"].astype("<f4").tobytes()


@given(st.integers(0, 2**32 - 1))
def test_decode_gives_back_what_was_written(seed: int) -> None:
    records = some_records(seed)
    assert USER.decode([record.tobytes() for record in records]).tobytes() == records.tobytes()


def test_decode_of_nothing_is_nothing() -> None:
    assert len(USER.decode([])) == 0


def test_a_wrong_length_is_named() -> None:
    good = [record.tobytes() for record in some_records(1, n=3)]
    for wrong in (good[1][:-1], good[1] + b"x", b""):
        with pytest.raises(BadRecord, match=rf"changelog 1 has {len(wrong)} bytes, not the {USER.size} .* user") as caught:
            USER.decode([good[0], wrong, good[2]], "changelog")
        assert caught.value.reason == "length"


def test_wrong_lengths_that_add_up_are_seen() -> None:
    good = [record.tobytes() for record in some_records(1, n=3)]
    with pytest.raises(BadRecord, match="record 1 has"):
        USER.decode([good[0], good[1] + good[2][:5], good[2][5:]])


def test_a_foreign_header_is_named() -> None:
    good = [record.tobytes() for record in some_records(1, n=3)]
    for place in range(HEADER):
        foreign = bytearray(good[2])
        foreign[place] ^= 1
        with pytest.raises(BadRecord, match="stored record 2 was written with another spec") as caught:
            USER.decode([good[0], good[1], bytes(foreign)], "stored record")
        assert caught.value.reason == "schema"


@pytest.mark.parametrize(
    ("old", "new"), [('half_life = "3d"', 'half_life = "4d"'), ("click = 4.0", "click = 5.0"), ('"test-1"', '"test-2"')]
)
def test_records_of_two_specs_never_have_the_same_header(old: str, new: str) -> None:
    toml = TOML.replace("VECTORS", "float32")
    assert RecordLayout(Space.parse(toml.replace(old, new)), "user").header != USER.header


def test_records_of_two_entities_never_have_the_same_header() -> None:
    shop = '[entities.shop.columns.cr]\nsource = "cr"\ndim = 4\naggregate = "decayed_mean"\nhalf_life = "7d"\n'
    twins = Space.parse(TOML.replace("VECTORS", "float32") + shop)
    assert RecordLayout(twins, "shop").size == RecordLayout(twins, "item").size
    assert RecordLayout(twins, "shop").header != RecordLayout(twins, "item").header


@pytest.mark.parametrize("name", ["1", "9-a-b", "a-b", "0-0"])
def test_any_space_name_makes_a_valid_avro_name(name: str) -> None:
    layout = RecordLayout(Space.parse(TOML.replace("VECTORS", "float16").replace("test-1", name)), "user")
    parts = layout.schema["namespace"].split(".")
    assert all(part.isidentifier() and part.isascii() for part in parts)
    assert parse_schema(json.loads(json.dumps(layout.schema)))
