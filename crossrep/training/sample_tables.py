"""Samples as a table: the last record of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from crossrep import kafka
from crossrep.extras import extra
from crossrep.spec import Space
from crossrep.training.samples import CODEC

with extra("analytics"):
    import pyarrow as pa

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
        newest = {
            sample["sample_id"]: sample
            for _, sample in in_order(space, bootstrap, number, first, end, progressed)
            if (since is None or since <= sample["event_time"]) and (until is None or sample["event_time"] < until)
        }
        tables.append(pa.Table.from_pylist(list(newest.values()), SCHEMA))
    return pa.concat_tables(tables).sort_by([("event_time", "ascending"), ("sample_id", "ascending")]).combine_chunks()


def in_order(
    space: Space, bootstrap: str, number: int, first: int, end: int, progressed: Progressed = lambda n: None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every record of one partition within [first, end), with its offset. Raises as `read` does."""
    done = first
    for run in kafka.runs(bootstrap, space.samples_topic, {number: (first, end)}):
        for message in run:
            yield message.offset(), CODEC.decode(message.value())
        progressed(run[-1].offset() + 1 - done)
        done = run[-1].offset() + 1
    progressed(end - done)
