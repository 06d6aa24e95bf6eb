"""Entities and columns nobody wrote code for: declared in TOML, written, folded, proved and read back."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from crossrep import FrameWriter, LocalView
from models.datasets import Dataset
from tests.cluster import SPEC as USERS_AND_ITEMS
from tests.cluster import Workers, new_space, prove, settled, wait_for
from tests.streams.small_model import SPEC, Feed, inferred, small_dataset, start_infer

ADVERTISER = """
[entities.advertiser.columns.cr]
source = "cr"
dim = 8
aggregate = "decayed_mean"
half_life = "12h"
[entities.advertiser.columns.slow]
source = "cr"
dim = 8
aggregate = "decayed_mean"
half_life = "30d"
[entities.advertiser.columns.budget]
source = "budget"
dim = 3
aggregate = "latest"
[entities.advertiser.columns.clicks]
source = "cr"
dim = 0
aggregate = "decayed_mean"
half_life = "1d"
events = ["click"]
"""

SCENARIO = """
[entities.scenario]
key = "scenario"
[entities.scenario.columns.cr]
source = "cr"
dim = 64
aggregate = "decayed_mean"
half_life = "1h"
[entities.scenario.columns.slow]
source = "cr"
dim = 64
aggregate = "decayed_mean"
half_life = "52w"
[entities.scenario.columns.clicks]
source = "cr"
dim = 0
aggregate = "decayed_mean"
half_life = "2d"
events = ["click"]
[entities.branch.columns.seen]
source = "cr"
dim = 0
aggregate = "decayed_mean"
half_life = "7d"
"""


def test_an_invented_entity_written_by_another_team(bootstrap: str, workers: Workers, tmp_path: Path) -> None:
    space, path = new_space(bootstrap, tmp_path, USERS_AND_ITEMS + ADVERTISER)
    workers.fold(path)
    random = np.random.default_rng(3)
    written = 0
    with FrameWriter(space.name, "billing-team", bootstrap) as writer:
        for _ in range(5):
            ids = random.integers(0, 40, 200).tolist()
            events = np.where(random.random(200) < 0.4, "click", "impression")
            times = 1.7e9 + np.round(random.normal(0, 86_400, 200))
            sources = {"cr": random.normal(size=(200, 8)).astype("f4"), "budget": random.normal(size=(200, 3)).astype("f4")}
            writer.write("advertiser", [f"a{i}" for i in ids], events, times, sources)
            writer.commit()
            written += 200
        writer.write("advertiser", ["known"], "click", [1.7e9], {"cr": np.full((1, 8), 2.0), "budget": np.ones((1, 3))})
        writer.write("advertiser", ["known"], "impression", [1.7e9 + 43_200], {"cr": np.full((1, 8), 1.0), "budget": np.zeros((1, 3))})
        writer.commit()
    wait_for(lambda: settled(space, bootstrap), "folded")
    prove(space, bootstrap, {"user": 0, "item": 0, "advertiser": written + 2})
    with LocalView("advertiser", space.name, bootstrap) as view:
        view.wait(60)
        assert len(view) == 41
        known = view.get(["known"], at=1.7e9 + 43_200)
        assert known.counts.tolist() == [2]
        # Half a day later the click's 4.0 is worth 2.0 in `cr`, and nearly all of it in `slow`.
        np.testing.assert_allclose(known["cr"].weights, [3.0])
        np.testing.assert_allclose(known["cr"].vectors[0], (2.0 * 2 + 1.0 * 1) / 3, rtol=1e-6)
        slow = 4 * 2 ** (-0.5 / 30)
        np.testing.assert_allclose(known["slow"].weights, [slow + 1])
        np.testing.assert_allclose(known["slow"].vectors[0], (slow * 2 + 1) / (slow + 1), rtol=1e-6)
        assert known["budget"].vectors.tolist() == [[0.0, 0.0, 0.0]] and known["budget"].times.tolist() == [1.7e9 + 43_200]
        np.testing.assert_allclose(known["clicks"].weights, [4 * 2**-0.5])
        assert known["clicks"].vectors.shape == (1, 0)
        assert {name for name, _ in view.nearest("cr", "a1", 40)} == set(view.ids()) - {"a1"}


def per_scenario(dataset: Dataset) -> tuple[dict[str, int], dict[str, int]]:
    """Events of each scenario and of each branch, a click being one more."""
    scenarios, branches = dict.fromkeys(dataset.scenarios, 0), {"content": 0, "ad": 0}
    for run in dataset.impressions():
        for scenario, ad, clicked in zip(run.scenario.tolist(), run.ad.tolist(), run.clicked.tolist()):
            scenarios[dataset.scenarios[scenario]] += 1 + clicked
            branches["ad" if ad else "content"] += 1 + clicked
    return scenarios, branches


def test_an_entity_keyed_by_a_field_of_the_event(bootstrap: str, workers: Workers, tmp_path: Path) -> None:
    spec = SPEC + SCENARIO.replace("[entities.branch.columns.seen]", '[entities.branch]\nkey = "branch"\n[entities.branch.columns.seen]')
    space, path = new_space(bootstrap, tmp_path, spec, partitions=2)
    dataset = small_dataset(3000, seed=5)
    start_infer(workers, path)
    workers.fold(path)
    feed = Feed(space, dataset, bootstrap)
    feed.send_rest()
    wait_for(lambda: inferred(space, bootstrap), "inferred")
    wait_for(lambda: settled(space, bootstrap), "folded")
    prove(space, bootstrap, feed.counts)
    scenarios, branches = per_scenario(dataset)
    for entity, expected in (("scenario", scenarios), ("branch", branches)):
        with LocalView(entity, space.name, bootstrap) as view:
            view.wait(60)
            assert dict(zip(expected, view.get(list(expected)).counts.tolist())) == expected and len(view) == len(expected)
            for values in view.get(list(expected)).values():
                assert (values.weights > 0).all() and np.isfinite(values.vectors).all()
