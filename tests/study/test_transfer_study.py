"""The study of transfer: nothing leaks, what was known is what a replay gives, and the whole study on a small KuaiRand."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

import study.cli  # noqa: F401  adds the studies' commands
from crossrep.cli import cli
from crossrep.columnar import algebra
from crossrep.columnar.records import RecordLayout
from crossrep.keys import Keys
from crossrep.rollout import replay_files, replay_tables
from crossrep.spec import Space, parse_duration
from crossrep.views.answers import answer
from models.datasets.base import Dataset, select
from models.datasets.kuairand import ITEM_CATEGORIES, ITEM_NUMBERS, TEST_FROM, USER_CATEGORIES, USER_NUMBERS, load
from models.train import auc
from study import arms, downstream, metrics, worlds
from study.arms import ARMS, BLOCKS, Arm
from study.past import FOR_EVER, Aggregate, Past
from study.worlds import World
from tests.cluster import ROOT

USERS, ITEMS, EVENTS = 60, 30, 3000
FIRST = 1650816000.0  # 2022-04-25 00:00 +08:00


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """KuaiRand's form; how much a user clicks is his own affair, so that only his past tells it."""
    folder, chance = tmp_path_factory.mktemp("kuairand"), np.random.default_rng(5)
    user = chance.integers(0, USERS, EVENTS)
    log = {
        "user_id": user,
        "video_id": chance.integers(0, ITEMS, EVENTS),
        "time_ms": (1000 * (FIRST + np.sort(chance.integers(0, 14 * 1440, EVENTS)) * 60.0)).astype(np.int64),  # to the minute: ties
        "is_click": (chance.random(EVENTS) < chance.choice([0.15, 0.75], USERS)[user]).astype(np.int64),
        "tab": chance.integers(0, 2, EVENTS),
    }
    log = {name: np.append(column, column[:20]) for name, column in log.items()}  # repeats
    pq.write_table(pa.table(log), folder / "log_standard_small_pure.parquet")
    files = (("user_features_pure.csv", "user_id", USERS, USER_NUMBERS, USER_CATEGORIES),)
    files += (("video_features_basic_pure.csv", "video_id", ITEMS, ITEM_NUMBERS, ITEM_CATEGORIES),)
    for file, key, size, numbers, categories in files:
        with (folder / file).open("w", newline="") as out:
            rows = csv.writer(out)
            rows.writerow([key, *numbers, *categories])
            rows.writerows([id, *[id % 7] * len(numbers), *[f"c{id % 3}"] * len(categories)] for id in range(size))
    return folder


@pytest.fixture(scope="module")
def dataset(folder: Path) -> Dataset:
    return load(folder)


