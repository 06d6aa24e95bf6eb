"""The data sets: what the simulator promises, and what the KuaiRand reader makes of a folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from models.datasets import simulator
from models.datasets.base import Dataset, Impressions
from models.datasets.kuairand import ITEM_CATEGORIES, ITEM_NUMBERS, TEST_FROM, TRAIN_UNTIL, USER_CATEGORIES, USER_NUMBERS, load
from models.datasets.simulator import SLICE, simulate

DTYPES = {"user": "i4", "item": "i4", "event_time": "f8", "scenario": "i2", "ad": "?", "clicked": "?", "labels": "?"}


def whole(runs: Iterator[Impressions]) -> dict[str, NDArray[Any]]:
    parts = list(runs)
    return {name: np.concatenate([getattr(part, name) for part in parts]) for name in DTYPES}


def check_contract(data: Dataset) -> dict[str, NDArray[Any]]:
    for run in data.impressions():
        assert 0 < len(run) <= SLICE
        for name, dtype in DTYPES.items():
            assert getattr(run, name).dtype == np.dtype(dtype)
            assert len(getattr(run, name)) == len(run)
    seen = whole(data.impressions())
    assert len(seen["user"]) == data.size and seen["labels"].shape == (data.size, len(data.labels))
    assert (np.diff(seen["event_time"]) >= 0).all()
    assert np.array_equal(np.round(seen["event_time"] * 1000) / 1000, seen["event_time"])
    for column, ids in (("user", data.user_ids), ("item", data.item_ids), ("scenario", data.scenarios)):
        assert seen[column].min() >= 0 and seen[column].max() < len(ids)
        assert len(set(ids)) == len(ids)
    for ids, features in ((data.user_ids, data.user_features), (data.item_ids, data.item_features)):
        for values in features.values():
            assert values.dtype == object and len(values) == len(ids)
            assert all(value is None or type(value) in (str, int, float) for value in values)
    return seen


def auc(score: NDArray[Any], clicked: NDArray[np.bool_]) -> float:
    _, rank, counts = np.unique(score, return_inverse=True, return_counts=True)
    mean_rank = (np.cumsum(counts) - (counts - 1) / 2)[rank]
    positives = int(clicked.sum())
    return float((mean_rank[clicked].sum() - positives * (positives + 1) / 2) / (positives * (len(clicked) - positives)))


@pytest.fixture(scope="module")
def data() -> Dataset:
    return simulate(events=300_000, users=3_000, items=2_000, seed=5)


def test_simulator_keeps_the_contract_and_its_shares(data: Dataset) -> None:
    seen = check_contract(data)
    start, end = 1704067200.0, 1704067200.0 + 14 * 86400
    assert start <= seen["event_time"][0] < start + 3600 and end - 3600 < seen["event_time"][-1] < end
    assert data.train_until == pytest.approx(start + 0.6 * 14 * 86400) and data.test_from == pytest.approx(start + 0.8 * 14 * 86400)
    assert np.array_equal(seen["ad"], (data.item_features["type"] == "AD")[seen["item"]])
    assert seen["ad"].mean() == pytest.approx(0.1, abs=0.005)
    assert np.bincount(seen["scenario"]) / data.size == pytest.approx(np.array(simulator.SCENARIO_SHARE), abs=0.02)


@pytest.mark.parametrize("seed", range(8))
def test_simulated_click_rate(seed: int) -> None:
    assert 0.3 < whole(simulate(events=65_536, users=2_000, items=5_000, seed=seed).impressions())["clicked"].mean() < 0.45


def test_simulated_popularity_and_activity_are_skewed(data: Dataset) -> None:
    seen = whole(data.impressions())
    for column, size, least in (("item", 2_000, 0.35), ("user", 3_000, 0.04)):
        counts = np.sort(np.bincount(seen[column], minlength=size))[::-1]
        assert counts[: size // 100].sum() > least * data.size


def test_simulated_popularity_is_zipf() -> None:
    seen = whole(simulate(events=400_000, users=100, items=1_000, ad_share=0.0, seed=1).impressions())
    late = seen["item"][seen["event_time"] > seen["event_time"][-1] - 86400 * 7]
    counts = np.sort(np.bincount(late))[::-1][:100].astype(float)
    slope = np.polyfit(np.log(np.arange(5, 101)), np.log(counts[4:]), 1)[0]
    assert -1.4 < slope < -0.85  # of the items shown, some ranks have not appeared yet


def test_simulated_items_appear_over_time(data: Dataset) -> None:
    seen = whole(data.impressions())
    share = (seen["event_time"] - 1704067200.0) / (14 * 86400)
    assert (seen["item"] <= 1_000 + share * 1_000).all()
    assert (seen["item"] >= 1_500).any()


def test_simulated_sessions_and_hours(data: Dataset) -> None:
    seen = whole(data.impressions())
    order = np.lexsort((seen["event_time"], seen["user"]))
    user, time = seen["user"][order], seen["event_time"][order]
    gap = np.diff(time)[user[1:] == user[:-1]]
    assert (gap < 60).mean() == pytest.approx(1 - 1 / 8, abs=0.02)
    hour = (seen["event_time"] // 3600 % 24).astype(int)
    by_hour = np.bincount(hour, minlength=24) / data.size * 24
    assert by_hour[19:21].mean() == pytest.approx(1.6, abs=0.08) and by_hour[7:9].mean() == pytest.approx(0.4, abs=0.08)


def test_simulated_rate_is_even_at_slice_borders() -> None:
    data = simulate(events=8 * SLICE, users=1_000, items=1_000, days=1 / 12)  # slices of about 15 minutes, sessions of 42 s
    runs = list(data.impressions())
    borders = np.array([run.event_time[0] for run in runs[1:]])
    time = np.concatenate([run.event_time for run in runs])
    near, wide = (sum(np.searchsorted(time, borders + s) - np.searchsorted(time, borders - s)) / s for s in (20, 400))
    assert near == pytest.approx(wide, rel=0.1)  # by chance alone about 3 %


def test_simulator_repeats_itself_bit_for_bit(data: Dataset) -> None:
    first = whole(data.impressions())
    half_read = data.impressions()
    next(half_read)
    again = whole(data.impressions())  # while another reader is midway
    same = simulate(events=300_000, users=3_000, items=2_000, seed=5)
    twin = whole(same.impressions())
    other = whole(simulate(events=300_000, users=3_000, items=2_000, seed=6).impressions())
    for name in DTYPES:
        assert first[name].tobytes() == again[name].tobytes() == twin[name].tobytes()
        assert first[name].tobytes() != other[name].tobytes() or not first[name].size
    assert np.array_equal(next(half_read).user, first["user"][SLICE : 2 * SLICE])
    for name, values in data.user_features.items():
        assert np.array_equal(values, same.user_features[name])


def test_simulated_clicks_follow_probabilities_that_features_and_drift_explain(data: Dataset) -> None:
    world = data.impressions.args[0]  # type: ignore[attr-defined]
    truth = np.concatenate([simulator.draw(world, number)[1] for number in range(5)])
    seen = whole(data.impressions())
    train, test = seen["event_time"] < data.train_until, seen["event_time"] >= data.test_from
    for part in (truth < 0.2, (truth > 0.3) & (truth < 0.5), truth > 0.7):
        assert seen["clicked"][part].mean() == pytest.approx(truth[part].mean(), abs=0.01)

    segment = np.unique(data.user_features["segment"].astype(str), return_inverse=True)[1][seen["user"]]
    category = np.unique(data.item_features["category"].astype(str), return_inverse=True)[1][seen["item"]]
    cross = segment * simulator.TOPICS + category

    def rates(codes: NDArray[np.intp], rows: NDArray[np.bool_]) -> NDArray[np.float64]:
        return np.bincount(codes[rows], seen["clicked"][rows], codes.max() + 1) / np.maximum(1, np.bincount(codes[rows]))

    crossed, item_only = rates(cross, train)[cross], rates(category, train)[category]
    clicked = seen["clicked"]
    assert auc(item_only[test], clicked[test]) + 0.03 < auc(crossed[test], clicked[test]) < auc(truth[test], clicked[test]) - 0.05
    # Interests drift: what the segment tells at the start is worth less at the end.
    begin = seen["event_time"] < seen["event_time"][0] + 2 * 86400
    assert auc(crossed[begin], clicked[begin]) > auc(crossed[test], clicked[test]) + 0.02


@settings(max_examples=40, deadline=None)
@given(
    events=st.integers(1, 300),
    users=st.integers(1, 5),
    items=st.integers(1, 5),
    days=st.sampled_from([1 / 86_400_000, 1e-6, 0.3, 14.0, 400.0]),
    ad_share=st.sampled_from([0.0, 0.5, 1.0]),
    start=st.sampled_from([0.0, -86_400.5, 1704067200.123, 4e9]),
)
def test_tiny_simulations(events: int, users: int, items: int, days: float, ad_share: float, start: float) -> None:
    data = simulate(events=events, users=users, items=items, days=days, ad_share=ad_share, start=start)
    seen = check_contract(data)
    assert seen["event_time"][0] >= start - 0.001 and seen["event_time"][-1] < start + days * 86400 + 0.001
    assert len(data.user_ids) == users and len(data.item_ids) == items
    if items > 1 and ad_share != 0.5:
        assert (seen["ad"] == (ad_share == 1.0)).all()


def test_more_events_than_milliseconds() -> None:
    check_contract(simulate(events=3 * SLICE + 1, users=10, items=10, days=1 / 86_400_000))


def test_an_endless_simulation_starts_at_once() -> None:
    data = simulate(events=10**12, users=10, items=10, start=datetime(2024, 5, 1, tzinfo=UTC))
    runs = data.impressions()
    first, second = next(runs), next(runs)
    assert len(first) == len(second) == SLICE and first.event_time[-1] <= second.event_time[0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("events", 0),
        ("events", 1.5),
        ("users", 0),
        ("users", 2**31),
        ("items", -1),
        ("seed", -1),
        ("days", 0.0),
        ("days", float("nan")),
        ("drift_days", 0.0),
        ("zipf", -0.1),
        ("ad_share", 1.1),
        ("start", datetime(2024, 1, 1)),
        ("start", float("inf")),
    ],
)
def test_simulator_names_a_bad_argument(name: str, value: Any) -> None:
    arguments: dict[str, Any] = {"events": 10, "users": 10, "items": 10, name: value}
    with pytest.raises(ValueError, match=f"^{name} must .*not "):
        simulate(**arguments)


MONDAY = 1_650_816_000_000  # 2022-04-25 00:00 +08:00, in ms
LOG = {  # out of order; rows 1 and 2 are the same event, and rows 0 and 4 are simultaneous
    "user_id": [10, 2, 2, 7, 9],
    "video_id": [3, 1, 1, 5, 3],
    "time_ms": [MONDAY + 9_001, MONDAY + 500, MONDAY + 500, MONDAY, MONDAY + 9_001],
    "is_click": [1, 0, 0, 1, 0],
    "is_like": [0, 0, 0, 1, 0],
    "tab": [1, 10, 10, 4, 1],
}


def csv(columns: dict[str, list[Any]]) -> str:
    return "".join(",".join(str(value) for value in row) + "\n" for row in [tuple(columns), *zip(*columns.values(), strict=True)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table(LOG), tmp_path / "log_standard_4_25_to_5_08_pure.parquet")
    users: dict[str, list[Any]] = {"user_id": [10, 2, 300]}
    users |= {name: [12, "", 0] for name in USER_NUMBERS} | {name: ["x", "UNKNOWN", ""] for name in USER_CATEGORIES}
    users |= {"fans_user_num_range": ['"[100,1k)"', "0", "0"], "onehot_feat4": ["1.0", "", "4.0"]}
    videos: dict[str, list[Any]] = {"video_id": [3, 1, 4]}
    videos |= {name: ["720.0", "", "9.5"] for name in ITEM_NUMBERS} | {name: ["7", "8", ""] for name in ITEM_CATEGORIES}
    videos |= {"video_type": ["AD", "NORMAL", "UNKNOWN"], "tag": ['"20,43"', "39", ""]}
    (tmp_path / "user_features_pure.csv").write_text(csv(users))
    (tmp_path / "video_features_basic_pure.csv").write_text(csv(videos))
    return tmp_path


def test_kuairand_reads_a_folder(folder: Path) -> None:
    data = load(folder)
    seen = check_contract(data)
    assert list(data.user_ids) == ["2", "7", "9", "10", "300"]
    assert list(data.item_ids) == ["1", "3", "4", "5"]
    assert list(data.scenarios) == ["1", "4", "10"]
    assert [data.user_ids[i] for i in seen["user"]] == ["7", "2", "2", "10", "9"]
    assert [data.item_ids[i] for i in seen["item"]] == ["5", "1", "1", "3", "3"]
    assert [data.scenarios[i] for i in seen["scenario"]] == ["4", "10", "10", "1", "1"]
    assert seen["event_time"].tolist() == [MONDAY / 1000, MONDAY / 1000 + 0.5, MONDAY / 1000 + 0.5, *[(MONDAY + 9_001) / 1000] * 2]
    assert seen["ad"].tolist() == [False, False, False, True, True]
    assert seen["clicked"].tolist() == [True, False, False, True, False]
    assert data.labels == ("is_like",) and seen["labels"].tolist() == [[True], [False], [False], [False], [False]]
    assert data.user_features["follow_user_num"].tolist() == [None, None, None, 12.0, 0.0]
    assert data.user_features["fans_user_num_range"].tolist() == ["0", None, None, "[100,1k)", "0"]
    assert data.user_features["onehot_feat4"].tolist() == [None, None, None, "1.0", "4.0"]
    assert data.user_features["user_active_degree"].tolist() == ["UNKNOWN", None, None, "x", None]
    assert data.item_features["video_duration"].tolist() == [None, 720.0, 9.5, None]
    assert data.item_features["tag"].tolist() == ["39", "20,43", None, None]
    assert set(data.item_features) == {*ITEM_NUMBERS, *ITEM_CATEGORIES}
    assert set(data.user_features) == {*USER_NUMBERS, *USER_CATEGORIES}


def test_kuairand_reads_the_published_csv_logs_end_to_end(folder: Path) -> None:
    expected = whole(load(folder).impressions())
    (folder / "log_standard_4_25_to_5_08_pure.parquet").unlink()
    (folder / "log_standard_1_pure.csv").write_text(csv({name: values[:2] for name, values in LOG.items()}))
    (folder / "log_standard_2_pure.csv").write_text(csv({name: values[2:] for name, values in LOG.items()}))
    found = whole(load(folder).impressions())
    for name in DTYPES:
        assert np.array_equal(found[name], expected[name])
    # A label that one file lacks is none of the data set's.
    (folder / "log_standard_2_pure.csv").write_text(csv({name: values[2:] for name, values in LOG.items() if name != "is_like"}))
    assert load(folder).labels == () and whole(load(folder).impressions())["labels"].shape == (5, 0)


def test_kuairand_says_what_is_missing(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere.*does not exist.*kuairand\.com"):
        load(folder / "nowhere")
    users = folder / "user_features_pure.csv"
    text = users.read_text()
    users.write_text(text.replace("register_days,", "days,", 1))
    with pytest.raises(ValueError, match=r"user_features_pure\.csv: missing columns register_days; found user_id, "):
        load(folder)
    users.write_text(text + text.splitlines()[1] + "\n")
    with pytest.raises(ValueError, match="a user_id occurs more than once"):
        load(folder)
    users.write_text(text.replace("\n10,12", "\n10,many", 1))
    with pytest.raises(ValueError, match=r"user_features_pure\.csv: .*many"):
        load(folder)
    users.unlink()
    with pytest.raises(FileNotFoundError, match=r"no user_features_pure\.csv .*kuairand\.com"):
        load(folder)
    (folder / "log_standard_4_25_to_5_08_pure.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"no log_standard_\*_pure\.parquet .*kuairand\.com"):
        load(folder)


@pytest.mark.parametrize(("column", "values", "message"), [("tab", [1, 1, None, 1, 1], "1 empty"), ("time_ms", ["now"] * 5, "integers")])
def test_kuairand_says_which_log_column_is_bad(folder: Path, column: str, values: list[Any], message: str) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table(LOG | {column: values}), folder / "log_standard_4_25_to_5_08_pure.parquet")
    with pytest.raises(ValueError, match=f"column {column} .*{message}"):
        load(folder)
    parquet.write_table(arrow.table(LOG).drop([column]), folder / "log_standard_4_25_to_5_08_pure.parquet")
    with pytest.raises(ValueError, match=f"missing columns {column};"):
        load(folder)


def test_kuairand_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.csv", None)
    with pytest.raises(ImportError, match=r"crossrep\[data\]"):
        load(tmp_path)


def test_kuairand_real_data() -> None:
    named = os.environ.get("CROSSREP_KUAIRAND")
    real = Path(named) if named else Path(__file__).parents[3] / "shared" / "data" / "kuairand_pure_apr25_may08"
    if not named and not real.is_dir():
        pytest.skip("no KuaiRand-Pure here: set CROSSREP_KUAIRAND to its folder")
    data = load(real)
    runs = list(data.impressions())
    assert max(map(len, runs)) <= 65_536
    seen = whole(iter(runs))
    assert data.size == len(seen["user"]) == 228_329
    assert (np.diff(seen["event_time"]) >= 0).all()
    assert len(np.unique(seen["user"])) == 25_156 and len(np.unique(seen["item"])) == 6_361
    assert len(data.user_ids) == 27_285 and len(data.item_ids) == 7_583
    assert list(data.scenarios) == [str(tab) for tab in range(15)]
    assert round(seen["clicked"].mean(), 4) == 0.4419
    assert dict(zip(data.labels, seen["labels"].mean(0).round(4).tolist()))["long_view"] == 0.3108 and len(data.labels) == 7
    assert seen["ad"].sum() == 2_400
    # China's midnights: May 3rd and 6th, as the log's own `date` column has them but for 179 and 116 rows.
    assert (seen["event_time"] < TRAIN_UNTIL).sum() == 135_307
    assert (seen["event_time"] >= TEST_FROM).sum() == 43_152
    assert datetime.fromisoformat("2022-05-03T00:00+08:00").timestamp() == TRAIN_UNTIL == data.train_until
    assert datetime.fromisoformat("2022-05-06T00:00+08:00").timestamp() == TEST_FROM == data.test_from
