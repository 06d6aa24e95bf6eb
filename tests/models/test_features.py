"""Fields: fitting, the fused id space, and encoding whatever a producer may send."""

from __future__ import annotations

import json
import math
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossrep.errors import ModelError
from models.datasets.base import Dataset, Impressions
from models.features import BINS, Features, Field, category, fit, fit_number

HOSTILE = [None, math.nan, math.inf, -math.inf, "", "nonsense", "\ud800", b"x", [1], {"a": 1}, object(), 10**400, 1j, np.float32("nan")]


def column(*values: object) -> np.ndarray:
    out = np.empty(len(values), dtype=object)
    out[:] = values
    return out


def impressions(user: list[int], item: list[int], scenario: list[int]) -> Impressions:
    n = len(user)
    return Impressions(
        user=np.array(user, dtype=np.int32),
        item=np.array(item, dtype=np.int32),
        event_time=np.arange(n, dtype=np.float64) * 3600,
        scenario=np.array(scenario, dtype=np.int16),
        ad=np.arange(n) % 2 == 1,
        clicked=np.zeros(n, dtype=bool),
        labels=np.zeros((n, 0), dtype=bool),
    )


@pytest.fixture
def train() -> Impressions:
    # u0 three times, u1 twice, u2 once, u3 never; i0 five times, i1 once; scenario s1 once
    return impressions([0, 0, 0, 1, 1, 2], [0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 1])


@pytest.fixture
def dataset(train: Impressions) -> Dataset:
    return Dataset(
        name="tiny",
        user_ids=["u0", "u1", "u2", "u3"],
        item_ids=["i0", "i1"],
        scenarios=["s0", "s1"],
        user_features={
            "city": column("a", "b", "b", "never"),
            "age": column(20.0, 30, None, 99.0),
            "same": column("x", "x", "x", "y"),
        },
        item_features={"code": column(1.0, 2.0)},
        impressions=lambda: iter([train]),
        size=6,
        train_until=1e9,
        test_from=1e9,
    )


def test_fit_learns_from_training_impressions_only(dataset: Dataset, train: Impressions) -> None:
    features = fit(dataset, train)
    # "same" is the same for every user of the training impressions; u2 was seen once, u3 and its city never
    assert features.names == {
        "user": ("user_id", "city", "age"),
        "item": ("item_id", "code"),
        "event": ("scenario", "branch", "event_time"),
    }
    assert features.fields["user"][0].values == ("u0", "u1")
    assert features.fields["user"][1].values == ("a", "b")
    assert features.fields["user"][2].edges == (25.0,)
    assert features.fields["event"][0].values == ("s0",)


def test_rows_of_all_fields_are_disjoint_and_fill_the_table(dataset: Dataset, train: Impressions) -> None:
    features = fit(dataset, train)
    at = 0
    for kind in ("user", "item", "event"):
        for field, offset in zip(features.fields[kind], features.offsets[kind], strict=True):
            assert offset == at
            at += field.size
    assert features.rows == at


def test_rows_columns_and_single_rows_agree(dataset: Dataset, train: Impressions) -> None:
    features = fit(dataset, train)
    names = list(dataset.user_features)
    rows = [dict(zip(names, values, strict=True)) for values in zip(*dataset.user_features.values(), strict=True)]
    whole = features.encode("user", dataset.user_ids, rows)
    assert whole.dtype == np.int32
    assert np.array_equal(whole, features.encode_columns("user", dataset.user_ids, dataset.user_features))
    for i, (key, row) in enumerate(zip(dataset.user_ids, rows, strict=True)):
        assert np.array_equal(features.encode("user", [key], [row])[0], whole[i])
    unknown = features.offsets["user"]
    assert whole[2, 0] == unknown[0]  # seen once
    assert whole[2, 2] == unknown[2]  # None
    assert list(whole[3, :2]) == list(unknown[:2])  # never seen
    with pytest.raises(ValueError, match="2 ids but 1 rows"):
        features.encode("user", ["a", "b"], [{}])


