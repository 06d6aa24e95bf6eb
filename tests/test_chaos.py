"""The short selection of `make chaos`: the kinds of fault that no other test injects, in a world with a broker of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos import faults, run
from tests.chaos.world import World

SEED = 4
KINDS = ["scale", "all-killed", "broker-pause"]


def test_nothing_is_lost_or_counted_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "BROKER_PAUSE", 5.0)  # longer than every session
    run.log_to(tmp_path / "chaos.log")
    result = run.Result()
    with World(tmp_path, rate=300, seed=SEED, infers=1, clocks={"f1": 7 * faults.HOUR, "i0": -7 * faults.HOUR}) as world:
        run.run(world, SEED, KINDS, check_every=len(KINDS), result=result)
        assert not result.differences, f"{dict(result.differences)}; logs in {tmp_path}"
        assert result.faults == len(KINDS) and result.proofs == 1
        assert world.load.poison and world.load.late and world.observer.records


def test_a_seed_stands_for_one_sequence_that_has_every_kind_of_fault() -> None:
    kinds = [name for name in faults.FAULTS if name not in faults.SEVERAL]
    chosen = run.plan(1, 3 * len(kinds))
    assert chosen == run.plan(1, 3 * len(kinds)) != run.plan(2, 3 * len(kinds))
    assert all(set(chosen[start : start + len(kinds)]) == set(kinds) for start in range(0, len(chosen), len(kinds)))
    assert set(run.plan(1, 100, brokers=3)) == set(faults.FAULTS)
    assert run.plan(1, 3, only=["clock"]) == ["clock"] * 3
