"""Training that is cut off: killed at any batch and asked again, it ends with the model of a run that was not, bit by bit."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from models import devices, optimise
from models.checkpoint import FILE
from models.datasets.base import Dataset
from models.datasets.simulator import simulate
from models.train import train
from tests.cluster import ROOT

WORLD = {"events": 6_000, "users": 300, "items": 60, "seed": 2}
SIZES = {"hidden": 16, "cr": 8, "ur": 4, "ir": 4, "embedding": 4, "cross_layers": 1}
ONCE: dict[str, Any] = {"seed": 5, "architecture": SIZES, "progress": False}
STOPPED = ONCE | {"epochs": 9, "patience": 2, "baseline": False}


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return simulate(**WORLD)  # type: ignore[arg-type]


def killed(folder: Path, batches: int, options: dict[str, Any]) -> None:
    """Train in a process that kills itself before it learns batch number `batches`; it keeps what it has learnt after every batch."""
    code = f"""
import os, signal, torch
from pathlib import Path
from models import train
from models.datasets.simulator import simulate
torch.set_num_threads(1)
before, left = train.tower_loss, [{batches}]
def counted(*args, **more):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    return before(*args, **more)
train.tower_loss = counted
train.train(simulate(**{WORLD}), Path({str(folder)!r}), every=0, **{options})
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert (folder / FILE).exists() and not (folder / "manifest.json").exists()


def told(folder: Path) -> tuple[str, dict[str, Any]]:
    """The digest of the weights, and the metrics but the time it took."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["metrics"].pop("train_seconds")
    return manifest["sha256"]["weights.safetensors"], manifest["metrics"]


@pytest.mark.parametrize(("options", "batches"), [(ONCE, 4), (STOPPED, 19)])
def test_a_kill_changes_nothing(
    dataset: Dataset, tmp_path: Path, options: dict[str, Any], batches: int, caplog: pytest.LogCaptureFixture
) -> None:
    train(dataset, tmp_path / "whole", **options)
    killed(tmp_path / "cut", batches, options)
    with caplog.at_level(logging.WARNING):
        train(dataset, tmp_path / "cut", **options)
    assert f"training goes on behind the {batches - 1} batches" in caplog.text
    assert told(tmp_path / "cut") == told(tmp_path / "whole")
    assert not (tmp_path / "cut" / FILE).exists() and not list((tmp_path / "whole").glob(".*"))
    if "patience" in options:
        assert len(told(tmp_path / "cut")[1]["validation_auc"]) >= 3  # it was cut off behind an epoch that had been scored


def test_a_run_that_is_asked_something_else_begins_anew_and_says_why(
    dataset: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    killed(tmp_path / "cut", 4, ONCE)
    with caplog.at_level(logging.WARNING):
        train(dataset, tmp_path / "cut", **(ONCE | {"seed": 6}))
    assert "is of another run (seed: 5 then, 6 now), so training begins anew" in caplog.text
    train(dataset, tmp_path / "whole", **(ONCE | {"seed": 6}))
    assert told(tmp_path / "cut") == told(tmp_path / "whole")
    (tmp_path / "cut" / FILE).write_bytes(b"half a file")
    with caplog.at_level(logging.WARNING):
        train(dataset, tmp_path / "cut", **(ONCE | {"seed": 6}))
    assert told(tmp_path / "cut") == told(tmp_path / "whole")
    assert f"{FILE} cannot be read, so training begins anew" in caplog.text


def test_the_bar_shows_loss_and_auc_while_it_learns(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, float] = {}

    class Recorded(optimise.Figures):
        def render(self, task: Any) -> Any:
            told.update(task.fields)
            return super().render(task)

    monkeypatch.setattr(optimise, "Figures", Recorded)
    monkeypatch.setattr(optimise, "SHOWN", 5)
    metrics = train(dataset, tmp_path, **(STOPPED | {"progress": True, "epochs": 2}))
    assert 0.3 < told["loss"] < 3
    assert told["auc"] == pytest.approx(metrics["validation_auc"][-1], abs=1e-5)


def test_mixed_is_float32_where_the_device_is_no_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = devices.choose("cpu")
    for fast in (False, True):
        monkeypatch.setattr(devices, "has_fast_bfloat16", lambda fast=fast: fast)
        assert (devices.mixed(cpu) is not None) is fast
