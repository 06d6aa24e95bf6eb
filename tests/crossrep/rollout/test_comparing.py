"""Two spaces side by side, on records whose coverage and neighbourhoods are known; and the names that stand for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from confluent_kafka import TopicPartition

from crossrep import CrossrepError, FrameWriter, LocalView, SpaceError, SpecError, kafka
from crossrep.cli import cli
from crossrep.columnar.records import RecordLayout
from crossrep.control import spaces, workers
from crossrep.keys import Keys
from crossrep.rollout import comparing, promoting
from crossrep.rollout.promoting import promote
from crossrep.spec import Space, samples_group
from streams import topics
from tests.cluster import SPEC, new_space
from tests.crossrep.snapshot_world import Changelog

USERS, DAY = 400, 86_400.0
NOW = 1.7e9


def put(space: Space, bootstrap: str, ids: list[int], vectors: np.ndarray[Any, Any], weight: float, time: float) -> None:
    """A record for each id and entity: weight and time alike, cr as given."""
    log = Changelog(space, bootstrap)
    for entity in space.entities:
        records = RecordLayout(space, entity).empty(len(ids))
        records["count"], records["event_time"] = 2, time
        for name in set(records.dtype.names or ()) & {"ur_time", "ir_time", "clicks_time"}:
            records[name] = -np.inf  # no event has touched them
        records["cr_weight"], records["cr_time"], records["cr"] = weight, time, vectors
        log.send(entity, [(key, record.tobytes()) for key, record in zip(Keys.of(ids).tolist(), records)])


@pytest.fixture(scope="module")
def pair(bootstrap: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Space, Space]:
    """The second has one user in twenty less, all vectors turned, half the weight, and is a day ahead."""
    folder = tmp_path_factory.mktemp("pair")
    first, second = (new_space(bootstrap, folder, partitions=number)[0] for number in (2, 3))
    random = np.random.default_rng(0)
    vectors = random.normal(size=(USERS, 8)).astype("f4")
    turn, _ = np.linalg.qr(random.normal(size=(8, 8)))
    kept = [id for id in range(USERS) if id % 20]
    put(first, bootstrap, list(range(USERS)), vectors, 4.0, NOW)
    put(second, bootstrap, kept, (vectors @ turn).astype("f4")[kept], 2.0, NOW + 2 * DAY)
    return first, second


def run(bootstrap: str, *words: str) -> Any:
    return CliRunner().invoke(cli, words, env={"KAFKA_BOOTSTRAP": bootstrap})


def test_coverage_weights_and_neighbours(bootstrap: str, pair: tuple[Space, Space]) -> None:
    first, second = pair
    done = run(bootstrap, "space", "compare", first.name, second.name, "--json", "--sample", "150")
    assert done.exit_code == 0, (done.output, done.exception)
    said = json.loads(done.stdout)
    assert (said["a"], said["b"], said["missing"], said["behind"]) == (first.name, second.name, [], {first.name: {}, second.name: {}})
    user, item = said["entities"]
    assert (user["a"]["keys"], user["b"]["keys"], user["both"], user["coverage"]) == (USERS, 380, 380, 0.95)
    assert (user["a"]["events"], user["b"]["stream_time"]) == (2 * USERS, NOW + 2 * DAY)
    cr = item["columns"][0]
    assert cr["name"] == "cr" and cr["covered"] == [USERS, 380] and cr["sampled"] == 150
    np.testing.assert_allclose(cr["weights"], [[2.0] * 3] * 2)  # the half-life of items is two days: four becomes two
    assert cr["overlap"] > 0.99 and cr["by_chance"] == 10 / 379  # turning a space as a whole changes no neighbour
    ur = next(column for column in user["columns"] if column["name"] == "ur")
    assert ur["covered"] == [0, 0] and ur["overlap"] is None and ur["weights"] == [None, None]
    table = run(bootstrap, "space", "compare", first.name, second.name)
    assert table.exit_code == 0 and "95.00%" in table.output and "400 → 380" in table.output


def test_vectors_that_have_nothing_in_common_share_neighbours_by_chance_alone(bootstrap: str, tmp_path: Path) -> None:
    first, second = (new_space(bootstrap, tmp_path, SPEC.replace("dim = 8", f"dim = {dim}"))[0] for dim in (8, 12))
    random = np.random.default_rng(1)
    for space, dim in ((first, 8), (second, 12)):
        put(space, bootstrap, list(range(USERS)), random.normal(size=(USERS, dim)).astype("f4"), 1.0, NOW)
    published = [spaces.find(space.name, bootstrap) for space in (first, second)]
    user, _ = comparing.compare(published[0], published[1], bootstrap)
    overlap = user.columns[0].overlap
    assert overlap is not None and user.columns[0].by_chance is not None
    assert abs(overlap - user.columns[0].by_chance) < 0.015  # 2,000 draws: five standard deviations
    assert comparing.compare(published[0], published[1], bootstrap)[0] == user  # seeded
    assert "user.cr has 12 dims, not 8" in comparing.missing(first, second)
    assert promoting.objections(published[0], published[1], bootstrap) == [
        f"{second.name}: {entity}.{column} has 12 dims, not 8" for entity in ("user", "item") for column in ("cr",)
    ]


def test_promote_says_what_speaks_against_it(bootstrap: str, pair: tuple[Space, Space], monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (space.name for space in pair)
    alias = f"current-{first}"
    assert run(bootstrap, "space", "promote", first, "--as", alias).exit_code == 0
    refused = run(bootstrap, "space", "promote", second, "--as", alias)
    assert refused.exit_code == 1 and f"{second}: it has 380 of the 400 user keys of {first}: 95.0%" in refused.stderr
    assert spaces.resolve(alias, bootstrap).space.name == first
    forced = run(bootstrap, "space", "promote", second, "--as", alias, "--yes")
    assert forced.exit_code == 0 and f"promote {first} --as {alias} --yes" in forced.output.replace("\n", " ")
    back = run(bootstrap, "space", "promote", first, "--as", alias)  # the former one has all keys
    assert back.exit_code == 0, back.output
    shown = [line.split()[0] for line in run(bootstrap, "space", "show", alias).output.splitlines()]
    assert shown == [alias, "space", first, second, first]
    listed = run(bootstrap, "space", "list").output
    assert any(line.split()[:2] == [first, alias] for line in listed.splitlines())
    assert run(bootstrap, "space", "show", first).exit_code == 0

    with FrameWriter(second, name=f"{second}-writer", bootstrap=bootstrap) as writer:  # and nobody folds it
        writer.write("user", ["1"], event="impression", times=[NOW], sources={"cr": np.ones((1, 8)), "ur": np.ones((1, 4))})
        writer.commit()
    published = spaces.find(second, bootstrap)
    monkeypatch.setattr(promoting, "CAUGHT_UP_WITHIN", 0.5)
    (behind,) = promoting.objections(None, published, bootstrap)
    assert behind.startswith(f"{second}: its fold workers are behind")


def test_samples_workers_are_behind_by_what_they_have_to_join_and_hold_up_no_promotion(bootstrap: str, pair: tuple[Space, Space]) -> None:
    """Their group commits the oldest events that it still needs, and beside these where it is."""
    space, _ = pair
    producer = kafka.producer(bootstrap)
    for number in range(10):
        producer.produce(space.inputs.impressions, b"%d" % number, partition=1)
        producer.produce(space.inputs.clicks, b"%d" % number, partition=1)
    assert producer.flush(30) == 0
    said = json.dumps({"positions": [7, 4], "open": True, "marks": {}})
    worker = kafka.consumer(bootstrap, samples_group(space))
    offsets = [TopicPartition(space.inputs.impressions, 1, 2, said), TopicPartition(space.inputs.clicks, 1, 1)]
    worker.commit(offsets=offsets, asynchronous=False)
    worker.close()
    found = workers.standings(space, bootstrap)["samples"]
    assert found.used and found.committed == {(space.inputs.impressions, 1): 7, (space.inputs.clicks, 1): 4} and found.lag == 3 + 6
    assert run(bootstrap, "space", "show", space.name).output.splitlines()[-2].split() == [space.name, "samples", "nobody", "9"]
    assert any("0 samples" in line and "9 samples" in line for line in run(bootstrap, "space", "list").output.splitlines())
    assert not workers.falls_behind(space, bootstrap, 0.0)


def test_a_name_is_a_space_or_stands_for_one(bootstrap: str, pair: tuple[Space, Space], tmp_path: Path) -> None:
    first, second = pair
    alias = f"called-{first.name}"
    with pytest.raises(SpaceError, match="no space"):
        LocalView("user", alias, bootstrap)
    with pytest.raises(SpaceError, match="no space"):
        promote(alias, "nobody", bootstrap)
    with pytest.raises(SpaceError, match="is a space"):
        promote(second.name, first.name, bootstrap)
    assert promote(alias, first.name, bootstrap) is None and promote(alias, second.name, bootstrap) == first.name
    spec = tmp_path / "alias.toml"
    spec.write_text(SPEC.format(name=alias, partitions=1))
    with pytest.raises(SpaceError, match="no free name"):
        topics.create(Space.load(spec), bootstrap, 1)
    for writes in (lambda: FrameWriter(alias, name="w", bootstrap=bootstrap), lambda: spaces.find(alias, bootstrap)):
        with pytest.raises(SpaceError, match=f"stands for '{second.name}' now"):
            writes()
    with pytest.raises((SpaceError, SpecError)):  # as an older crossrep reads it: one bad name, and all others are fine
        spaces.decode(alias, spaces.read_all(bootstrap)[alias])
    got = run(bootstrap, "get", "user", "1", "--space", alias)
    assert got.exit_code == 0 and second.name in got.output


def test_two_promotions_at_once(bootstrap: str, pair: tuple[Space, Space]) -> None:
    """The one that began first is refused: it decided on what is not so any more."""
    first, second = (space.name for space in pair)
    alias = f"both-{first}"

    def meanwhile(published: dict[str, bytes]) -> dict[str, bytes | None]:
        promote(alias, second, bootstrap)
        return {alias: spaces.promoted(published, alias, first, bootstrap)}

    with pytest.raises(CrossrepError, match="repeat"):
        spaces.change(bootstrap, meanwhile)
    assert [each.space for each in spaces.aliases(spaces.read_all(bootstrap))[alias].history] == [second]