@pytest.fixture(scope="module")
def world(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> World:
    place = worlds.place(tmp_path_factory.mktemp("scratch"), "small", "authors", "dual", 1)
    worlds.build(dataset, place, "authors", "dual", 1)
    return World(dataset, place, "authors")


HOW = {
    "mean": Aggregate(half_life=FOR_EVER, click=3.0),
    "1h": Aggregate(half_life="1h"),
    "1d": Aggregate(half_life="1d", click=3.0),
    "clicked": Aggregate(half_life="7d", impression=0.0, click=3.0),
    "last": Aggregate("latest"),
    "sum": Aggregate("count_sum"),
    "ema": Aggregate("count_ema"),
    "convex": Aggregate("convex", "1d"),
    "skipped": Aggregate(half_life="7d", click=-1.0),
}


@pytest.mark.parametrize("name", HOW)
def test_what_is_known_is_of_strictly_earlier_impressions_and_by_the_definition(name: str) -> None:
    chance, how = np.random.default_rng(2), HOW[name]
    key, time = chance.integers(0, 4, 80).astype(np.int32), 3600.0 * chance.integers(0, 60, 80)  # in no order, with ties
    vectors, clicked = chance.normal(size=(80, 3)).astype(np.float32), chance.random(80) < 0.4
    asked, at = chance.integers(0, 5, 30).astype(np.int32), 3600.0 * chance.integers(0, 61, 30)  # of key 4 there is nothing
    past = Past(key, time, asked, at)
    found = past.known(how, vectors, clicked)
    for i in range(30):
        earlier = [j for j in np.argsort(time, kind="stable") if key[j] == asked[i] and time[j] < at[i]]
        assert past.counts()[i] == len(earlier)
        weights = np.array([how.impression + how.click * clicked[j] for j in earlier])
        rows, counted = vectors[[j for j, w in zip(earlier, weights) if w > 0]].astype(float), weights[weights > 0]
        times = np.array([time[j] for j, w in zip(earlier, weights) if w > 0])
        assert found.present[i] == (len(rows) > 0)
        if not len(rows):
            assert not found.vectors[i].any()
            continue
        match how.kind:
            case "decayed_mean":
                counted = counted * 2.0 ** (-(at[i] - times) / parse_duration(how.half_life))
                expected = counted @ rows / counted.sum()
                assert found.weights[i] == pytest.approx(counted.sum())
            case "latest":
                expected = max((time, vector.astype("f4").tobytes(), vector) for time, vector in zip(times, rows))[2]
            case "count_sum" | "count_ema":
                counted = 0.99 ** np.arange(len(rows))[::-1]
                expected = counted @ rows / (counted.sum() if how.kind == "count_ema" else 1)
            case "convex":
                expected = rows[0]
                for since, row in zip(np.diff(times), rows[1:]):
                    expected = 2.0 ** (-since / 86_400) * expected + (1 - 2.0 ** (-since / 86_400)) * row
        np.testing.assert_allclose(found.vectors[i], expected, rtol=1e-5, atol=1e-6)


class Otherwise(World):
    """The same days, on which some impressions went otherwise: their clicks are the opposite, and upstream gave other vectors for them."""

    changed: Any

    def output(self, name: str) -> Any:
        vectors = super().output(name).copy()
        if name != worlds.LOGIT:  # of the very impression, whose click upstream never sees
            vectors[self.changed] += 1.0
        return vectors


def otherwise(world: World, changed: Any) -> World:
    other = Otherwise(world.dataset, world.folder, world.split)
    other.changed = changed
    other.impressions = replace(world.impressions, clicked=world.impressions.clicked ^ changed)
    return other


@pytest.mark.parametrize("name", [name for name, block in BLOCKS.items() if getattr(block, "source", "") not in arms.LAYERS])
def test_no_feature_depends_on_its_own_time_or_a_later_one(world: World, name: str) -> None:
    block, learnt, when = BLOCKS[name], slice(0, 300), world.downstream.event_time
    moment = when[600]
    safe = when <= moment
    before = list(downstream.features(world, block, learnt))
    later = list(downstream.features(otherwise(world, world.impressions.event_time >= moment), block, learnt))
    for part, again in zip(before, later, strict=True):
        np.testing.assert_array_equal(part[safe], again[safe])
        assert isinstance(block, arms.Now) or not np.array_equal(part[~safe], again[~safe])  # it does look at the past


def test_a_token_is_of_one_half_life(world: World) -> None:
    block, learnt = BLOCKS["cr at half-lives"], slice(0, 300)
    assert isinstance(block, arms.Memory)
    for entity, found, ever in zip(
        block.entities, downstream.features(world, block, learnt), downstream.features(world, BLOCKS["cr"], learnt)
    ):
        assert found.shape == (len(world.downstream), 4, 4 + ever.shape[1])
        for token, half_life in enumerate(block.half_lives):
            (counted,) = downstream.features(world, arms.Counters((half_life,), (entity,)), learnt)
            np.testing.assert_array_equal(found[:, token, :4], counted)
        np.testing.assert_array_equal(found[:, -1, 4:], ever)
        assert not np.array_equal(found[:, 0, 4:], ever)


def folded(world: World, space: Space, folder: Path, until: float = np.inf) -> dict[str, replay_tables.Table]:
    """The events before `until` as they are published, an impression and then its click, by `crossrep replay`'s own fold."""
    data = select(world.impressions, world.impressions.event_time < until)
    event = np.concatenate((np.arange(len(data)), np.flatnonzero(data.clicked)))
    table = {
        "event": ["impression"] * len(data) + ["click"] * int(data.clicked.sum()),
        "event_time": data.event_time[event],
        **{f"{entity}_id": [f"{entity}{key}" for key in getattr(data, entity)[event]] for entity in ("user", "item")},
        **{name: list(world.output(name)[event]) for name in ("ur", "ir", "cr")},
    }
    pq.write_table(pa.table(table), folder / "samples.parquet", row_group_size=1000)
    return replay_tables.fold(space, replay_files.of_files(str(folder), space).tasks, 2)


def record_of(table: replay_tables.Table, keys: list[str]) -> Any:
    slots = table.index.slots()
    place = {key: i for i, key in enumerate(table.index.keys(slots).tolist())}
    return table.state.records(slots)[[place[key.encode()] for key in keys]]


def test_features_computed_from_records_are_the_studys(world: World, tmp_path: Path) -> None:
    """docs/features.md's functions, on answers made of nothing but the records that its space holds at the moment."""
    shown = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "features.md").read_text(), re.DOTALL)
    assert shown
    names: dict[str, Any] = {}
    exec(compile(shown[1], "docs/features.md", "exec"), names)
    space = Space.from_dict(Space.load(ROOT / "spaces" / "kuairand-rates-v1.toml").toml_dict | {"vectors": "float32"})
    data, learnt = world.downstream, slice(0, 300)
    rates, affinity = BLOCKS["rates"], BLOCKS["affinity"]
    assert isinstance(rates, arms.Counters) and isinstance(affinity, arms.Affinity)
    expected = downstream.counters(world, rates, learnt), downstream.affinity(world, affinity)
    for row in np.linspace(400, len(data) - 1, 5).astype(int).tolist():
        at = float(data.event_time[row])
        tables = folded(world, space, tmp_path, until=at)
        answers = {}
        for entity, table in tables.items():
            key = f"{entity}{getattr(data, entity)[row]}"
            answers[entity] = answer(RecordLayout(space, entity), Keys.of([key]), np.ones(1, np.bool_), record_of(table, [key]), at, {})
        by_entity = [names["rates"](found, data.clicked[learnt].mean()).reshape(6, 4) for found in answers.values()]
        np.testing.assert_allclose(np.concatenate(by_entity, axis=1).reshape(-1), expected[0][row], rtol=1e-5, atol=1e-6)
        found = []
        for entity, other, latest in (("user", "item", "ir"), ("item", "user", "ur")):
            centre = world.output(latest)[: world.first].mean(0)
            found.append(names["affinity"](answers[entity], answers[other][latest], centre))
        np.testing.assert_allclose(np.concatenate(found, axis=1)[0], expected[1][row], rtol=1e-3, atol=1e-5 * np.abs(expected[1]).max())


