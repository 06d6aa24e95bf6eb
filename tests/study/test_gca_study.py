"""The study of gated cross-attention: nothing leaks, metrics are right, runs repeat, and a study that was cut off goes on."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import study.cli
from crossrep.cli import cli
from crossrep.errors import DataError
from models.datasets.two_domains import Sequences, load
from study import gca, intervals, ranking, split, training
from study.gca_report import chance
from study.recommender import Architecture, Recommender, parameters
from study.split import TEST, TRAIN, VALIDATE, View
from study.training import Schedule, Views
from tests.cluster import ROOT


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """60 users, 20 items of each domain, days with many ties; items of one taste follow each other in both domains."""
    chance = np.random.default_rng(3)
    lines = []
    for user in range(60):
        days = np.sort(chance.integers(0, 9, 24))
        taste = user % 2
        lines.append(f"{user} " + " ".join(f"{20 * chance.integers(2) + 10 * taste + chance.integers(10)}|{86400 * day}" for day in days))
    (tmp_path / "sequences.txt").write_text("\n".join(lines) + "\n")
    (tmp_path / "item_map.json").write_text(json.dumps({f"B{item}": [item, item // 20] for item in range(40)}))
    return tmp_path


@pytest.fixture
def sequences(folder: Path) -> Sequences:
    return load(folder)


def test_the_split_holds_out_the_last_two_times_of_each_domain(sequences: Sequences) -> None:
    stage = split.stages(sequences)
    for user, domain in itertools.product(range(60), (0, 1)):
        own = (sequences.user == user) & (sequences.domain == domain)
        times = sorted(set(sequences.time[own].tolist()))
        for time, found in zip(sequences.time[own], stage[own]):
            assert found == (TRAIN if len(times) < 3 else max(TRAIN, 2 - (len(times) - 1 - times.index(time))))


@pytest.mark.parametrize("now", [TRAIN, VALIDATE, TEST])
def test_a_view_holds_no_later_stage_and_a_target_is_told_by_earlier_times_alone(sequences: Sequences, now: int) -> None:
    stage = split.stages(sequences)
    seen = split.view(sequences, stage, now)
    kept = np.flatnonzero(stage <= now)
    assert np.array_equal(seen.item, sequences.item[kept])
    time, user = sequences.time[kept], sequences.user[kept]
    for event in range(len(kept)):
        earlier = np.flatnonzero((user == user[event]) & (time < time[event]))
        assert seen.before[event] == (earlier[-1] - seen.start[user[event]] if len(earlier) else -1)
        assert seen.target[event] == (stage[kept[event]] == now and len(earlier) > 0)
        assert seen.moment[event] == len(set(time[earlier].tolist()))
    assert seen.target.sum() > 100


ARMS = gca.arms(8)


@pytest.mark.parametrize("arm", ARMS)
def test_no_score_depends_on_its_own_time_or_later(sequences: Sequences, arm: str) -> None:
    torch.manual_seed(0)
    model = Recommender(sequences.sizes, 24, ARMS[arm]).eval()
    for name, weights in model.named_parameters():
        if "gate" in name:  # they begin at zero: closed, they would hide a leak
            torch.nn.init.normal_(weights)
    seen = split.view(sequences, split.stages(sequences), TEST)
    user = int(np.flatnonzero(np.diff(seen.start) == 24)[0])
    begin, moments = seen.start[user], seen.moment[seen.start[user] : seen.start[user + 1]]
    before = _states(model, seen, user)
    for moment in range(1, int(moments.max()) + 1):
        later = begin + np.flatnonzero(moments >= moment)
        after = _states(model, _other_items(seen, later), user)
        told = seen.before[later[0]]
        assert moments[told] == moment - 1
        assert torch.allclose(before[:, : told + 1], after[:, : told + 1], atol=1e-6)
        changed = _states(model, _other_items(seen, begin + np.flatnonzero(moments == moment - 1)), user)
        assert not torch.allclose(before[:, told], changed[:, told], atol=1e-3)  # it does look at the past


def _states(model: Recommender, seen: View, user: int) -> torch.Tensor:
    """[2, T, dim] of one user."""
    states, _ = model(split._batch(seen, model.sizes, np.array([user])))
    return torch.stack([state[0] for state in states])


def _other_items(seen: View, events: np.ndarray) -> View:
    """With other items, of the other domain, at these events."""
    item = seen.item.copy()
    item[events] = (item[events] + 23) % 40
    return replace(seen, item=item, domain=(item >= 20).astype(np.int64))


def test_every_target_is_batched_once_with_its_own_state(sequences: Sequences) -> None:
    seen = split.view(sequences, split.stages(sequences), TRAIN)
    found, users = [0, 0], 0
    for batch in split.batches(seen, sequences.sizes, 7, np.random.default_rng(0)):
        users += len(batch.item)
        for domain, targets in enumerate(batch.targets):
            found[domain] += len(targets.item)
            following = batch.moment[targets.row, targets.place + 1]
            assert (following == batch.moment[targets.row, targets.place] + 1).all()
            assert (targets.item < sequences.sizes[domain]).all()
    assert found == [int((seen.target & (seen.domain == domain)).sum()) for domain in (0, 1)]
    assert users == len(np.unique(sequences.user))


def test_ranks_against_counting_one_by_one() -> None:
    generator = np.random.default_rng(0)
    scores = np.round(generator.normal(size=(40, 30)), 1)  # ties
    target, had = generator.integers(0, 30, 40), generator.random((40, 30)) < 0.3
    counted, candidates = ranking.above(scores.copy(), target, *np.nonzero(had))
    for n in range(40):
        others = [item for item in range(30) if item != target[n] and not had[n, item]]
        better = sum(scores[n, item] > scores[n, target[n]] for item in others)
        equal = sum(scores[n, item] == scores[n, target[n]] for item in others)
        assert (counted[n], candidates[n]) == (better + equal / 2, len(others))
    assert ranking.auc(np.array([0.0, 3.0]), np.array([4, 4])).tolist() == [1.0, 0.25]
    assert ranking.ndcg(np.array([0.0, 1.0, 9.0, 10.0]), 10) == pytest.approx([1, 1 / np.log2(3), 1 / np.log2(11), 0])


def test_sampled_ndcg_is_the_mean_over_all_draws() -> None:
    better, candidates, drawn, k = 3, 9, 5, 3
    draws = [sum(item < better for item in draw) for draw in itertools.combinations(range(candidates), drawn)]
    expected = np.mean([1 / np.log2(2 + above) if above < k else 0 for above in draws])
    assert ranking.sampled_ndcg(np.array([float(better)]), np.array([candidates]), k, drawn) == pytest.approx([expected])
    assert ranking.sampled_ndcg(np.array([2.0]), np.array([4]), 10) == pytest.approx([0.5])  # fewer than 999: all of them


def test_users_count_alike_however_many_targets_they_have() -> None:
    found = ranking.metrics(np.array([4, 4, 9]), np.array([0.0, 20.0, 0.0]), np.array([100, 100, 100]))
    assert found["ndcg@1"] == pytest.approx((0.5 + 1) / 2)


def test_intervals_by_hand() -> None:
    found = intervals.of_mean([1.0, 2.0, 3.0])
    assert found == pytest.approx((2.0, 4.303 / 3**0.5), abs=1e-3)  # t of 2 degrees of freedom
    assert not found.clear and intervals.of_mean([1.0, 1.1, 1.2]).clear
    r, low, high = intervals.of_correlation([1, 2, 3, 4, 5, 6], [2, 1, 4, 3, 6, 5])
    assert (r, low, high) == pytest.approx((0.8286, 0.0513, 0.9806), abs=1e-3)


def test_two_random_directions() -> None:
    x, y = torch.randn(2, 200_000, 32, generator=torch.Generator().manual_seed(0))
    assert chance(32) == pytest.approx(torch.cosine_similarity(x, y).abs().mean().item(), abs=1e-3)


def test_grown_arms_are_as_large_as_what_they_are_compared_with() -> None:
    sizes = {arm: parameters(Recommender((20, 20), 24, each)) for arm, each in ARMS.items()}
    each = sizes["none"] - parameters(Recommender((20, 20), 24, Architecture(8, 15)))
    for grown, other in ((arm, arm.rpartition(" as large as ")[2]) for arm in ARMS if " as large as " in arm):
        assert abs(sizes[grown] - sizes[other]) <= each / 2
    assert sizes["none"] < sizes["early"] < sizes["stack"]


def test_the_same_seed_gives_the_same_figures(sequences: Sequences) -> None:
    views = Views.of(sequences)
    first, again, other = (training.run(views, ARMS["stack"], Schedule(epochs=2), seed) | {"seconds": 0} for seed in (1, 1, 2))
    assert first == again
    assert first["epochs"] != other["epochs"]
    assert [(each["level"], each["domain"]) for each in first["test"]["cosines"]] == list(itertools.product((0, 1, 2), (0, 1)))


def test_it_learns_who_likes_what(sequences: Sequences) -> None:
    architecture = replace(ARMS["early"], dim=16)
    found = training.run(Views.of(sequences), architecture, Schedule(users=8, epochs=16, patience=16), 1)
    # At best about .93: what a user has not had yet is mostly of the other taste.
    assert min(domain["auc"] for domain in found["test"]["domains"]) > 0.8
    assert found["epochs"][-1]["loss"] < found["epochs"][1]["loss"]


def figures(lines: str) -> list[str]:
    """Of each run, in an order of their own: of two workers, now the one is first, now the other."""
    return sorted(json.dumps(json.loads(line) | {"seconds": 0}) for line in lines.splitlines())


def test_a_study_from_the_command_line_goes_on_where_it_was_cut_off(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shown = re.search(r"^    crossrep (study gca DIR --out \S+)$", (ROOT / "docs" / "study-gca.md").read_text(), re.MULTILINE)
    assert shown
    words = shown[1].replace("DIR", str(folder)).replace("docs/study-gca", str(out)).split()
    words += ["--seeds", "2", "--workers", "1", "--dim", "4", "--epochs", "1"]
    assert CliRunner().invoke(cli, words, catch_exceptions=False).exit_code == 0
    whole = (out / "runs.jsonl").read_text()
    assert len(whole.splitlines()) == len(ARMS) * (len(gca.RATES) + 2)
    tables = (out / "tables.md").read_text()
    assert "early − none" in tables and "nan" not in tables.partition("Correlation")[0]
    assert all((out / name).read_text().startswith("<?xml") for name in ("differences.svg", "cosines.svg"))

    (out / "runs.jsonl").write_text(whole.rpartition('{"data"')[0][:-30])  # without the last, and killed while it wrote the one before
    assert CliRunner().invoke(cli, [*words, "--workers", "2"], catch_exceptions=False).exit_code == 0
    assert figures((out / "runs.jsonl").read_text()) == figures(whole)

    (out / "runs.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"runs\.jsonl, line 1 is no run"):
        CliRunner().invoke(cli, words, catch_exceptions=False)


def test_a_domain_without_anything_to_test_on_is_named(folder: Path, tmp_path: Path) -> None:
    (folder / "sequences.txt").write_text("1 3|1 4|2 5|3 25|3\n")
    arguments = {"seeds": 2, "workers": 1, "schedule": Schedule(epochs=1), "dim": 4}
    with pytest.raises(DataError, match="domain 1 has nothing to test on"):
        gca.study(load(folder), tmp_path / "out", console=study.cli.console, **arguments)
