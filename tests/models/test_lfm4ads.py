"""The triple tower: what it computes, what it survives, and that training teaches it something."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file

from crossrep.errors import DataError, ModelError
from models import lfm4ads
from models.datasets.base import Dataset
from models.datasets.simulator import simulate
from models.lfm4ads import ARCHITECTURE, LFM4Ads, agree, build, load, save
from models.train import auc, evaluate, log_loss, train, training_impressions
from models.upstream import UpstreamModel
from models.upstream import load as load_any

Encoded = tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return simulate(events=40_000, users=1_000, items=100, seed=1)


@pytest.fixture(scope="module")
def folder(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("model")
    train(dataset, out, progress=False)
    return out


@pytest.fixture(scope="module")
def model(folder: Path) -> LFM4Ads:
    return load(folder)


@pytest.fixture(scope="module")
def batch(dataset: Dataset, model: LFM4Ads) -> Encoded:
    """300 impressions of both branches, encoded the way a worker does it."""
    run = next(dataset.impressions())
    some = slice(0, 300)
    users, items = run.user[some].tolist(), run.item[some].tolist()
    assert 0 < run.ad[some].sum() < 300
    return (
        model.encode("user", [dataset.user_ids[u] for u in users], [{n: c[u] for n, c in dataset.user_features.items()} for u in users]),
        model.encode("item", [dataset.item_ids[i] for i in items], [{n: c[i] for n, c in dataset.item_features.items()} for i in items]),
        model.encode_events(
            [dataset.scenarios[s] for s in run.scenario[some]], ["ad" if ad else "content" for ad in run.ad[some]], run.event_time[some]
        ),
    )


def test_protocol(model: LFM4Ads, folder: Path, batch: Encoded) -> None:
    assert isinstance(load_any(folder), UpstreamModel)
    assert model.outputs == {"ur": 32, "ir": 32, "cr": 64}
    for kind, encoded in zip(("user", "item", "event"), batch, strict=True):
        assert encoded.shape == (300, len(model.features[kind]))
        assert encoded.dtype == np.int32
    out = model.forward(*batch)
    assert out.keys() == model.outputs.keys()
    for name, dim in model.outputs.items():
        assert out[name].shape == (300, dim)
        assert out[name].dtype == np.float32
        assert np.isfinite(out[name]).all()
        assert out[name].std(axis=0).min() > 0  # no dimension is dead


def test_the_empty_batch(model: LFM4Ads, batch: Encoded) -> None:
    out = model.forward(*(part[:0] for part in batch))
    assert {name: array.shape for name, array in out.items()} == {"ur": (0, 32), "ir": (0, 32), "cr": (0, 64)}


def test_unknown_everything_is_finite(model: LFM4Ads) -> None:
    hostile: list[Any] = [None, math.nan, math.inf, "nonsense", b"x", [1], 10**400]
    rows = [{}, *({name: value for kind in ("user", "item") for name in model.features[kind]} for value in hostile)]
    ids = ["", *("never seen" for _ in hostile)]
    n = len(rows)
    event = model.encode_events(["nowhere"] * n, ["neither"] * n, np.full(n, math.nan))
    out = model.forward(model.encode("user", ids, rows), model.encode("item", ids, rows), event)
    for array in out.values():
        assert np.isfinite(array).all()
        assert (array == array[0]).all()  # all of it is equally unknown


def test_cr_is_the_penultimate_layer_of_the_ad_branch_for_both_branches(model: LFM4Ads, folder: Path, batch: Encoded) -> None:
    w = {name: array.astype(np.float64) for name, array in load_file(folder / "weights.safetensors").items()}
    embedded = w["table.weight"][np.concatenate(batch, axis=1)]
    start = embedded.reshape(len(embedded), -1)
    x = start
    for layer in range(ARCHITECTURE["cross_layers"]):
        x = start * (x @ w[f"cross.{layer}.weight"].T + w[f"cross.{layer}.bias"]) + x
    hidden = np.maximum(x @ w["ad_branch.0.weight"].T + w["ad_branch.0.bias"], 0)
    z = hidden @ w["ad_branch.2.weight"].T + w["ad_branch.2.bias"]
    cr = z / (1 + np.exp(-z))

    users, items = len(model.features["user"]), len(model.features["item"])
    towers = {"user": embedded[:, :users], "item": embedded[:, users : users + items]}
    tower = {}
    for kind, part in towers.items():
        hidden = np.maximum(part.reshape(len(part), -1) @ w[f"{kind}_tower.0.weight"].T + w[f"{kind}_tower.0.bias"], 0)
        tower[kind] = hidden @ w[f"{kind}_tower.2.weight"].T + w[f"{kind}_tower.2.bias"]

    out = model.forward(*batch)
    np.testing.assert_allclose(out["cr"], cr, atol=1e-5)
    np.testing.assert_allclose(out["ur"], tower["user"], atol=1e-5)
    np.testing.assert_allclose(out["ir"], tower["item"], atol=1e-5)

    # The ad head on that very layer, plus dot(UR, IR), is the prediction for an ad; a content sample has a head of its own.
    logit = cr @ w["ad_head.weight"][0] + w["ad_head.bias"] + (tower["user"] * tower["item"]).sum(1) / math.sqrt(32)
    is_ad = batch[2][:, 1] == model.encode_events(["", ""], ["content", "ad"], np.zeros(2))[1, 1]
    by_ad_branch = 1 / (1 + np.exp(-logit))
    predicted = model.predict(*batch)
    np.testing.assert_allclose(predicted[is_ad], by_ad_branch[is_ad], atol=1e-5)
    assert np.abs(predicted[~is_ad] - by_ad_branch[~is_ad]).max() > 1e-4


def test_output_does_not_depend_on_batch_mates(model: LFM4Ads, batch: Encoded) -> None:
    whole = model.forward(*batch)
    for part in (slice(7, 8), slice(100, 133)):
        alone = model.forward(*(array[part] for array in batch))
        for name in whole:
            np.testing.assert_allclose(alone[name], whole[name][part], rtol=1e-4, atol=1e-6)


def test_a_loaded_model_gives_the_same_bits(model: LFM4Ads, batch: Encoded, tmp_path: Path) -> None:
    torch.manual_seed(3)
    network = build(model.fields, ARCHITECTURE)
    save(tmp_path, "fresh", model.fields, network, ARCHITECTURE, {"metrics": {}})
    before, after = LFM4Ads("fresh", model.fields, network), load(tmp_path)
    assert after.name == "fresh"
    assert after.features == before.features
    for name, array in before.forward(*batch).items():
        assert np.array_equal(array, after.forward(*batch)[name])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", "vocabulary.json", "weights.safetensors"]


def test_bfloat16_is_close(model: LFM4Ads, folder: Path, batch: Encoded, dataset: Dataset) -> None:
    half = load(folder, dtype="bfloat16")
    for name, array in model.forward(*batch).items():
        other = half.forward(*batch)[name]
        assert other.dtype == np.float32
        assert np.abs(other - array).mean() < 0.02 * np.abs(array).mean()
    assert evaluate(half.predict, half.fields, dataset)["auc"] == pytest.approx(
        evaluate(model.predict, model.fields, dataset)["auc"], abs=0.002
    )
    with pytest.raises(ValueError, match="dtype must be auto, float32 or bfloat16"):
        load(folder, dtype="float16")  # type: ignore[arg-type]


def test_bfloat16_only_where_it_is_fast_and_gives_the_same_vectors(model: LFM4Ads, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def precision() -> torch.dtype:
        return load(folder, dtype="auto").network.table.weight.dtype

    monkeypatch.setattr(lfm4ads, "has_fast_bfloat16", lambda: False)
    assert precision() == torch.float32
    monkeypatch.setattr(lfm4ads, "has_fast_bfloat16", lambda: True)
    assert precision() == torch.bfloat16
    other = load(folder)
    with torch.no_grad():
        other.network.ad_branch[0].weight += 0.1 * torch.randn_like(other.network.ad_branch[0].weight)
    assert agree(model, load(folder)) and not agree(model, other)
    monkeypatch.setattr(lfm4ads, "agree", lambda exact, fast: agree(exact, other))
    assert precision() == torch.float32


@pytest.mark.parametrize("file", ["weights.safetensors", "vocabulary.json"])
def test_damaged_or_foreign_files_do_not_load(folder: Path, tmp_path: Path, file: str) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / file).write_bytes((folder / file).read_bytes() + b" ")
    with pytest.raises(ModelError, match="is not the file its manifest was written with"):
        load(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(ModelError, match="FileNotFoundError"):
        load(tmp_path)


def test_a_manifest_of_another_architecture_does_not_load(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    manifest = json.loads((folder / "manifest.json").read_text())
    for change in ({"hidden": 128}, {"ur": 16}, {"unheard_of": 1}):
        (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"architecture": manifest["architecture"] | change}))
        with pytest.raises(ModelError, match="cannot be read"):
            load(tmp_path)


def test_weights_that_are_not_finite_do_not_load(model: LFM4Ads, tmp_path: Path) -> None:
    network = build(model.fields, ARCHITECTURE)
    with torch.no_grad():
        network.table.weight[0, 0] = math.nan
    save(tmp_path, "broken", model.fields, network, ARCHITECTURE, {})
    with pytest.raises(ModelError, match="not finite"):
        load(tmp_path)


def test_training_beats_chance_and_says_what_it_did(model: LFM4Ads, folder: Path, dataset: Dataset) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    metrics = manifest["metrics"]
    assert metrics["auc"] > 0.58
    assert metrics["logistic_auc"] > 0.6
    assert metrics["logloss"] < 0.7
    again = evaluate(model.predict, model.fields, dataset)
    assert again["impressions"] == metrics["impressions"] > 5_000
    assert again["auc"] == pytest.approx(metrics["auc"], abs=1e-4)
    assert manifest["dataset"] == dataset.name
    assert manifest["trained_from"] < manifest["trained_until"] < manifest["tested_from"]


def test_the_same_seed_gives_the_same_model(tmp_path: Path) -> None:
    tiny = simulate(events=4_000, users=200, items=40, seed=2)
    sizes = {"hidden": 16, "cr": 8, "ur": 4, "ir": 4}
    digests = []
    for run, seed in enumerate((5, 5, 6)):
        metrics = train(tiny, tmp_path / str(run), seed=seed, architecture=sizes, baseline=False, progress=False)
        assert "logistic_auc" not in metrics
        assert load(tmp_path / str(run)).outputs == {"ur": 4, "ir": 4, "cr": 8}
        digests.append(json.loads((tmp_path / str(run) / "manifest.json").read_text())["sha256"]["weights.safetensors"])
    assert digests[0] == digests[1] != digests[2]


def test_training_impressions_are_early_enough_and_have_no_repeats(dataset: Dataset) -> None:
    run = next(dataset.impressions())
    before = int((run.event_time < dataset.train_until).sum())
    doubled = Dataset(**{**vars(dataset), "impressions": lambda: iter([run, run])})
    chosen = training_impressions(doubled)
    assert chosen.event_time.max() < dataset.train_until
    assert len(chosen) <= before
    assert len({*zip(chosen.user.tolist(), chosen.item.tolist(), chosen.event_time.tolist(), strict=True)}) == len(chosen)
    with pytest.raises(DataError, match="no impressions before"):
        training_impressions(Dataset(**{**vars(dataset), "train_until": 0.0}))


def test_metrics_by_hand() -> None:
    clicked = np.array([False, True, False, True])
    assert auc(np.array([0.1, 0.9, 0.2, 0.8]), clicked) == 1.0
    assert auc(np.array([0.5, 0.5, 0.5, 0.5]), clicked) == 0.5
    assert auc(np.array([0.1, 0.9, 0.5, 0.5]), clicked) == 0.875
    assert math.isnan(auc(np.array([0.1]), np.array([True])))
    assert log_loss(np.array([0.5, 0.5]), np.array([True, False])) == pytest.approx(math.log(2))
    assert math.isnan(log_loss(np.empty(0), np.empty(0, dtype=bool)))
