"""What a reader does about a promotion that is taken back, or cannot be followed now. How long a space loads is the test's to say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from crossrep.errors import CrossrepError
from crossrep.rollout.promoting import promote
from crossrep.spec import Space
from crossrep.views import switch
from crossrep.views.switch import Switcher
from tests.cluster import new_space, wait_for


class Held:
    """A space as a reader holds it, caught up when the test says so."""

    def __init__(self, space: Space, caught_up: bool = False):
        self.space, self.caught_up, self.closed = space, caught_up, False

    def close(self) -> None:
        self.closed = True


class Reader:
    """Follows an alias, from the first of two spaces on."""

    def __init__(self, bootstrap: str, folder: Path):
        (self.first, _), (self.second, _) = (new_space(bootstrap, folder, partitions=1) for _ in range(2))
        self.alias, self.bootstrap = f"now-{self.first.name}", bootstrap
        self.promote(self.first)
        self.held, self.opened, self.refusals = Held(self.first, True), list[Held](), 0
        self.switcher = Switcher(self.alias, bootstrap, lambda: self.held, self._load, self._switch)

    def promote(self, space: Space) -> None:
        promote(self.alias, space.name, self.bootstrap)

    def _load(self, space: Space) -> Held:
        if self.refusals:
            self.refusals -= 1
            raise CrossrepError("no room")
        self.opened.append(Held(space))
        return self.opened[-1]

    def _switch(self, fresh: Held) -> Held:
        former, self.held = self.held, fresh
        return former


@pytest.fixture
def reader(bootstrap: str, tmp_path: Path) -> Iterator[Reader]:
    reader = Reader(bootstrap, tmp_path)
    yield reader
    reader.switcher.close()


def test_what_is_rolled_back_while_it_loads_is_dropped(reader: Reader) -> None:
    reader.promote(reader.second)
    wait_for(lambda: len(reader.opened) == 1, "the second is being loaded")
    assert reader.switcher.loading == reader.second.name
    reader.promote(reader.first)
    (dropped,) = reader.opened
    wait_for(lambda: dropped.closed, "it is dropped before it has caught up", 10)
    dropped.caught_up = True
    assert reader.held.space == reader.first and not reader.held.closed and reader.switcher.loading is None
    reader.switcher.check()


def test_what_cannot_be_loaded_is_tried_again(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(switch, "RETRY", 0.1)
    reader.refusals, former = 2, reader.held
    reader.promote(reader.second)
    wait_for(lambda: reader.switcher.problem is not None, "it says why it cannot")
    with pytest.raises(
        CrossrepError, match=rf"'{reader.second.name}' now, which cannot be loaded: no room. '{reader.first.name}' is answered"
    ):
        reader.switcher.check()
    wait_for(lambda: bool(reader.opened), "it is tried again", 10)
    assert reader.held is former and not former.closed
    reader.opened[0].caught_up = True
    wait_for(lambda: reader.held.space == reader.second and former.closed, "it has gone along, and let go of the former", 10)
    wait_for(lambda: reader.switcher.problem is None, "nothing is wrong any more", 10)
