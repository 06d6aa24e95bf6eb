"""Samples in Parquet in the place of a data set's own impressions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crossrep.errors import DataError
from models.datasets import samples
from models.datasets.base import Dataset, joined, select
from models.datasets.simulator import simulate


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return simulate(events=3_000, users=100, items=50, seed=1)


def rows(dataset: Dataset) -> dict[str, list[Any]]:
    whole = joined(list(dataset.impressions()))
    return {
        "sample_id": [f"0-{i}" for i in range(len(whole))],
        "user_id": [dataset.user_ids[i] for i in whole.user.tolist()],
        "item_id": [dataset.item_ids[i] for i in whole.item.tolist()],
        "event_time": whole.event_time.tolist(),
        "scenario": [dataset.scenarios[i] for i in whole.scenario.tolist()],
        "branch": ["ad" if ad else "content" for ad in whole.ad.tolist()],
        "label": whole.clicked.astype(int).tolist(),
    }


@pytest.mark.parametrize("times", ["seconds", "timestamps"])
def test_they_are_the_impressions_they_were_made_of(dataset: Dataset, tmp_path: Path, times: str) -> None:
    given = rows(dataset)
    if times == "timestamps":
        given["event_time"] = pa.array(np.round(np.array(given["event_time"]) * 1e6).astype(np.int64)).cast(pa.timestamp("us", "UTC"))
    else:
        given["event_time"] = pa.array(given["event_time"])
    table = pa.table(given).append_column("user_cr", pa.array([[1.0]] * dataset.size))
    shuffled = table.take(np.random.default_rng(0).permutation(len(table)))
    (tmp_path / "day=1").mkdir()
    pq.write_table(shuffled.slice(0, 1000), tmp_path / "day=1" / "a.parquet")
    pq.write_table(shuffled.slice(1000), tmp_path / "b.parquet")
    found = samples.over(dataset, str(tmp_path))
    one, other = (joined(list(each.impressions())) for each in (found, dataset))
    assert found.size == dataset.size == 3_000 and (np.diff(one.event_time) >= 0).all()
    assert found.user_ids == list(dataset.user_ids) and found.user_features.keys() == dataset.user_features.keys()
    # Impressions of one moment may come in another order.
    a, b = (select(each, np.lexsort((each.item, each.user, each.event_time))) for each in (one, other))
    for name in vars(a):
        assert np.array_equal(getattr(a, name), getattr(b, name)) and getattr(a, name).dtype == getattr(b, name).dtype, name


def test_late_labels_and_ids_that_nobody_knows(dataset: Dataset, tmp_path: Path) -> None:
    given = {name: values[:4] for name, values in rows(dataset).items()}
    given["user_id"][0], given["item_id"][1], given["scenario"][2] = "new user", "new item", "new scenario"
    given["label"] = [0, 0, 0, 1]
    given = {name: [*values, values[2]] for name, values in given.items()}
    given["label"][-1] = 1  # the click of the third came late
    pq.write_table(pa.table(given), tmp_path / "some.parquet")
    found = samples.over(dataset, str(tmp_path / "some.parquet"))
    (run,) = found.impressions()
    assert run.clicked.tolist() == [False, False, True, True]
    assert [found.user_ids[run.user[0]], found.item_ids[run.item[1]], found.scenarios[run.scenario[2]]] == [
        "new user",
        "new item",
        "new scenario",
    ]
    for ids, features in ((found.user_ids, found.user_features), (found.item_ids, found.item_features)):
        assert all(len(column) == len(ids) and column[-1] is None for column in features.values())


def test_what_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    given = {name: values[:4] for name, values in rows(dataset).items()}
    wrong: list[tuple[dict[str, list[Any]], str]] = [
        ({name: values for name, values in given.items() if name != "label"}, "missing columns label; found sample_id"),
        ({**given, "event_time": [1, 2, 3, 4]}, "event_time must be float64 seconds since 1970 or a timestamp, not int64"),
        ({**given, "user_id": ["a", None, "b", "c"]}, "columns user_id have empty fields"),
        ({name: values[:0] for name, values in given.items()}, "holds no samples"),
    ]
    for columns, said in wrong:
        pq.write_table(pa.table(columns), tmp_path / "some.parquet")
        with pytest.raises(DataError, match=said):
            samples.over(dataset, str(tmp_path / "some.parquet"))
    with pytest.raises(DataError, match="samples cannot be read from"):
        samples.over(dataset, str(tmp_path / "nowhere"))
