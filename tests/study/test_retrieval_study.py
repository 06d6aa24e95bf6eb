"""The study of retrieval: nothing of a day is known at its beginning, recall by hand, and a command that goes on where it was cut off."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import study.cli  # noqa: F401 (the commands)
from crossrep.cli import cli
from models.datasets import kuairand
from models.transfer.retrieval import as_cosine
from study import ranks
from study.ranks import Scores
from study.retrieval import ARMS, FIRST, scores
from study.retrieval_world import DAY, Day, World, questions, states
from tests.cluster import ROOT

SETTING = {"popularity": 1, "interest": 4, "weight": 0.1, "temperature": 0.1, "epochs": 1}


@pytest.fixture(scope="module")
def world(kuairand_folder: Path) -> World:
    return World.of(kuairand.load(kuairand_folder), seed=1)


def test_a_cosine_can_hold_a_bias() -> None:
    rng = np.random.default_rng(0)
    users, items, bias = rng.normal(size=(5, 4)), rng.normal(size=(40, 4)), rng.normal(size=40)
    queries, vectors = as_cosine(*(array.astype(np.float32) for array in (users, items, bias)))
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), np.linalg.norm(vectors, axis=1)[0], rtol=1e-6)
    np.testing.assert_allclose(queries @ vectors.T, users @ items.T + bias, atol=1e-5)


def test_recall_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "KS", (1, 2))
    # User 5 clicks items 0 and 3 and skips 1, and has been shown 2; user 8 clicks item 2 alone; user 9 clicks what was shown before.
    row, item, clicked = np.array([0, 0, 0, 1, 2]), np.array([0, 3, 1, 2, 1]), np.array([True, True, False, True, True])
    day = Day(0, np.array([5, 8, 9]), row, item, clicked, np.array([0, 2]), np.array([2, 1]))
    each = Scores(np.array([[1.0], [1.0], [1.0]], np.float32), np.zeros((4, 1), np.float32), np.array([0.3, 0.2, 0.9, 0.1], np.float32))
    found = ranks.offers([each], [day])
    assert found.user.tolist() == [5, 8] and found.top.tolist() == [[0, 1], [2, 0]]
    assert found.recall.tolist() == [[0.5, 0.5], [1.0, 1.0]]
    assert found.mean(1) == 0.75 and found.mean(1, np.arange(10) == 8) == 1.0
    assert ranks.auc_of_shown([each], [day]) == pytest.approx(2.5 / 4)  # .3, .1, .9 and .2 are clicked, .2 is skipped
    searched = ranks.offers([each], [day], lambda number, rows: np.tile([2, 3, 1, 0], (len(rows), 1)))
    assert searched.top.tolist() == [[3, 1], [2, 3]] and searched.recall[:, 0].tolist() == [0.5, 1.0]
    less = searched.less(found, 1)
    assert less["mean"] == 0 and less["half"] == 0


def test_states_by_formula(world: World) -> None:
    log, h = world.log, 2 * DAY
    weights = log.impressions.clicked.astype(float)
    number, user = 9, int(log.impressions.user[5])
    mean, weight = next(
        (mean.copy(), weight) for at, (mean, weight) in enumerate(states(log, "user", world.cr, weights, h)) if at == number
    )
    own = (log.impressions.user == user) & log.impressions.clicked & (log.impressions.event_time < log.days[number])
    left = 2.0 ** (-(log.days[number] - log.impressions.event_time[own]) / h)
    assert own.sum() > 3 and weight[user] == pytest.approx(left.sum())
    np.testing.assert_allclose(mean[user], left @ world.cr[own] / left.sum(), rtol=1e-5)


@pytest.mark.parametrize("arm", ARMS)
def test_no_score_depends_on_its_own_day_or_later(world: World, arm: str) -> None:
    log, day = world.log, 10
    learn, asked = questions(log, range(1, day)), questions(log, range(day, day + 1))
    later = np.arange(len(log.impressions)) >= log.bounds[day]
    data = log.impressions
    changed = replace(data, clicked=data.clicked ^ later, item=np.where(later, (data.item + 7) % 150, data.item).astype(np.int32))
    other = replace(world, log=replace(log, impressions=changed), cr=np.where(later[:, None], 9.0, world.cr).astype(np.float32))
    before, after = (scores(each, ARMS[arm], SETTING, learn, asked, 0)[0] for each in (world, other))
    for name in ("users", "items", "bias"):
        assert np.array_equal(getattr(before, name), getattr(after, name))
    earlier = replace(world, log=replace(log, impressions=replace(data, clicked=data.clicked ^ ~later)))
    if arm not in ("most shown", "cosine of UR and IR", "UR · IR"):  # the others do look at past clicks
        third = scores(earlier, ARMS[arm], SETTING, questions(earlier.log, range(1, day)), asked, 0)[0]
        assert not all(np.array_equal(getattr(before, name), getattr(third, name)) for name in ("users", "items", "bias"))


def test_the_command_goes_on_where_it_was_cut_off(kuairand_folder: Path, tmp_path: Path) -> None:
    shown = re.search(r"^    crossrep (study retrieval DIR --out \S+)$", (ROOT / "docs" / "study-upstream.md").read_text(), re.MULTILINE)
    assert shown
    words = shown[1].replace("DIR", str(kuairand_folder)).replace("docs/study", str(tmp_path)).split()
    words += ["--seeds", "2", "--workers", "1"]
    assert CliRunner().invoke(cli, words, catch_exceptions=False).exit_code == 0
    path = tmp_path / "retrieval.jsonl"
    whole = path.read_text()
    tuned = [arm for arm in ARMS if len(ARMS[arm].trials) > 1]
    assert {len(ARMS[arm].trials) for arm in tuned} == {6} and len(whole.splitlines()) == len(tuned) + 2
    assert [json.loads(line)["arm"] for line in whole.splitlines()[:2]] == list(FIRST)
    tables = (tmp_path / "retrieval.md").read_text()
    assert all(arm in tables for arm in ARMS) and "nan" not in tables
    path.write_text(whole[: whole[:-1].rfind("\n") - 30])
    assert CliRunner().invoke(cli, words, catch_exceptions=False).exit_code == 0
    assert path.read_text() == whole
