"""The triple tower's variants: layers by name, one branch or two, several tasks; and how it is trained: devices, early stopping."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from numpy.typing import NDArray
from torch import nn

from crossrep.errors import DataError, ModelError
from models import devices
from models.cli import train as command
from models.datasets.base import Dataset, Impressions
from models.datasets.simulator import simulate
from models.early_stopping import EarlyStopping
from models.features import fit
from models.lfm4ads import ARCHITECTURE, LFM4Ads, build, fused, load, save
from models.train import evaluate, train, training_impressions

SMALL = {**ARCHITECTURE, "embedding": 3, "cross_layers": 2, "hidden": 12, "mlp_layers": 3, "ur": 4, "ir": 4, "cr": 6}


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    """With two labels: whether it is an ad, which the features say, and whether a coin, which nothing tells, shows heads."""
    whole = simulate(events=12_000, users=200, items=60, seed=1)

    def labelled(run: Impressions) -> Impressions:
        return dataclasses.replace(run, labels=np.stack([run.ad, np.random.default_rng(0).random(len(run)) < 0.5], axis=1))

    return dataclasses.replace(whole, impressions=lambda: map(labelled, whole.impressions()), labels=("is_ad", "heads"))


def network_of(dataset: Dataset, **architecture: Any) -> LFM4Ads:
    torch.manual_seed(0)
    fields = fit(dataset, training_impressions(dataset))
    network = build(fields, {**SMALL, **architecture})
    nn.init.normal_(network.table.weight)
    return LFM4Ads("untrained", fields, network, outputs=list(network.outputs))


def encoded(dataset: Dataset, model: LFM4Ads, n: int = 50) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    run = next(iter(dataset.impressions()))
    users = model.fields.encode_columns("user", dataset.user_ids, dataset.user_features)[run.user[:n]]
    items = model.fields.encode_columns("item", dataset.item_ids, dataset.item_features)[run.item[:n]]
    return users, items, model.fields.encode_impressions(run, dataset.scenarios)[:n]


def test_every_layer_is_what_its_name_says(dataset: Dataset) -> None:
    model = network_of(dataset)
    batch = encoded(dataset, model)
    w = {name: value.double().numpy() for name, value in model.network.state_dict().items()}
    x = start = w["table.weight"][np.concatenate(batch, axis=1)].reshape(50, -1)
    expected = {"embedding": start}
    for i in (1, 2):
        x = start * (x @ w[f"cross.{i - 1}.weight"].T + w[f"cross.{i - 1}.bias"]) + x
        expected[f"cross{i}"] = x
    for i, place in ((1, 0), (2, 2), (3, 4)):
        z = x @ w[f"ad_branch.{place}.weight"].T + w[f"ad_branch.{place}.bias"]
        x = z / (1 + np.exp(-z)) if i == 3 else np.maximum(z, 0)
        expected[f"mlp{i}"] = x
    out = model.forward(*batch)
    assert list(out) == ["ur", "ir", "cr", *expected] == list(model.outputs)
    for name, layer in expected.items():
        assert out[name].shape == (50, model.outputs[name])
        np.testing.assert_allclose(out[name], layer, atol=1e-4)
    assert np.array_equal(out["cr"], out["mlp3"])


def test_a_model_gives_what_it_is_asked_for_and_says_what_it_could(dataset: Dataset, tmp_path: Path) -> None:
    model = network_of(dataset)
    save(tmp_path, "m", model.fields, model.network, SMALL, {})
    batch, whole = encoded(dataset, model), model.forward(*encoded(dataset, model))
    some = load(tmp_path, outputs=("cross1", "ur"))
    assert some.outputs == {"cross1": model.outputs["embedding"], "ur": 4}
    assert {name: array.tolist() for name, array in some.forward(*batch).items()} == {name: whole[name].tolist() for name in some.outputs}
    computed = str(some._vectors.graph_for(fused(*batch)))  # type: ignore[attr-defined]
    assert computed.count("aten::linear(") == 3  # a cross layer and two of the user tower: what nobody asked for costs nothing
    assert load(tmp_path, outputs=()).forward(*batch) == {}
    assert load(tmp_path).outputs == {"ur": 4, "ir": 4, "cr": 6}
    assert json.loads((tmp_path / "manifest.json").read_text())["outputs"] == model.outputs  # what a space may be declared by
    with pytest.raises(ModelError, match=r"gives no 'cross3'; it can give ur\[4\], ir\[4\], cr\[6\], embedding\[\d+\], cross1"):
        load(tmp_path, outputs=("cr", "cross3"))


def test_a_model_saved_before_there_were_variants_is_the_same(dataset: Dataset, tmp_path: Path) -> None:
    older = {name: size for name, size in SMALL.items() if name not in ("mlp_layers", "shared", "tasks")}
    model = network_of(dataset, mlp_layers=2)
    save(tmp_path, "m", model.fields, model.network, older, {})
    batch = encoded(dataset, model)
    for name, array in load(tmp_path).forward(*batch).items():
        assert np.array_equal(array, model.forward(*batch)[name])


def test_a_shared_branch_is_one_for_ads_and_content(dataset: Dataset, tmp_path: Path) -> None:
    metrics = train(dataset, tmp_path, architecture=SMALL | {"shared": True}, rates=False, baseline=False, progress=False)
    model = load(tmp_path)
    assert not [name for name in model.network.state_dict() if name.startswith("content")]
    embedded = model.network.table(torch.from_numpy(np.concatenate(encoded(dataset, model), axis=1)))
    content, ad = model.network.logits(embedded)
    assert torch.equal(content, ad)
    assert metrics["auc"] > 0.55
    content, ad = network_of(dataset).network.logits(embedded)
    assert not torch.allclose(content, ad)


def test_other_tasks_are_learnt_beside_the_click(dataset: Dataset, tmp_path: Path) -> None:
    metrics = train(dataset, tmp_path, architecture=SMALL | {"tasks": ["heads", "is_ad"]}, rates=False, baseline=False, progress=False)
    assert metrics["auc"] > 0.55 and metrics["auc_is_ad"] > 0.95 and 0.4 < metrics["auc_heads"] < 0.6
    model = load(tmp_path)
    batch = encoded(dataset, model)
    run = next(iter(dataset.impressions()))
    ad, is_ad = run.ad[:50], model.predict(*batch, task="is_ad")
    assert 0 < ad.sum() < 50 and is_ad[ad].min() > is_ad[~ad].mean()
    assert not np.allclose(model.predict(*batch, task="heads"), model.predict(*batch))
    # They teach the branches, and neither UR nor IR.
    network = network_of(dataset, tasks=["heads"]).network.requires_grad_(True)
    rows = torch.from_numpy(np.concatenate(batch, axis=1))
    network.logits(network.table(rows))[1][:, 1].sum().backward()  # type: ignore[no-untyped-call]
    assert network.ad_branch[0].weight.grad.abs().sum() > 0
    assert not network.user_tower[0].weight.grad.any() and not network.item_tower[0].weight.grad.any()
    with pytest.raises(DataError, match=r"has no label 'liked' \(it has click, is_ad, heads\)"):
        train(dataset, tmp_path, architecture=SMALL | {"tasks": ["liked"]}, progress=False)


def test_early_stopping_keeps_the_best_epoch() -> None:
    network, scores = nn.Linear(1, 1), iter([0.5, 0.7, 0.7, 0.6, 0.9])
    stopping = EarlyStopping(network, lambda network: next(scores), patience=2)
    learnt = 0
    for batch in stopping.watch([f"epoch {epoch}"] * 3 for epoch in range(5)):
        learnt += 1
        with torch.no_grad():
            network.weight.fill_(learnt)
        assert batch.startswith("epoch")
    assert stopping.scores == [0.5, 0.7, 0.7, 0.6] and learnt == 12
    assert stopping.best.weight.item() == 6 and network.weight.item() == 12


def test_training_ends_when_later_days_say_so(dataset: Dataset, tmp_path: Path) -> None:
    tiny = SMALL | {"hidden": 8, "cross_layers": 1}
    metrics = train(dataset, tmp_path, epochs=12, patience=1, architecture=tiny, baseline=False, progress=False)
    scores = metrics["validation_auc"]
    assert 2 <= len(scores) < 12 and scores[-1] <= scores[-2] == max(scores)
    model = load(tmp_path)
    again = evaluate(model.predict, model.fields, dataset, since=dataset.train_until, until=dataset.test_from)
    assert again["auc"] == pytest.approx(max(scores), abs=1e-4) and again["impressions"] > 1_500
    none_between = dataclasses.replace(dataset, test_from=dataset.train_until)
    with pytest.raises(DataError, match=r"no clicks between .* to stop by"):
        train(none_between, tmp_path, patience=1, architecture=tiny, baseline=False, progress=False)


def digest(folder: Path) -> str:
    return str(json.loads((folder / "manifest.json").read_text())["sha256"]["weights.safetensors"])


def test_mixed_precision_learns_the_same_twice(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "has_fast_bfloat16", lambda: True)
    options: dict[str, Any] = {"architecture": SMALL, "baseline": False, "progress": False}
    exact = train(dataset, tmp_path / "exact", **options)
    mixed = [train(dataset, tmp_path / name, mixed=True, **options) for name in ("a", "b")]
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != digest(tmp_path / "exact")
    assert mixed[0]["auc"] == pytest.approx(exact["auc"], abs=0.01)
    shutil.rmtree(tmp_path)


def test_the_command(tmp_path: Path) -> None:
    small = ["simulated", "--events", "3000", "--users", "100", "--items", "30", "--out", str(tmp_path)]
    told = CliRunner().invoke(command, [*small, "--shared-branch", "--epochs", "2", "--patience", "1", "--device", "cpu", "--mixed"])
    assert told.exit_code == 0, told.output
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["architecture"]["shared"] and manifest["mixed"] and manifest["device"] == "cpu"
    assert 1 <= len(manifest["metrics"]["validation_auc"]) <= 2
    told = CliRunner().invoke(command, [*small, "--task", "is_like"])
    assert told.exit_code != 0 and "simulated-0 has no label 'is_like'" in str(told.exception) + told.output


def test_devices() -> None:
    assert devices.choose("cpu").type == "cpu"
    assert devices.choose("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    wrong = {"gpu": "no device is called 'gpu'", "cuda:99": "no device 'cuda:99'.* CUDA devices", "meta": "'meta' is not supported"}
    for name, message in wrong.items():
        with pytest.raises(ModelError, match=message):
            devices.choose(name)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_gpu_learns_the_same_twice_and_as_well_as_a_cpu(dataset: Dataset, tmp_path: Path) -> None:
    options: dict[str, Any] = {"architecture": SMALL, "baseline": False, "progress": False}
    on_cpu = train(dataset, tmp_path / "cpu", **options)
    for mixed in (False, True):
        scores = [train(dataset, tmp_path / name, device="cuda", mixed=mixed, **options)["auc"] for name in ("a", "b")]
        assert digest(tmp_path / "a") == digest(tmp_path / "b")
        assert scores[0] == pytest.approx(on_cpu["auc"], abs=0.01)
