"""The study of upstreams: metrics by hand, no click among its own features, and a command that goes on where it was cut off."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import study.cli  # noqa: F401 (the commands)
from crossrep.cli import cli
from crossrep.errors import DataError
from models import rates
from models.datasets import kuairand
from models.train import L2, RATE, train
from study import boosted_trees, upstreams
from study.metrics import gauc
from study.upstreams import LOGISTIC, RATED, SETTINGS, TOWER, TREES, TUNING, Days, best
from tests.cluster import ROOT


@pytest.fixture(scope="module")
def days(kuairand_folder: Path) -> Days:
    return Days.of(kuairand.load(kuairand_folder))


@pytest.fixture(scope="module")
def rated(kuairand_folder: Path) -> Days:
    return Days.of(kuairand.load(kuairand_folder), rates=True)


def test_gauc_by_hand() -> None:
    score = np.array([0.9, 0.1, 0.5, 0.5, 0.3, 0.2, 0.8])
    clicked = np.array([True, False, True, False, False, True, True])
    user = np.array([3, 3, 7, 7, 7, 7, 9])
    # User 3 orders its two rightly, 1; of user 7's four pairs one is right and one is tied, 1.5 / 4; user 9 has only a click.
    assert gauc(score, clicked, user) == pytest.approx((2 * 1 + 4 * 0.375) / 6)
    assert math.isnan(gauc(score[6:], clicked[6:], user[6:]))


def test_no_click_is_in_its_own_features(days: Days) -> None:
    rows, clicked = days.train.rows, days.train.clicked
    block = np.arange(len(rows)) * rates.BLOCKS // len(rows)
    before, _ = boosted_trees.encoded(days.fields, rows, clicked, [days.test.rows])
    flipped = np.where(block == 4, ~clicked, clicked)
    after, test = boosted_trees.encoded(days.fields, rows, flipped, [days.test.rows])
    told = [place for place in range(before.shape[1]) if (before[:, place] != after[:, place]).any()]
    others = block != 4
    # The rates' prior is the mean of all clicks; beside it, nothing of its own block's clicks is told, and that of others is.
    shift = rates.SMOOTHING * (flipped.mean() - clicked.mean())
    assert len(told) > 10 and np.abs(before[~others] - after[~others])[:, told].max() <= abs(shift)
    assert np.abs(before[others] - after[others])[:, told].max() > 5 * abs(shift) / rates.SMOOTHING
    assert len(test) == len(days.test.rows)


@pytest.mark.parametrize("model", [TOWER, RATED])
def test_the_study_trains_the_tower_as_the_command_does(
    days: Days, rated: Days, kuairand_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    monkeypatch.setattr(upstreams, "L2", L2)
    upstreams.start(days, rated)
    asked = {"model": model, "setting": {"rate": RATE}, "seed": 3, "length": 1}
    found = upstreams.run(asked)
    told = train(kuairand.load(kuairand_folder), tmp_path, seed=3, rates=model == RATED, baseline=False, progress=False)
    assert found["test"]["auc"] == pytest.approx(told["auc"], abs=1e-5)
    assert found["test"]["logloss"] == pytest.approx(told["logloss"], abs=1e-5)
    assert upstreams.run(asked) | {"seconds": 0} == found | {"seconds": 0}


def test_trees_learn_and_repeat(days: Days, rated: Days) -> None:
    pytest.importorskip("lightgbm")
    upstreams.start(days, rated)
    asked = {"model": TREES, "setting": {"num_leaves": 7}, "seed": 3, "length": 20}
    found = upstreams.run(asked)
    assert found["test"]["auc"] > 0.65 and found["reached"] == 20
    assert upstreams.run(asked) | {"seconds": 0} == found | {"seconds": 0}


def test_every_model_has_as_many_trials() -> None:
    assert {len(settings) for settings in SETTINGS.values()} == {3}


def test_the_best_setting_is_that_of_the_best_mean() -> None:
    aucs = {1e-3: (0.70, 0.74, 0.71), 2e-3: (0.72, 0.72, 0.72)}
    tuned = [
        {"model": TREES, "setting": {"rate": rate}, "validation": {"auc": auc}, "reached": at * 10}
        for rate, found in aucs.items()
        for at, auc in enumerate(found, 1)
    ]
    others = [{"model": LOGISTIC, "setting": {"rate": 5e-3}, "validation": {"auc": 0.9}, "reached": 1}]
    assert best(tuned + others, TREES) == {"setting": {"rate": 2e-3}, "length": 20}


def test_the_command_goes_on_where_it_was_cut_off(kuairand_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lightgbm")
    few = {model: SETTINGS[model][:1] for model in (LOGISTIC, TREES, TOWER, RATED)}
    monkeypatch.setattr(upstreams, "SETTINGS", few)
    monkeypatch.setattr(upstreams, "TUNING", TUNING[:2])
    shown = re.search(r"^    crossrep (study upstreams DIR --out \S+)$", (ROOT / "docs" / "study-upstream.md").read_text(), re.MULTILINE)
    assert shown
    words = shown[1].replace("DIR", str(kuairand_folder)).replace("docs/study", str(tmp_path)).split()
    words += ["--seeds", "2", "--workers", "1"]
    assert CliRunner().invoke(cli, words, catch_exceptions=False).exit_code == 0
    path = tmp_path / "upstreams.jsonl"
    whole = path.read_text()
    assert len(whole.splitlines()) == len(few) * (2 + 2)
    tables = (tmp_path / "upstreams.md").read_text()
    assert f"{TOWER} − {TREES}" in tables and f"{RATED} − {TREES}" in tables and "cold items" in tables
    assert (tmp_path / "upstreams.svg").read_text().startswith("<?xml")
    path.write_text(whole[: whole[:-1].rfind("\n") - 30])  # without the last, and killed while it wrote the one before
    assert CliRunner().invoke(cli, words, catch_exceptions=False).exit_code == 0
    again = [json.loads(line) | {"seconds": 0} for line in path.read_text().splitlines()]
    assert json.dumps(again) == json.dumps([json.loads(line) | {"seconds": 0} for line in whole.splitlines()])


def test_days_without_clicks_are_named(kuairand_folder: Path) -> None:
    dataset = kuairand.load(kuairand_folder)
    with pytest.raises(DataError, match="has 0 impressions to tune on, 0 of them clicked"):
        Days.of(replace(dataset, test_from=dataset.train_until))
