"""Daily training: each day is tested before it is learnt, stopping changes nothing, and tables grow without losing what they know."""

from __future__ import annotations

import dataclasses
import json
import logging
import signal
import subprocess
import sys
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from crossrep.errors import DataError, ModelError
from models import curves, daily, lfm4ads
from models.daily import Day, State
from models.datasets.base import Dataset, by_day, joined, only
from models.datasets.simulator import simulate
from models.features import Features, fit, grow, rows_before
from models.gate import gate
from models.registry import Registry
from models.train import evaluate, training_impressions
from models.upstream import read_manifest
from tests.cluster import ROOT

SMALL = {"hidden": 16, "cr": 8, "ur": 4, "ir": 4, "embedding": 4, "cross_layers": 1}
WORLD = {"events": 9_000, "users": 300, "items": 200, "seed": 3}
FIRST = date(2024, 1, 1)  # the simulator's first day


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return simulate(**WORLD)  # type: ignore[arg-type]


def run(dataset: Dataset, folder: Path, days: int) -> State:
    """Up to the day of that number."""
    return daily.run(dataset, folder, first_days=4, until=FIRST + timedelta(days - 1), architecture=SMALL, progress=False)


@pytest.fixture(scope="module")
def trained(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight days in one run: that of the first four, then one by one."""
    folder = tmp_path_factory.mktemp("training")
    run(dataset, folder, 8)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    """Everything that the next day goes on from."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*") if path.is_file() and path.name != ".lock"}


def test_every_day_is_tested_with_what_was_learnt_before_it(dataset: Dataset, trained: Path, tmp_path: Path) -> None:
    run(dataset, tmp_path, 5)
    assert [path.name for path in daily.states(tmp_path)] == ["2024-01-04", "2024-01-05"]
    days = dict(by_day(dataset))
    state = run(dataset, tmp_path, 6)
    assert [day.date for day in state.days] == [FIRST + timedelta(n) for n in range(6)]
    assert [day.auc is None for day in state.days] == [True] * 4 + [False] * 2
    for newest, before in ((state.days[4], "2024-01-04"), (state.days[5], "2024-01-05")):
        sixth = only(dataset, days[newest.date])
        model, frozen = (lfm4ads.load(tmp_path / name) for name in (before, "2024-01-04"))
        assert evaluate(model.predict, model.fields, sixth) == {"auc": newest.auc, "logloss": newest.logloss, "impressions": sixth.size}
        assert evaluate(frozen.predict, frozen.fields, sixth)["auc"] == newest.frozen_auc
    assert state.days[4].auc == state.days[4].frozen_auc and state.days[5].auc != state.days[5].frozen_auc
    assert sum(day.impressions for day in state.days) == sum(len(days[FIRST + timedelta(n)]) for n in range(6))
    assert read_manifest(tmp_path / "2024-01-06")["days"][-1] == "2024-01-06"


def test_in_one_run_or_in_many_it_is_the_same(dataset: Dataset, trained: Path, tmp_path: Path) -> None:
    for days in range(4, 9):
        state = run(dataset, tmp_path, days)
    assert state == daily.read_state(trained / "2024-01-08") and len(daily.states(trained)) == 3
    assert files(tmp_path) == files(trained)


