"""Answers and whole tables as Arrow, and so for pandas, polars and DuckDB."""

from __future__ import annotations

from typing import Any

import numpy as np

from crossrep.extras import extra
from crossrep.files.parquet import ROWS, ids_of, schema, timestamps, to_arrow
from crossrep.views.answers import Representations
from crossrep.views.table import RecordTable

with extra("analytics"):
    import pyarrow as pa


def batch(answer: Representations) -> Any:
    """See `Representations.to_arrow`."""
    ids, _ = ids_of(answer.ids)
    columns = {
        _free("id", answer): ids,
        _free("found", answer): pa.array(answer.found),
        "count": pa.array(answer.counts),
        "event_time": timestamps(answer.event_times),
        "source_offset": pa.array(answer.source_offsets),
    }
    for name, values in answer.items():
        if dim := values.vectors.shape[1]:
            columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(values.vectors.reshape(-1)), dim)
        columns[_free(f"{name}_confidence", answer)] = pa.array(values.confidence if np.isnan(values.weights).any() else values.weights)
        columns[f"{name}_time"] = timestamps(values.times)
    return pa.RecordBatch.from_pydict(columns, metadata={"space": answer.space, "hash": answer.hash})


def _free(name: str, answer: Representations) -> str:
    """A name that no column of the spec has."""
    while name in answer:
        name += "_"
    return name


def table(records: RecordTable) -> Any:
    """See `LocalView.arrow`. Holds the table's lock."""
    with records.lock:
        slots = records.index.slots()
        parts = [slots[first : first + ROWS] for first in range(0, len(slots), ROWS)]
        batches = [to_arrow(records.layout, records.index.keys(part), records.records[part]) for part in parts]
    layout = records.layout
    return pa.Table.from_batches(batches, schema(layout)).replace_schema_metadata({"space": layout.space, "hash": layout.hash})
