"""Parquet of events → Parquet of samples: the upstream model's representations beside each event, for `crossrep replay`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from crossrep.errors import DataError
from crossrep.files import places
from crossrep.rollout.replay_files import MODEL, keys_column, opened, paths_of, seconds
from crossrep.spec import Space
from crossrep.writer import rounded
from models.upstream import Identity, UpstreamModel
from streams.inference.features import FeatureView
from streams.inference.infer import check_model

BATCH = 4096  # events a forward pass

Progressed = Callable[[int, int], None]  # events further, of so many


def represent(
    url: str,
    space: Space,
    model: UpstreamModel,
    identity: Identity,
    bootstrap: str,
    out: Path,
    progressed: Progressed = lambda events, total: None,
) -> int:
    """Write each file of events again, with a column for every source of the space. Features are those that are published now.

    Args:
        url: files with the columns user_id, item_id, event, event_time, scenario and branch; others are kept as they are.
        out: a folder, for files of the same names.

    Returns:
        The events.

    Raises:
        ModelError: the model does not give what the space aggregates.
        DataError: a file is no Parquet, lacks a column or holds what is no event; says which.
    """
    check_model(space, model, identity)
    fs, paths = paths_of(url)
    out.mkdir(parents=True, exist_ok=True)
    users = FeatureView("user", space.inputs.user_features, model, bootstrap)
    items = FeatureView("item", space.inputs.item_features, model, bootstrap)
    try:
        users.wait()
        items.wait()
        total: int = sum(pq.ParquetFile(opened(fs, path)).metadata.num_rows for path in paths)
        for path in paths:
            _file(fs, path, out / path.rpartition("/")[2], space, model, identity, users, items, lambda events: progressed(events, total))
        return total
    except (OSError, KeyError, ValueError, TypeError, pa.ArrowException) as error:
        raise DataError(f"events in {url} cannot be represented: {error}") from None
    finally:
        users.close()
        items.close()


def _file(
    fs: Any,
    path: str,
    to: Path,
    space: Space,
    model: UpstreamModel,
    identity: Identity,
    users: FeatureView,
    items: FeatureView,
    progressed: Callable[[int], None],
) -> None:
    if places.is_local(fs) and to.exists() and os.path.samefile(path, to):
        raise ValueError(f"{to} would be written over itself: choose another --out")
    kind = pa.float16() if space.vectors == "float16" else pa.float32()
    beside = to.with_name(f"{to.name}.part")
    with opened(fs, path) as file:
        source = pq.ParquetFile(file)
        layout = source.schema_arrow
        for name, dim in space.sources.items():
            layout = layout.append(pa.field(name, pa.list_(pa.field("element", kind, nullable=False), dim)))
        said = json.dumps({"label": identity.label, "digest": identity.digest})
        layout = layout.with_metadata({**(layout.metadata or {}), MODEL: said})
        with pq.ParquetWriter(beside, layout, compression="zstd") as writer:
            for batch in _batches(source):
                times = seconds(batch.column("event_time"))
                scenario, branch = (batch.column(name).cast(pa.string()).to_pylist() for name in ("scenario", "branch"))
                outputs = model.forward(
                    users.rows(keys_column(batch.column("user_id"))),
                    items.rows(keys_column(batch.column("item_id"))),
                    model.encode_events([text or "" for text in scenario], branch, times),
                )
                columns = list(batch.columns)
                for name, dim in space.sources.items():
                    vectors = np.ascontiguousarray(rounded(outputs[name], space.vectors)).astype(space.vectors)
                    columns.append(pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), type=layout.field(name).type))
                    assert vectors.shape[1] == dim
                writer.write_batch(pa.record_batch(columns, layout), row_group_size=65_536)
                progressed(len(batch))
    os.replace(beside, to)


def _batches(source: Any) -> Iterator[Any]:
    for batch in source.iter_batches(65_536):
        for first in range(0, len(batch), BATCH):
            yield batch.slice(first, BATCH)
