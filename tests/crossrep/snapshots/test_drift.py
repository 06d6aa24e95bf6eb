"""What moved between two snapshots, against numpy's sums over the same records."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from crossrep.cli import cli
from crossrep.columnar.records import RecordLayout
from crossrep.errors import DataError
from crossrep.snapshots.drift import drift, plot, table
from crossrep.snapshots.store import Store
from tests.cluster import new_space
from tests.crossrep.snapshot_world import Changelog, rows, snapshot


def test_what_came_went_and_turned(bootstrap: str, tmp_path: Path) -> None:
    space, _ = new_space(bootstrap, tmp_path, partitions=2)
    store, log = Store(str(tmp_path / "s"), space.name), Changelog(space, bootstrap)
    log.put("user", [f"u{i}" for i in range(11_000)], 1)
    first = snapshot(space, bootstrap, store)
    log.put("user", [f"u{i}" for i in range(100)], 2)
    log.delete("user", [f"u{i}" for i in range(200, 250)])
    log.put("user", [f"new{i}" for i in range(30)], 3)
    log.put("item", ["i"], 4)
    second = snapshot(space, bootstrap, store)
    found = {(moved.entity, moved.column): moved for moved in drift(store, first, second)}
    assert list(found) == [("user", "cr"), ("user", "ur"), ("user", "clicks"), ("item", "cr"), ("item", "ir")]

    layout = RecordLayout(space, "user")
    a, b = ({k: layout.decode([v])[0] for k, v in rows(store, manifest, "user").items()} for manifest in (first, second))
    both = sorted(a.keys() & b.keys())
    cr, ur, clicks = (found["user", name] for name in ("cr", "ur", "clicks"))
    assert (cr.a.rows, cr.b.rows, cr.came, cr.gone, cr.changed) == (11_000, 10_980, 30, 50, 100)
    assert (ur.a.covered, ur.b.covered, ur.changed) == (11_000, 10_980, 100)
    for name, moved in (("cr", cr), ("ur", ur)):
        for side, held in ((moved.a, a), (moved.b, b)):
            vectors = np.stack([record[name] for record in held.values()]).astype(np.float64)
            np.testing.assert_allclose(side.mean, vectors.mean(axis=0), atol=1e-12)
            np.testing.assert_allclose(np.sort(side.norms), np.sort(np.linalg.norm(vectors, axis=1)), rtol=1e-9)
        x, y = (np.stack([held[key][name] for key in both]).astype(np.float64) for held in (a, b))
        cosines = (x * y).sum(axis=1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
        np.testing.assert_allclose(np.sort(moved.cosines), np.sort(cosines), atol=1e-9)
        assert moved.mean_shift == pytest.approx(np.linalg.norm(moved.b.mean - moved.a.mean) / np.linalg.norm(moved.a.mean))
        assert 0.8 < moved.mean_cosine < 1
    assert clicks.a.covered == sum(record["clicks_weight"] > 0 for record in a.values()) and len(clicks.a.mean) == 0
    assert found["item", "cr"].a.covered == 0 and found["item", "cr"].came == 1 and np.isnan(found["item", "cr"].mean_cosine)

    same = drift(store, first, first)[0]
    assert (same.came, same.gone, same.changed, same.mean_shift) == (0, 0, 0, 0) and same.mean_cosine == pytest.approx(1)
    assert table(list(found.values())).row_count == 5
    for ending in ("png", "svg"):
        plot(list(found.values()), first, second, str(tmp_path / f"drift.{ending}"))
        assert (tmp_path / f"drift.{ending}").stat().st_size > 5_000
    for path in ("none/x.png", "x.unknown"):
        with pytest.raises(DataError, match="cannot be written"):
            plot(list(found.values()), first, second, str(tmp_path / path))

    environment = {"CROSSREP_SPACE": space.name, "CROSSREP_SNAPSHOTS": store.url}
    for command in (["drift"], ["drift", first.id], ["drift", first.id, second.id]):
        shown = CliRunner().invoke(cli, command, env=environment, catch_exceptions=False).output
        assert f"{first.id} → {second.id}" in shown and "11,000 → 10,980" in shown
    store.retain(1)
    assert "two are needed" in str(CliRunner().invoke(cli, ["drift"], env=environment).exception)
    with pytest.raises(DataError, match="different specs"):
        drift(store, first.model_copy(update={"spec_hash": "0"}), second)
