"""SQL over snapshots: its answers against numpy's over the same records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from crossrep.cli import cli
from crossrep.columnar import algebra
from crossrep.columnar.records import RecordLayout
from crossrep.errors import CrossrepError
from crossrep.keys import Keys
from crossrep.snapshots import sql
from crossrep.snapshots.store import Manifest, Store
from crossrep.spec import Space
from tests.cluster import SPEC, new_space
from tests.crossrep.snapshot_world import Changelog, rows, snapshot, some_rows

AT, HALF_LIFE = 1.6015e9, 3600.0
IDS: list[Any] = [*(f"u{i}" for i in range(997)), "o'hara", "ü", b"\xff"]


@pytest.fixture(scope="module")
def world(bootstrap: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Space, Store, list[Manifest]]:
    """Two snapshots: between them some users came, one went, one changed."""
    folder = tmp_path_factory.mktemp("it's a folder")
    space, _ = new_space(bootstrap, folder)
    store, log = Store(str(folder / "snapshots"), space.name), Changelog(space, bootstrap)
    log.put("user", IDS, 1)
    taken = [snapshot(space, bootstrap, store)]
    log.put("user", ["new", "u1"], 2)
    log.delete("user", ["u2"])
    return space, store, [*taken, snapshot(space, bootstrap, store)]


def records(world: tuple[Space, Store, list[Manifest]], which: int) -> tuple[list[str], np.ndarray[Any, Any]]:
    space, store, taken = world
    found = rows(store, taken[which], "user")
    return [key.decode(errors="backslashreplace") for key in found], RecordLayout(space, "user").decode(list(found.values()))


def ask(world: tuple[Space, Store, list[Manifest]], query: str, which: int = -1) -> list[tuple[Any, ...]]:
    _, store, taken = world
    answer = sql.ask(store, taken[which], query)
    return [row for batch in sql.batches(answer, taken[which]) for row in zip(*(column.to_pylist() for column in batch.columns))]


def test_views_hold_what_the_records_say(world: tuple[Space, Store, list[Manifest]]) -> None:
    for which in (0, 1):
        ids, held = records(world, which)
        found = {
            row[0]: row[1:] for row in ask(world, "select id, count, epoch(cr_time), cr, cr_weight, ur, clicks_weight from user", which)
        }
        assert found.keys() == set(ids) and "o'hara" in found and "\\xff" in found
        for id, record in zip(ids, held):
            count, time, cr, weight, ur, clicks = found[id]
            assert (count, cr, weight, ur) == (record["count"], record["cr"].tolist(), record["cr_weight"], record["ur"].tolist())
            assert clicks == record["clicks_weight"] and abs(time - record["cr_time"]) <= 1e-6
    assert ask(world, "select count(*), sum(count) from item") == [(0, None)]
    assert ask(world, "select count(*) from user where clicks_time is null") == [(int((records(world, 1)[1]["clicks_weight"] == 0).sum()),)]


def test_cosine(world: tuple[Space, Store, list[Manifest]]) -> None:
    ids, held = records(world, 1)
    vectors, target = held["cr"].astype(np.float64), held["cr"][ids.index("u7")].astype(np.float64)
    expected = vectors @ target / np.linalg.norm(vectors, axis=1) / np.linalg.norm(target)
    found = dict(ask(world, "select a.id, cosine(a.cr, b.cr) from user a, user b where b.id = 'u7'"))
    np.testing.assert_allclose([found[id] for id in ids], expected, atol=1e-5)
    assert ask(world, "select cosine([1, 0], [1, 1.0]), cosine([0, 0], [1, 1]), cosine(null, [1, 1])") == [
        (pytest.approx(0.5**0.5), 0.0, None)
    ]


def test_confidence_is_the_algebras_decay(world: tuple[Space, Store, list[Manifest]]) -> None:
    ids, held = records(world, 1)
    query = "select id, confidence(cr_weight, cr_time, to_timestamp({at}), half_life('user.cr')) from user"
    for at in (AT, 1.6e9, held["cr_time"].max()):  # also an older clock, which leaves the weight whole
        expected = algebra.decay(held["cr_weight"], at - held["cr_time"], HALF_LIFE)
        found = dict(ask(world, query.format(at=repr(float(at)))))
        np.testing.assert_allclose([found[id] for id in ids], expected, rtol=1e-9)
    clicks = dict(ask(world, "select id, confidence(clicks_weight, clicks_time, '2030-01-01', half_life('user.clicks')) from user"))
    assert all(clicks[id] == 0 for id, record in zip(ids, held) if not record["clicks_weight"])
    assert ask(world, "select half_life('user.cr'), half_life('item.cr')") == [(3600.0, 172_800.0)]
    with pytest.raises(CrossrepError, match=r"no half-life of user.ur; there are user.cr, user.clicks, item.cr"):
        ask(world, "select half_life('user.ur')")
    with pytest.raises(CrossrepError, match="confidence"):  # of three half-lives none is the space's
        ask(world, "select confidence(cr_weight, cr_time, now()) from user")


def test_one_half_life_need_not_be_named(bootstrap: str, tmp_path: Path) -> None:
    spec = SPEC.replace('"1d"', '"1h"').replace('"2d"', '"1h"').replace("entities.item", "entities.order")
    space, _ = new_space(bootstrap, tmp_path, spec, partitions=1)
    Changelog(space, bootstrap).put("order", ["a"], 1)
    store = Store("memory://sql", space.name)  # read through fsspec
    taken = snapshot(space, bootstrap, store)
    world = (space, store, [taken])
    ((three, four),) = ask(
        world, "select confidence(cr_weight, cr_time, now()), confidence(cr_weight, cr_time, now(), half_life('order.cr')) from \"order\""
    )
    assert three == four
    keys, held = some_rows(space, "order", ["a"], 1)
    assert ask(world, 'select id, cr, source_offset from "order"') == [(keys.tolist()[0].decode(), held["cr"][0].tolist(), 1)]
    assert Keys.of(["a"]).tolist() == keys.tolist()


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ("drop view user", "DROP is no query"),
        ("copy user to 'x.csv'", "COPY is no query"),
        ("select 1; select 2", "SELECT and SELECT is no query"),
        ("", "nothing is no query"),
        ("selec 1", "syntax error"),
        ("select vector from user", 'Referenced column "vector" not found'),
        ("select * from users", r"(?s)users does not exist.*has the views user, item; what one holds: crossrep sql 'describe user'"),
        ("select cosine(cr, ur) from user", "dimensions must be equal"),
    ],
)
def test_what_is_not_understood_is_explained(world: tuple[Space, Store, list[Manifest]], query: str, reason: str) -> None:
    with pytest.raises(CrossrepError, match=reason):
        ask(world, query)


def test_the_command(world: tuple[Space, Store, list[Manifest]], tmp_path: Path) -> None:
    space, store, taken = world

    def run(query: str, *more: str) -> Result:
        environment = {"CROSSREP_SPACE": space.name, "CROSSREP_SNAPSHOTS": store.url, "KAFKA_BOOTSTRAP": "nowhere:1"}
        return CliRunner().invoke(cli, ["sql", query, *more], env=environment)

    newest = "select id, count, ur, ur_time from user where id = 'new'"
    shown = run(newest)
    assert shown.exit_code == 0 and "new" in shown.output and "2020-09-" in shown.output and ", …" not in shown.output
    assert "new" not in run(newest, "--snapshot", taken[0].id).output.splitlines()[-1]
    (line,) = run(newest, "--format", "json").output.splitlines()
    keys, held = some_rows(space, "user", ["new", "u1"], 2)
    assert json.loads(line)["ur"] == held["ur"][0].tolist() and json.loads(line)["count"] == 3 and keys.tolist()[0] == b"new"
    header, line = run(newest, "--format", "csv").output.splitlines()
    assert header == "id,count,ur,ur_time" and line.startswith('new,3,"[')
    assert len(run("select * from user", "--format", "csv").output.splitlines()) == 1001
    assert "and 800 rows more" in run("select id from user").output
    assert run("explain select 1").exit_code == 0 and "cr_weight" in run("describe user").output
    assert run(newest, "--format", "parquet").exit_code == 2
    assert run(newest, "--format", "parquet", "--out", str(tmp_path / "x.parquet")).exit_code == 0
    assert pq.read_table(tmp_path / "x.parquet")["ur"].to_pylist() == [held["ur"][0].tolist()]
    assert run(newest, "--out", str(tmp_path / "x.txt")).output == "" and "new" in (tmp_path / "x.txt").read_text()
    for format in ("csv", "parquet"):
        wrong = run(newest, "--format", format, "--out", str(tmp_path / "none" / "x"))
        assert isinstance(wrong.exception, CrossrepError) and "cannot be written" in str(wrong.exception)
    missing = run(newest, "--snapshot", "20200101T000000.000000Z")
    assert "known: " + taken[0].id in str(missing.exception)
