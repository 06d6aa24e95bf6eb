"""Labelled samples in Parquet, such as `crossrep samples` writes, in the place of a data set's own impressions."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossrep.errors import DataError
from crossrep.extras import extra
from crossrep.files import places
from crossrep.files.publication import MANIFEST, WRITER
from models.datasets.base import Dataset, Impressions, runs

COLUMNS = ("sample_id", "user_id", "item_id", "event_time", "scenario", "branch", "label")


def over(dataset: Dataset, path: str) -> Dataset:
    """The samples of `path` with the users, items and features of `dataset`; ids that it does not know have no features.

    `path` is a file, or a folder with Parquet files at any depth (local, or an URL that fsspec knows). What `crossrep training-set` has not
    finished there is left alone. Wanted are COLUMNS: ids, scenario and branch ("ad" or anything else) as text, event_time as float64
    seconds since 1970 or as a timestamp, label as a bool or a number: over 0 is a click. Other columns, such as representations, are not
    read. A sample_id that occurs again is one sample, clicked if any of its rows is: a late click may have changed its label.

    Memory: some 25 bytes a sample, and Arrow's table of the columns above while they are read.

    Raises:
        DataError: there are no samples, a column is missing, or holds what it must not.
    """
    with extra("data"):
        arrow = import_module("pyarrow")
        compute, parquet = import_module("pyarrow.compute"), import_module("pyarrow.dataset")
    fs, root = places.connect(path)
    files = _files(fs, root)
    if not files:
        raise DataError(f"no Parquet files in {path}, or none that are published")
    try:
        found = parquet.dataset(files, format="parquet", partitioning=None, filesystem=fs)
        missing = [name for name in COLUMNS if name not in found.schema.names]
        if missing:
            raise DataError(f"{path}: missing columns {', '.join(missing)}; found {', '.join(found.schema.names)}")
        table = found.to_table(columns=list(COLUMNS))
    except (OSError, arrow.ArrowException) as error:
        raise DataError(f"samples cannot be read from {path}: {error}") from None
    if not len(table):
        raise DataError(f"{path} holds no samples")
    if (nulls := [name for name in COLUMNS if name != "scenario" and table[name].null_count]) != []:
        raise DataError(f"{path}: columns {', '.join(nulls)} have empty fields")

    times = _seconds(table["event_time"], arrow, compute)
    clicked = np.asarray(table["label"].cast("float64")) > 0
    sample, _ = _codes(table["sample_id"], [])
    together = np.lexsort((clicked, sample))
    last = together[np.append(np.diff(sample[together]) > 0, True)]
    order = last[np.lexsort((last, times[last]))]
    user, user_ids = _codes(table["user_id"], list(dataset.user_ids))
    item, item_ids = _codes(table["item_id"], list(dataset.item_ids))
    scenario, scenarios = _codes(table["scenario"].fill_null(""), list(dataset.scenarios))
    whole = Impressions(
        user=user[order].astype(np.int32),
        item=item[order].astype(np.int32),
        event_time=times[order],
        scenario=scenario[order].astype(np.int16),
        ad=np.asarray(compute.equal(table["branch"], "ad"), dtype=np.bool_)[order],
        clicked=clicked[order],
        labels=np.empty((len(order), 0), dtype=np.bool_),
    )
    return replace(
        dataset,
        user_ids=user_ids,
        item_ids=item_ids,
        scenarios=scenarios,
        user_features=_longer(dataset.user_features, len(user_ids)),
        item_features=_longer(dataset.item_features, len(item_ids)),
        impressions=partial(runs, whole),
        size=len(whole),
        labels=(),
    )


def _files(fs: Any, root: str) -> list[str]:
    """The Parquet files below a folder, or the file itself."""
    if fs.isfile(root):
        return [root]
    folders = {name: {path.rpartition("/")[0] for path in fs.glob(f"{root}/**/{name}")} for name in (WRITER, MANIFEST)}
    hidden = tuple(f"{folder}/" for folder in folders[WRITER] - folders[MANIFEST])
    return sorted(path for path in fs.glob(f"{root}/**/*.parquet") if not path.startswith(hidden))


def _seconds(column: Any, arrow: Any, compute: Any) -> NDArray[np.float64]:
    """Seconds since 1970, to the millisecond, as all data sets have them."""
    if arrow.types.is_timestamp(column.type):
        return np.asarray(compute.cast(column, arrow.timestamp("ms", column.type.tz), safe=False).cast("int64")) / 1000.0
    if not arrow.types.is_floating(column.type):
        raise DataError(f"event_time must be float64 seconds since 1970 or a timestamp, not {column.type}")
    return np.round(np.asarray(column.cast("float64")) * 1000) / 1000


def _codes(column: Any, known: list[str]) -> tuple[NDArray[np.int64], list[str]]:
    """Positions in the known ids, behind which the new ones are put."""
    encoded = column.cast("string").combine_chunks().dictionary_encode()
    place = {id: number for number, id in enumerate(known)}
    names = encoded.dictionary.to_pylist()
    for name in names:
        if name not in place:
            place[name] = len(place)
            known.append(name)
    return np.array([place[name] for name in names], np.int64)[np.asarray(encoded.indices)], known


def _longer(columns: Any, size: int) -> dict[str, NDArray[np.object_]]:
    """Feature columns with None for the ids behind those they were made for."""
    return {name: np.append(column, np.full(size - len(column), None, dtype=object)) for name, column in columns.items()}
