"""Avro schemas of the events, one file a version. README.md has the rule for changing them."""

from functools import cache
from pathlib import Path

from crossrep.columnar.avro import Codec


@cache
def codec(name: str) -> Codec:
    """The codec of one schema, all versions: impression, click, user_features, item_features, inference, dead_letter or undo."""
    return Codec.load(Path(__file__).parent, name)