def test_what_is_known_is_what_a_replay_of_the_stream_gives(world: World, tmp_path: Path) -> None:
    """The events as they are published, an impression and then its click, through `crossrep replay`'s own fold."""
    data = world.impressions
    sources = {name: world.output(name) for name in ("ur", "ir", "cr")}
    declared = {
        "cr_mean": ("cr", BLOCKS["cr"].how, None),
        "cr_shown": ("cr", BLOCKS["cr 7d"].how, ["impression"]),
        "cr_clicked": ("cr", Aggregate(half_life="1h", impression=0.0, click=3.0), ["click"]),
        "ur": ("ur", arms.LATEST, None),
        "ir": ("ir", arms.LATEST, None),
        "shown": (None, Aggregate(half_life="1d"), ["impression"]),
    }
    columns: dict[str, Any] = {}
    for name, (source, how, events) in declared.items():
        columns[name] = {"source": source or "cr", "dim": sources[source].shape[1] if source else 0, "aggregate": how.kind}
        columns[name] |= ({"half_life": how.half_life} if how.half_life else {}) | ({"events": events} if events else {})
    entities = {entity: {"columns": columns} for entity in ("user", "item")}
    weights = {"impression": 1.0, "click": 3.0}
    space = Space.from_dict({"name": "study-1", "partitions": 2, "vectors": "float32", "weights": weights, "entities": entities})
    tables = folded(world, space, tmp_path)
    after = float(data.event_time.max()) + 1.0
    for entity, table_of in tables.items():
        keys: Any = getattr(data, entity)
        asked = np.unique(keys)
        past = Past(keys, data.event_time, asked, np.full(len(asked), after))
        records = record_of(table_of, [f"{entity}{key}" for key in asked])
        assert len(records) == table_of.index.size
        for name, (source, how, _) in declared.items():
            vectors = sources[source] if source else np.empty((len(data), 0), np.float32)
            known = past.known(how, vectors, data.clicked)
            if source:
                np.testing.assert_allclose(known.vectors, records[name], atol=1e-5)
            if how.half_life:
                then = algebra.decay(records[f"{name}_weight"], after - records[f"{name}_time"], parse_duration(how.half_life))
                np.testing.assert_allclose(known.weights, then, rtol=1e-9)


