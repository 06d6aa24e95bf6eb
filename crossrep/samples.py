"""Labelled samples: impressions, and whether they were clicked, as `crossrep samples` writes them to samples.<space> (docs/samples.md)."""

from __future__ import annotations

from importlib.resources import files

from crossrep.avro import Codec

CODEC = Codec.load(files("crossrep") / "schemas", "sample")
