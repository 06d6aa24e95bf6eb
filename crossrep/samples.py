"""Labelled samples: impressions, and whether they were clicked, as `crossrep samples` writes them to samples.<space> (docs/samples.md)."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from typing import Any

from crossrep import kafka
from crossrep.avro import Codec
from crossrep.extras import extra
from crossrep.spec import Space

with extra("analytics"):
    import pyarrow as pa

CODEC = Codec.load(files("crossrep") / "schemas", "sample")

_MILLIS = pa.timestamp("ms", "UTC")
SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("impression_id", pa.string()),
        ("user_id", pa.string()),
        ("item_id", pa.string()),
        ("event_time", _MILLIS),
        ("scenario", pa.string()),
        ("branch", pa.string()),
        ("label", pa.int8()),
        ("clicked_at", _MILLIS),
    ]
)

Bounds = dict[int, tuple[int, int]]  # partition -> first and next offset
Progressed = Callable[[int], None]


def read(
    space: Space,
    bootstrap: str,
    bounds: Bounds,
    since: int | None = None,
    until: int | None = None,
    progressed: Progressed = lambda n: None,
) -> Any:
    """The samples that lie within the bounds, the last record of each: a pyarrow Table of SCHEMA, in event-time order.

    Memory: some 150 bytes a sample, and of one partition's samples, as Python objects, about a kilobyte each.

    Args:
        since, until: event times, ms since 1970: since <= event_time < until, where they are given.
        progressed: told how many offsets further it is.

    Raises:
        BadRecord: a message is no sample.
        CrossrepError: the cluster does not answer.
    """
    tables = [SCHEMA.empty_table()]
    for number, (first, end) in sorted(bounds.items()):
        newest: dict[str, dict[str, Any]] = {}
        done = first
        for run in kafka.runs(bootstrap, space.samples_topic, {number: (first, end)}):
            for message in run:
                sample = CODEC.decode(message.value())
                if (since is None or since <= sample["event_time"]) and (until is None or sample["event_time"] < until):
                    newest[sample["sample_id"]] = sample
            progressed(run[-1].offset() + 1 - done)
            done = run[-1].offset() + 1
        progressed(end - done)
        tables.append(pa.Table.from_pylist(list(newest.values()), SCHEMA))
    return pa.concat_tables(tables).sort_by([("event_time", "ascending"), ("sample_id", "ascending")]).combine_chunks()
