"""Click rates of ids: no impression's own click among them, known from the id alone, kept with the model, off unless asked for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import models.cli  # noqa: F401 (the command)
from crossrep.cli import cli
from crossrep.errors import ModelError
from models import rates
from models.datasets.base import Dataset, Impressions
from models.datasets.simulator import simulate
from models.features import Features, fit
from models.lfm4ads import load
from models.rates import fit_with_rates, out_of_block, training_rows
from models.train import Samples, evaluate, train, training_impressions

WORLD = {"events": 4_000, "users": 200, "items": 40, "seed": 2}
SMALL = {"hidden": 16, "cr": 8, "ur": 4, "ir": 4}


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return simulate(**WORLD)


@pytest.fixture(scope="module")
def impressions(dataset: Dataset) -> Impressions:
    return training_impressions(dataset)


@pytest.fixture(scope="module")
def fields(dataset: Dataset, impressions: Impressions) -> Features:
    return fit_with_rates(dataset, impressions)


def test_counts_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "BLOCKS", 2)
    monkeypatch.setattr(rates, "SMOOTHING", 2.0)
    values, clicked = np.array([0, 0, 1, 0, 1, 1]), np.array([True, False, True, True, False, False])  # two blocks of three
    others, whole = out_of_block(values, clicked, 3)
    assert whole.shown.tolist() == [3, 3, 0] and whole.clicked.tolist() == [2, 1, 0]
    assert others.shown.tolist() == [1, 1, 2, 2, 1, 1] and others.clicked.tolist() == [1, 1, 0, 1, 1, 1]
    assert others.impressions.tolist() == [2, 2, 4, 4, 2, 2]  # half of training was counted
    assert others.rate(0.5).tolist() == [2 / 3, 2 / 3, 1 / 4, 2 / 4, 2 / 3, 2 / 3]


def test_no_click_is_in_its_own_features(dataset: Dataset, impressions: Impressions, fields: Features) -> None:
    before = training_rows(fields, dataset, impressions)
    assert all(before[kind].shape == (len(impressions), 2) for kind in ("user", "item"))
    changed = 0
    for at in range(0, len(impressions), 50):
        clicked = impressions.clicked.copy()
        clicked[at] ^= True
        after = training_rows(fields, dataset, replace(impressions, clicked=clicked))
        for kind in ("user", "item"):
            assert (after[kind][at] == before[kind][at]).all()
            changed += (after[kind] != before[kind]).any(1).sum()
    assert changed > 100  # those of the same id in other blocks know it


def test_an_id_is_told_by_all_of_training_and_an_unknown_one_by_none(dataset: Dataset, impressions: Impressions, fields: Features) -> None:
    shown = np.bincount(impressions.user, minlength=len(dataset.user_ids))
    clicks = np.bincount(impressions.user, impressions.clicked, len(dataset.user_ids))
    assert fields.names["user"][-2:] == ("user_id.click_rate", "user_id.impressions")
    rows = fields.encode_columns("user", dataset.user_ids, dataset.user_features) - fields.offsets["user"]
    rate, count = fields.fields["user"][-2:]
    smooth = (clicks + rates.SMOOTHING * round(float(impressions.clicked.mean()), 2)) / (shown + rates.SMOOTHING)
    assert 0 < (shown == 0).sum() < len(shown)
    assert (rows[:, -2] == np.where(shown, 1 + np.searchsorted(rate.edges, smooth, side="right"), 0)).all()
    assert (rows[:, -1] == np.where(shown, 1 + np.searchsorted(count.edges, shown, side="right"), 0)).all()
    assert len(set(rows[:, -2].tolist())) > 10 and rows[:, -2:].max(0).tolist() <= [rate.size - 1, count.size - 1]
    # A stream may know the id before its features.
    alone = fields.encode("user", [*dataset.user_ids, "never seen"], [{}] * (1 + len(dataset.user_ids))) - fields.offsets["user"]
    assert (alone[:-1, -2:] == rows[:, -2:]).all() and (alone[-1] == 0).all()


def test_batches_hold_what_other_blocks_tell(dataset: Dataset, impressions: Impressions, fields: Features) -> None:
    samples = Samples(dataset, fields, impressions)
    (users, items) = (len(fields.fields[kind]) for kind in ("user", "item"))
    rows = np.concatenate([rows.numpy() for rows, _, _ in samples.batches(1, missing=1.0)])
    for kind, end in (("user", users), ("item", users + items)):
        found, expected = (np.sort(part, axis=0) for part in (rows[:, end - 2 : end], samples.rates[kind]))
        assert (found == expected).all()
    assert (rows[:, 1 : users - 2] == fields.offsets["user"][1:-2]).all()  # lost, as asked for; what the id tells is not


def test_a_model_keeps_them_and_others_have_none(dataset: Dataset, tmp_path: Path) -> None:
    found = {}
    for name, asked in (("with", True), ("without", False)):
        found[name] = train(dataset, tmp_path / name, rates=asked, architecture=SMALL, baseline=False, progress=False)
        model = load(tmp_path / name)
        assert evaluate(model.predict, model.fields, dataset)["auc"] == found[name]["auc"]
        assert ("user_id.click_rate" in model.features["user"]) is asked
        fresh = (fit_with_rates if asked else fit)(dataset, training_impressions(dataset))
        assert model.fields.fields == fresh.fields
        assert ("numbers" in (tmp_path / name / "vocabulary.json").read_text()) is asked
    assert found["with"]["auc"] != found["without"]["auc"]
    broken = json.loads((tmp_path / "with" / "vocabulary.json").read_text())
    broken["user"][-1]["numbers"].pop()
    with pytest.raises(ModelError, match="the vocabulary is not one"):
        Features.from_json(broken)


@pytest.mark.parametrize(("asked", "there"), [([], True), (["--rates"], True), (["--no-rates"], False)])
def test_the_command_has_them_for_training_once(tmp_path: Path, asked: list[str], there: bool) -> None:
    words = ["train", "simulated", *asked, "--users", "200", "--items", "40", "--events", "4000"]
    assert CliRunner().invoke(cli, [*words, "--out", str(tmp_path / "model")], catch_exceptions=False).exit_code == 0
    assert ("item_id.impressions" in load(tmp_path / "model").features["item"]) is there


def test_the_command_refuses_them_for_training_by_days(tmp_path: Path) -> None:
    refused = CliRunner().invoke(cli, ["train", "simulated", "--rates", "--resume", str(tmp_path / "days")])
    assert refused.exit_code == 2 and "--out, not with --resume" in " ".join(refused.output.split())
