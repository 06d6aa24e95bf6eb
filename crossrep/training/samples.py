"""Labelled samples: impressions, and whether they were clicked, as `crossrep samples` writes them to samples.<space> (docs/samples.md)."""

from __future__ import annotations

from importlib.resources import files

from crossrep.columnar.avro import Codec
from crossrep.spec import Space

CODEC = Codec.load(files("crossrep") / "schemas", "sample")
FIELDS = tuple(field["name"] for field in CODEC.newest["fields"])


def attached_entities(space: Space) -> dict[str, str]:
    """The entities whose key a sample has: entity -> its field."""
    return {entity: space.key_field(entity) for entity in space.entities if space.key_field(entity) in FIELDS}