def test_upstream_and_downstream_learn_from_their_days_alone(world: World) -> None:
    when = world.impressions.event_time
    assert len(world.impressions) == EVENTS < world.dataset.size  # repeats are gone
    assert (when[: world.first] < world.dataset.train_until).all() and (when[world.first :] >= world.dataset.train_until).all()
    manifest = json.loads((world.folder / "manifest.json").read_text())
    assert manifest["trained_until"] < "2022-05-02T16:00:00"
    late = World(world.dataset, world.folder, "late")
    assert late.downstream.event_time[0] >= world.dataset.train_until - 3 * worlds.DAY > late.impressions.event_time[late.first - 1]
    found = downstream.run(world, ARMS["nothing"], 2e-3, 1)
    tuned = downstream.run(world, ARMS["nothing"], 2e-3, 1, tuning=True)
    assert found["learnt"] == tuned["learnt"] + tuned["impressions"] and found["learnt"] + found["impressions"] == len(world.downstream)
    assert found["impressions"] == (when >= TEST_FROM).sum()


def test_click_rates_of_ids_are_upstreams_alone(world: World, tmp_path: Path) -> None:
    worlds.build(world.dataset, tmp_path / "rated", "authors", "rated", 1)
    rated = World(world.dataset, tmp_path / "rated", "authors")
    assert rated.model.fields.rows > rated.fields.rows and len(rated.model.fields.fields["user"]) == 2 + len(rated.fields.fields["user"])
    assert rated.fields.fields == world.fields.fields == world.model.fields.fields
    assert (rated.rows == world.rows).all() and not np.allclose(rated.output("cr"), world.output("cr"))
    nothing, told = (downstream.run(each, ARMS["nothing"], 2e-3, 1) | {"seconds": 0} for each in (world, rated))
    assert nothing == told  # so that what is paired is alike


@pytest.mark.parametrize("kind", sorted({arm.kind for arm in ARMS.values()}))
def test_every_kind_of_arm_runs(world: World, kind: str) -> None:
    arm = next(arm for arm in ARMS.values() if arm.kind == kind)
    found = downstream.run(world, arm, 2e-3, 1)
    assert 0.3 < found["auc"] < 1
    assert len(found["cosines"]) == {"attention": 1, "stacked": 3}.get(arm.module, 0)


def test_a_run_repeats_whatever_its_process_did_before(world: World) -> None:
    arm = Arm(("ur", "cr", "counters"), "attention", beside=True, frozen=3)
    fresh = World(world.dataset, world.folder, world.split)
    first, again = (downstream.run(each, arm, 2e-3, 1) | {"seconds": 0} for each in (world, fresh))
    assert first == again


def test_an_arm_sees_what_only_the_past_tells(world: World) -> None:
    nothing, counters = (downstream.run(world, ARMS[name], 4e-3, 1) for name in ("nothing", "counters"))
    assert counters["auc"] > max(0.7, nothing["auc"] + 0.1)


def test_metrics_by_hand(world: World) -> None:
    chance = np.random.default_rng(0)
    score, clicked, user = chance.random(300).round(2), chance.random(300) < 0.3, chance.integers(0, 40, 300)
    parts = [user == u for u in range(40) if 0 < clicked[user == u].sum() < (user == u).sum()]
    by_hand = sum(auc(score[part], clicked[part]) * part.sum() for part in parts) / sum(part.sum() for part in parts)
    assert metrics.gauc(score, clicked, user) == pytest.approx(by_hand)
    found = metrics.measure(score, clicked, user, np.zeros(300, np.int16), {"all": np.ones(300, np.bool_)})
    assert found["gauc_users"] == len(parts) and found["parts"]["all"] == {**found["parts"]["scenario 0"]}
    end = len(world.downstream) - 50
    few = downstream.cold(world, slice(end, None))
    data = world.impressions
    for i, at in enumerate(range(world.first + end, len(data))):
        earlier = select(data, (data.user == data.user[at]) & (data.event_time < data.event_time[at]))
        assert few["cold users"][i] == (len(earlier) < metrics.FEW) == (not few["warm users"][i])
        assert few["new users"][i] == (data.user[at] not in data.user[: world.first + end])