@pytest.mark.parametrize(("point", "passes"), [("daily.optimise", 2), ("Path.rename", 3), ("shutil.rmtree", 5)])
def test_a_kill_changes_nothing(dataset: Dataset, trained: Path, tmp_path: Path, point: str, passes: int) -> None:
    """Killed while it learns a day, before a day's folder appears, and before the oldest is removed."""
    code = f"""
import os, shutil, signal
from datetime import date
from pathlib import Path
from models import daily
from models.datasets.simulator import simulate
before, left = {point}, [{passes}]
def counted(*args, **more):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    return before(*args, **more)
{point} = counted
daily.run(simulate(**{WORLD}), Path({str(tmp_path)!r}), first_days=4, until=date(2024, 1, 8), architecture={SMALL}, progress=False)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert len(daily.states(tmp_path)) > 0 and not (tmp_path / "2024-01-08").exists()
    run(dataset, tmp_path, 8)
    assert files(tmp_path) == files(trained)


def test_rows_of_new_values_stand_behind_the_old_ones(dataset: Dataset) -> None:
    days = [impressions for _, impressions in by_day(dataset)]
    first, second, third = (only(dataset, impressions) for impressions in days[:3])
    before = fit(first, training_impressions(first))
    same, waiting = grow(before, first, training_impressions(first), {})
    assert same.fields == before.fields, "all that was seen twice has its row"
    after, waiting = grow(before, second, training_impressions(second), waiting)
    old, new = before.fields["user"][0], after.fields["user"][0]
    assert new.values[: len(old.values)] == old.values and len(new.values) > len(old.values)
    counts: dict[str, int] = {}
    for part in (first, second):
        for user in training_impressions(part).user.tolist():
            counts[part.user_ids[user]] = counts.get(part.user_ids[user], 0) + 1
    assert set(new.values) == {id for id, count in counts.items() if count > 1}
    assert waiting["user_id"] == {id: count for id, count in counts.items() if count == 1}
    assert grow(after, third, training_impressions(third), waiting)[0].rows > after.rows

    rows, fresh = rows_before(before, after)
    table = np.random.default_rng(0).normal(size=(before.rows, 3))
    grown = table[rows]
    for kind, dataset_ids, columns in (("user", first.user_ids, first.user_features), ("item", second.item_ids, second.item_features)):
        x, y = (features.encode_columns(kind, dataset_ids, columns) for features in (before, after))
        assert np.array_equal(table[x], grown[y]), "a value that had no row begins as the unknown one, every other keeps its own"
    assert fresh.sum() == after.rows - before.rows and not fresh[rows_of_known(before, after)].any()


def rows_of_known(before: Features, after: Features) -> list[int]:
    """Rows in `after` of the user ids that had one in `before`."""
    return after.encode("user", list(before.fields["user"][0].values), [{}] * len(before.fields["user"][0].values))[:, 0].tolist()


def test_moments_go_with_their_rows(trained: Path) -> None:
    before, after = trained / "2024-01-07", trained / "2024-01-08"
    old, new = (Features.from_json(json.loads((folder / "vocabulary.json").read_text())) for folder in (before, after))
    assert new.rows > old.rows, "new ids appear every day"
    for folder, features in ((before, old), (after, new)):
        moments = load_file(folder / "optimiser.safetensors")
        assert moments["exp_avg.table.weight"].shape == (features.rows, SMALL["embedding"])
        assert moments["step.table.weight"] > 0


def test_what_it_refuses(dataset: Dataset, trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(DataError, match=r"has 2 days of impressions; to begin with, 4 are needed \(--first-days\)"):
        run(dataset, tmp_path / "few", 2)
    run(dataset, tmp_path, 5)
    with pytest.raises(DataError, match=r"has learnt from .*, not from 'another'"):
        run(dataclasses.replace(dataset, name="another"), tmp_path, 6)
    with daily._alone(tmp_path), pytest.raises(ModelError, match="another run trains in"):
        run(dataset, tmp_path, 6)
    more = dataclasses.replace(dataset, impressions=lambda: (joined([day, day]) for _, day in by_day(dataset)))
    with caplog.at_level(logging.WARNING):
        run(dataset, tmp_path, 5)
        assert not caplog.records
        run(more, tmp_path, 5)
    there = len(next(day for _, day in by_day(dataset)))
    assert len(caplog.records) == 5
    assert caplog.messages[0] == f"2024-01-01 has {2 * there} impressions now, and {there} when it was learnt: it is not learnt again"
    moments = tmp_path / "2024-01-05" / "optimiser.safetensors"
    moments.write_bytes(moments.read_bytes()[:-1] + b"x")
    with pytest.raises(ModelError, match=r"is not the file that state.json names: delete .*2024-01-05"):
        run(dataset, tmp_path, 6)


# --- What is made of it ---


def test_the_gate(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CROSSREP_HOME", str(tmp_path / "home"))
    registry, folder = Registry(str(tmp_path / "registry")), tmp_path / "training"
    run(dataset, folder, 4)
    with pytest.raises(ModelError, match="has learnt its first days only"):
        gate(dataset, folder, registry, "sim")
    run(dataset, folder, 6)
    first = gate(dataset, folder, registry, "sim")
    assert first.entry is not None and first.entry.reference == "sim@1" and "the first version" in first.reason
    metrics = first.entry.manifest["metrics"]
    assert metrics["auc"] == daily.read_state(folder / "2024-01-06").days[-1].auc, "what is registered is what was measured"
    assert first.entry.manifest["days"][-1] == "2024-01-05" and first.entry.manifest["tested_on"] == "2024-01-06"
    assert gate(dataset, folder, registry, "sim").reason == "it is sim@1 already"

    run(dataset, folder, 8)
    second = gate(dataset, folder, registry, "sim", tolerance=1.0)
    assert second.entry is not None and second.entry.registered.parent == 1
    candidate, former = second.asked
    assert former.label == "sim@1" and former.scores["impressions"] == candidate.scores["impressions"]
    assert candidate.scores["auc"] == daily.read_state(folder / "2024-01-08").days[-1].auc != former.scores["auc"]

    worse = tmp_path / "worse"  # learnt from labels that say the contrary
    contrary = [dataclasses.replace(part, clicked=~part.clicked) for part in dataset.impressions()]
    run(dataclasses.replace(dataset, impressions=lambda: iter(contrary)), worse, 9)
    verdict = gate(dataset, worse, registry, "sim")
    assert verdict.entry is None and verdict.reason.startswith("not registered: its AUC is 0.")
    assert verdict.asked[0].scores["auc"] < 0.5 < verdict.asked[1].scores["auc"]
    assert [entry.reference for entry in registry.versions("sim")] == ["sim@1", "sim@2"]

    run(dataset, tmp_path / "behind", 7)
    with pytest.raises(ModelError, match=r"sim@2 was trained until .*with impressions of 2024-01-07 itself: compare on a later day"):
        gate(dataset, tmp_path / "behind", registry, "sim")


def test_curves(trained: Path, tmp_path: Path) -> None:
    days = daily.read_state(trained / "2024-01-08").days
    table = curves.table(days)
    assert table.row_count == 5 and list(table.columns[0].cells)[-1] == "mean"
    mean = sum(day.auc or 0.0 for day in days[4:]) / 4
    assert list(table.columns[2].cells)[-1] == f"{mean:.4f}"
    curves.plot(days, str(tmp_path / "auc.svg"))
    drawn = (tmp_path / "auc.svg").read_bytes()
    curves.plot(days, str(tmp_path / "auc.svg"))
    assert drawn == (tmp_path / "auc.svg").read_bytes() and b"2024-01-08" not in drawn[:200]
    with pytest.raises(DataError, match="nothing to plot"):
        curves.plot([Day(date=FIRST, impressions=1)], str(tmp_path / "none.svg"))
    with pytest.raises(DataError, match="cannot be written"):
        curves.plot(days, str(tmp_path / "nowhere" / "auc.png"))