def test_missing_columns_and_hostile_values_are_unknown(dataset: Dataset, train: Impressions) -> None:
    features = fit(dataset, train)
    unknown = features.offsets["user"]
    rows: list[dict[str, object]] = [{}, *({"city": value, "age": value} for value in HOSTILE)]
    encoded = features.encode("user", ["?"] * len(rows), rows)
    assert (encoded == unknown).all()
    assert (features.encode_columns("user", ["?"], {}) == unknown).all()
    assert features.encode("user", [], []).shape == (0, 3)


@given(st.lists(st.one_of(st.none(), st.text(), st.integers(), st.floats(), st.booleans(), st.binary(), st.lists(st.integers()))))
def test_any_value_encodes_to_a_row_of_its_field(values: list[object]) -> None:
    for field in (Field("c", "category", values=("1", "a")), Field("n", "number", edges=(0.0, 1.0)), Field("h", "hour")):
        assert all(0 <= row < field.size for row in field.encode(values))


def test_one_category_however_it_is_written() -> None:
    assert {category(value) for value in (1, 1.0, True, np.int64(1), np.float32(1), "1")} == {"1"}
    assert category(2**60 + 1) == str(2**60 + 1)
    assert category(0.5) == "0.5"


def test_numbers_get_bins_of_equal_population_or_one_bin_each() -> None:
    field = fit_number("n", list(np.random.default_rng(0).exponential(size=10_000)))
    counts = np.bincount(field.encode(np.random.default_rng(0).exponential(size=10_000).tolist()), minlength=field.size)
    assert field.size == BINS + 1
    assert counts[0] == 0
    assert counts[1:].min() > 250
    assert fit_number("n", [1, 1, 1, 5, 5, 9, None]).encode([1, 5, 9, 2.9, -100, 100]) == [1, 2, 3, 1, 1, 3]
    assert fit_number("n", []).encode([1.0]) == [1]


def test_events(dataset: Dataset, train: Impressions) -> None:
    features = fit(dataset, train)
    times = np.array([0.0, 3600.0 * 25.5, -1.0, math.nan, math.inf, 1e300])
    events = features.encode_events(["s0", "s0", "s1", "", "s0", "s0"], ["content", "ad", "ad", "AD", "", "ad"], times)
    rows = events - features.offsets["event"]
    assert rows.dtype == np.int32
    assert rows[:, 0].tolist() == [1, 1, 0, 0, 1, 1]
    assert rows[:, 1].tolist() == [1, 2, 2, 0, 0, 2]
    assert rows[:5, 2].tolist() == [1, 2, 24, 0, 0]
    assert 0 < rows[5, 2] <= 24
    same = features.encode_events(
        [dataset.scenarios[s] for s in train.scenario], ["ad" if ad else "content" for ad in train.ad], train.event_time
    )
    assert np.array_equal(features.encode_impressions(train, dataset.scenarios), same)


def test_json_round_trip(dataset: Dataset, train: Impressions) -> None:
    features = fit(dataset, train)
    again = Features.from_json(json.loads(json.dumps(features.to_json())))
    assert again.fields == features.fields
    assert again.rows == features.rows
    wrongs: list[dict[str, object]] = [{}, {"user": [{}], "item": [], "event": []}, {"user": [], "item": [], "event": []}, {"user": 1}]
    for wrong in wrongs:
        with pytest.raises(ModelError, match="vocabulary"):
            Features.from_json(wrong)


def test_bulk_encoding_is_quick() -> None:
    fields = [Field(f"c{i}", "category", values=tuple(map(str, range(1000)))) for i in range(20)]
    fields += [Field(f"n{i}", "number", edges=tuple(map(float, range(31)))) for i in range(10)]
    features = Features({"user": fields, "item": [], "event": []})
    rows = [{f.name: str(i % 2000) if f.type == "category" else i % 40 for f in fields} for i in range(2_500)]
    began = time.perf_counter()
    features.encode("user", [""] * len(rows), rows)
    assert time.perf_counter() - began < 0.5  # a tenth of 25,000 users x 30 fields, which must take less than 1 s; it takes about .15
