"""Labelled samples: impressions, and whether they were clicked (docs/samples.md)."""

from __future__ import annotations

from importlib.resources import files

from crossrep.avro import Codec

CODEC = Codec.load(files("crossrep") / "schemas", "sample")