def test_gauc_is_below_chance_for_a_users_own_past() -> None:
    """Clicks are drawn independently, each user with a probability of his own; docs/study.md says what follows from it."""
    chance, users, each = np.random.default_rng(1), 400, 10
    user = np.tile(np.arange(users, dtype=np.int32), each)
    time = np.repeat(np.arange(each, dtype=float), users)
    clicked = chance.random(len(user)) < chance.beta(2, 3, users)[user]
    past, nothing = Past(user, time, user, time), np.empty((len(user), 0), np.float32)
    clicks = past.known(Aggregate(half_life=FOR_EVER, impression=0.0, click=1.0), nothing, clicked).weights
    rate = (clicks + 4.0) / (past.counts() + 10.0)
    assert auc(rate, clicked) > 0.6 and metrics.gauc(rate, clicked, user) < 0.35


def test_a_study_from_the_command_line_goes_on_where_it_was_cut_off(folder: Path, tmp_path: Path) -> None:
    out, scratch = tmp_path / "out", tmp_path / "scratch"
    shown = re.search(r"^    crossrep (study transfer DIR --out \S+)$", (ROOT / "docs" / "study.md").read_text(), re.MULTILINE)
    assert shown
    words = [{"DIR": str(folder), "docs/study": str(out)}.get(word, word) for word in shown[1].split()]
    words += ["--seeds", "2", "--workers", "1", "--scratch", str(scratch)]
    for name in ("CR of a random upstream", "GCA, stacked"):
        words += ["--arm", name]
    assert CliRunner().invoke(cli, words, catch_exceptions=False).exit_code == 0
    whole = (out / "runs.jsonl").read_text()
    tuned, runs = 3 * (3 + 2), 2 * (3 + 2)  # rates of the kinds, seeds of the arms; the late split does without attention
    assert len(whole.splitlines()) == tuned + runs
    tables = (out / "tables.md").read_text()
    assert "CR of a random upstream over nothing" in tables and "GCA, stacked" in tables and "not run | not run | not reached" in tables
    assert all((out / name).read_text().startswith("<?xml") for name in ("differences.svg", "cosines.svg"))
    upstreams = sorted(path.name for path in next(scratch.iterdir()).iterdir())
    assert "late-random-2" in upstreams and "authors-dual-0" in upstreams and "authors-random-0" not in upstreams

    (out / "runs.jsonl").write_text(whole.rpartition('{"data"')[0][:-30])  # without the last, and killed while it wrote the one before
    assert CliRunner().invoke(cli, words, catch_exceptions=False).exit_code == 0
    again = [json.loads(line) | {"seconds": 0} for line in (out / "runs.jsonl").read_text().splitlines()]
    assert again == [json.loads(line) | {"seconds": 0} for line in whole.splitlines()]
    refused = CliRunner().invoke(cli, [*words, "--arm", "everything"])
    assert refused.exit_code == 2 and "'everything' is none of: nothing; CR; " in refused.output


def test_features_are_on_a_common_scale_also_of_units_that_were_off() -> None:
    vectors = np.random.default_rng(0).normal(3.0, 5.0, (200, 3)).astype(np.float32)
    vectors[:100, 2] = 0.0
    present = np.arange(200) % 4 > 0
    found = downstream.scaled(vectors, present, slice(0, 100))
    np.testing.assert_allclose(found[:100][present[:100], :2].mean(0), 0.0, atol=1e-5)
    np.testing.assert_allclose(found[:100][present[:100], :2].std(0), 1.0, atol=1e-5)
    assert not found[~present].any() and abs(found[100:, 2]).max() == downstream.FAR
