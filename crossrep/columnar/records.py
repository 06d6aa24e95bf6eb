"""Representation records: one fixed-width Avro record per entity, the value of the representation topics and of RocksDB.

The Avro single-object header (C3 01, then the schema's 8-byte fingerprint), then every field at a fixed place: `double` for count, times,
weights and offsets, `fixed` for vectors of little-endian float32. There is no varint, so thousands are encoded or decoded as one numpy
structured array, and any Avro reader can still read one. Layout byte by byte: docs/formats.md.
"""

from __future__ import annotations

import json
from functools import cached_property
from typing import Any

import numpy as np
from fastavro.schema import parse_schema
from numpy.typing import NDArray

from crossrep.columnar.avro import single_object_header
from crossrep.errors import BadRecord
from crossrep.spec import Space, column_fields

HEADER = 10  # bytes: C3 01, fingerprint
EVENT_TIME_AT = HEADER + 8  # behind the count; in every record


class RecordLayout:
    """Where each field of one entity's record lies, derived from the spec alone.

    `dtype` is the numpy structure of one record, header included, `fields` that of the part behind it, `schema` its Avro schema.
    The schema's namespace carries the spec's hash, so records of two specs never have the same fingerprint.
    """

    def __init__(self, space: Space, entity: str):
        self.space, self.hash = space.name, space.hash.hex()
        self.entity = entity
        self.columns = space.entities[entity].columns
        doubles = ["count", "event_time", "source_offset"]
        avro: list[dict[str, Any]] = [{"name": name, "type": "double"} for name in doubles]
        fields: list[tuple[str, str] | tuple[str, str, tuple[int]]] = [(name, "<f8") for name in doubles]
        for name, column in self.columns.items():
            for field in column_fields(name, column):
                if field == name:
                    avro.append({"name": name, "type": {"type": "fixed", "name": f"Vector_{name}", "size": 4 * column.dim}})
                    fields.append((name, "<f4", (column.dim,)))
                else:
                    avro.append({"name": field, "type": "double"})
                    fields.append((field, "<f8"))
        self.schema: dict[str, Any] = {
            "type": "record",
            "name": entity,
            "namespace": f"crossrep.{space.name.replace('-', '_')}.h{space.hash.hex()}",
            "fields": avro,
        }
        # A name part may not start with a digit; only the space's may.
        self.schema["namespace"] = ".".join(p if not p[0].isdigit() else f"_{p}" for p in self.schema["namespace"].split("."))
        self.fields = fields
        self.dtype = np.dtype([("header", f"V{HEADER}"), *fields])

    @property
    def size(self) -> int:
        """Bytes of one record."""
        return self.dtype.itemsize

    @cached_property
    def header(self) -> bytes:
        return single_object_header(self.schema)

    def empty(self, n: int) -> NDArray[np.void]:
        """n records with headers set and everything else zero."""
        records = np.zeros(n, self.dtype)
        records["header"] = np.void(self.header)
        return records

    def decode(self, values: list[bytes], place: str = "record") -> NDArray[np.void]:
        """Records of many values at once.

        Raises:
            BadRecord: a value has another length or another header; says which.
        """
        blob = b"".join(values)
        if not set(map(len, values)) <= {self.size}:
            wrong = next(i for i, value in enumerate(values) if len(value) != self.size)
            raise BadRecord("length", f"{place} {wrong} has {len(values[wrong])} bytes, not the {self.size} of this space's {self.entity}")
        records = np.frombuffer(blob, self.dtype)
        foreign = records["header"] != np.void(self.header)
        if foreign.any():
            wrong = int(np.flatnonzero(foreign)[0])
            raise BadRecord("schema", f"{place} {wrong} was written with another spec than this space's")
        return records


def avro_schema(layout: RecordLayout) -> Any:
    """The schema as fastavro wants it: `fastavro.schemaless_reader(BytesIO(value[10:]), avro_schema(layout), None)`."""
    return parse_schema(json.loads(json.dumps(layout.schema)))
