"""Avro with the single-object header: every value says which version of its schema wrote it, so no registry is needed.

A value is C3 01, the writer schema's 8-byte fingerprint, then the datum. Each version of a schema is one file, `<name>.<version>.avsc`,
that never changes once released; a reader knows them all and reads every older version with the newest (schemas/README.md has the rule).
"""

from __future__ import annotations

import json
from importlib.resources.abc import Traversable
from io import BytesIO
from pathlib import Path
from typing import Any

from fastavro import schemaless_reader, schemaless_writer
from fastavro.schema import fingerprint, parse_schema, to_parsing_canonical_form

from crossrep.errors import BadRecord

HEADER_BYTES = 10


def single_object_header(schema: Any) -> bytes:
    """C3 01 and the schema's CRC-64-AVRO fingerprint, little-endian, as in the Avro specification's single-object encoding."""
    # fastavro prints the fingerprint's bytes in the order the specification writes them on the wire.
    return b"\xc3\x01" + bytes.fromhex(fingerprint(to_parsing_canonical_form(_fresh(schema)), "CRC-64-AVRO"))


def _fresh(schema: Any) -> Any:
    """A copy, since fastavro marks what it has parsed, without logical types, which would make a datetime of every event's time."""
    return json.loads(json.dumps(schema), object_hook=lambda node: {key: value for key, value in node.items() if key != "logicalType"})


class Codec:
    """Encodes with the newest version of a schema, decodes every version.

    Args:
        schemas: the versions, oldest first.
    """

    def __init__(self, schemas: list[Any]):
        self.versions = {single_object_header(schema): parse_schema(_fresh(schema)) for schema in schemas}
        self.header = single_object_header(schemas[-1])
        self.newest = self.versions[self.header]

    @classmethod
    def load(cls, folder: Path | Traversable, name: str) -> Codec:
        """All versions of one schema: the files `<name>.<version>.avsc` in `folder`."""
        files = [file for file in folder.iterdir() if file.name.startswith(f"{name}.") and file.name.endswith(".avsc")]
        files.sort(key=lambda file: int(file.name.split(".")[1]))
        return cls([json.loads(file.read_text("utf-8")) for file in files])

    def encode(self, datum: dict[str, Any]) -> bytes:
        out = BytesIO()
        out.write(self.header)
        schemaless_writer(out, self.newest, datum)
        return out.getvalue()

    def decode(self, value: bytes | None) -> dict[str, Any]:
        """The datum, as the newest version sees it.

        Raises:
            BadRecord: no value ("empty"), an unknown header ("schema"), or bytes that do not follow their schema ("undecodable").
        """
        if not value:
            raise BadRecord("empty", "the message has no value")
        writer = self.versions.get(value[:HEADER_BYTES])
        if writer is None:
            raise BadRecord("schema", f"starts with {value[:HEADER_BYTES].hex()}, which is no known version of {self.newest['name']}")
        data = BytesIO(value)
        data.seek(HEADER_BYTES)
        try:
            datum = schemaless_reader(data, writer, None if writer is self.newest else self.newest)
        except Exception as error:  # fastavro raises whatever its decoding hits: EOFError, IndexError, UnicodeDecodeError, ...
            raise BadRecord("undecodable", f"{self.newest['name']}: {error!r}") from None
        if data.tell() != len(value):
            raise BadRecord("undecodable", f"{self.newest['name']}: {len(value) - data.tell()} bytes too many")
        return datum  # type: ignore[no-any-return]
