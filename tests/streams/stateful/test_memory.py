"""What a fold worker's slots are by default: what the memory suffices for."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from crossrep.spec import Space
from streams.stateful.fold_options import FoldOptions
from streams.stateful.memory import installed, memory_bound, slots_within

SPACE = Space.parse("""
name = "memory"
partitions = 4
[entities.user.columns]
cr = { source = "cr", dim = 64, aggregate = "decayed_mean", half_life = "3d" }
""")
OPTIONS = FoldOptions("w0", Path("unused"))


def bound(slots: int) -> int:
    return sum(memory_bound(SPACE, FoldOptions("w0", Path("unused"), slots=slots)).values())


@pytest.mark.parametrize("gib", [4, 6, 12, 100])
def test_slots_are_doubled_while_the_bound_holds(gib: int) -> None:
    slots = slots_within(SPACE, OPTIONS, gib << 30)
    assert slots % OPTIONS.slots == 0
    assert bound(slots) <= gib << 30 < bound(2 * slots)


def test_little_memory_gives_the_least_slots() -> None:
    assert slots_within(SPACE, OPTIONS, 1 << 30) == OPTIONS.slots


def test_installed_memory_is_positive_and_no_more_than_the_machines() -> None:
    assert 1 << 28 < installed() <= psutil.virtual_memory().total
