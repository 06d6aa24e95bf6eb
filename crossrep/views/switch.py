"""Going along with an alias: what stands behind it now is loaded beside what was, and takes its place in one step."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from crossrep.control import spaces
from crossrep.control.spaces import SPACES_TOPIC
from crossrep.errors import CrossrepError, SpaceError
from crossrep.spec import Space
from crossrep.views.follow import Follower

log = logging.getLogger(__name__)

LOOK_EVERY = 0.05  # seconds
RETRY = 5.0  # seconds after which a space that cannot be loaded is tried again; doubles up to
RETRY_AT_MOST = 300.0
CLOSE_TIMEOUT = 5.0  # seconds


class Loaded(Protocol):
    """A space as a reader holds it."""

    space: Space

    @property
    def caught_up(self) -> bool:
        """Raises CrossrepError if it cannot go on."""

    def close(self) -> object: ...


L = TypeVar("L", bound=Loaded)


class Switcher(Generic[L]):
    """A thread that loads the space an alias was promoted to, and replaces the reader's by it once it has caught up.

    What cannot be loaded is tried again, ever more seldom, and `problem` says why; the former goes on meanwhile.

    Args:
        now: what the reader holds.
        load: opens a space. Raises CrossrepError: it does not fit this reader, or cannot be had now.
        switch: puts the new one in the place of the former. What it returns, the former, is closed then.
    """

    def __init__(self, alias: str, bootstrap: str, now: Callable[[], L], load: Callable[[Space], L], switch: Callable[[L], L]):
        self.alias = alias
        self.problem: str | None = None
        self.loading: str | None = None  # the space that is being loaded
        self._bootstrap, self._now, self._load, self._switch = bootstrap, now, load, switch
        self._published: dict[str, bytes] = {}
        self._promotion: str | None = None  # the space that was promoted last; None: nobody has said yet, or the alias is gone
        self._stopped = threading.Event()
        self._follower = Follower(SPACES_TOPIC, self._apply, bootstrap)
        self._thread = threading.Thread(target=self._run, name=f"switch {alias}", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise CrossrepError if what was promoted cannot be loaded, or nobody hears of promotions any more."""
        self._follower.check()
        if self.problem is not None:
            raise CrossrepError(self.problem)

    def close(self) -> None:
        """Load nothing any more."""
        self._stopped.set()
        self._thread.join(CLOSE_TIMEOUT)
        self._follower.close()

    def _apply(self, names: list[bytes], values: list[bytes | None]) -> None:
        published = dict(self._published)
        for name, value in zip(names, values):
            published.pop(name.decode(errors="replace"), None)
            if value is not None:
                published[name.decode(errors="replace")] = value
        self._published = published  # replaced, never changed: the other thread looks at it
        alias = spaces.aliases(published).get(self.alias)
        self._promotion = None if alias is None else alias.space

    def _promoted(self) -> str:
        """The space behind the alias; the one that is held where nobody says."""
        try:
            if self._follower.caught_up and self._promotion is not None:
                return self._promotion
        except CrossrepError as error:
            self.problem = f"promotions of {self.alias!r} are not heard of any more: {error}"
        return self._now().space.name

    def _run(self) -> None:
        tried, again, patience = "", 0.0, RETRY
        while not self._stopped.wait(LOOK_EVERY):
            wanted = self._promoted()
            if wanted == self._now().space.name:
                if tried:  # rolled back
                    tried, self.problem = "", None
                continue
            if wanted != tried:
                tried, again, patience = wanted, 0.0, RETRY
            if time.monotonic() < again:
                continue
            try:
                self._go_along(wanted)
                tried, self.problem = "", None
            except Exception as error:
                held = self._now().space.name
                problem = f"{self.alias!r} is {wanted!r} now, which cannot be loaded: {error}. {held!r} is answered still"
                if problem != self.problem:
                    log.log(logging.WARNING if isinstance(error, CrossrepError) else logging.ERROR, "%s", problem, exc_info=error)
                self.problem = problem
                again, patience = time.monotonic() + patience, min(2 * patience, RETRY_AT_MOST)
            finally:
                self.loading = None

    def _go_along(self, wanted: str) -> None:
        """Load and switch, unless something else is promoted meanwhile, or the reader is closed."""
        log.info("%s is %s now: loading it beside %s", self.alias, wanted, self._now().space.name)
        began, self.loading = time.monotonic(), wanted
        published = self._published.get(wanted)
        if published is None:
            raise SpaceError(f"no space {wanted!r} is published")
        found = spaces.decode(wanted, published)
        spaces.refuse_retiring(found)
        fresh = self._load(found.space)
        try:
            while True:
                if self._stopped.is_set() or self._promoted() != wanted:
                    fresh.close()
                    return
                if fresh.caught_up:
                    break
                self._stopped.wait(LOOK_EVERY)
        except BaseException:
            fresh.close()
            raise
        former = self._switch(fresh)
        log.info("%s: switched from %s to %s after %.1f s", self.alias, former.space.name, wanted, time.monotonic() - began)
        former.close()


def aliased(name: str, bootstrap: str) -> tuple[Space, bool]:
    """The space of that name, or behind an alias of that name, and whether it is an alias.

    Raises:
        SpaceError: there is neither, or it is being retired.
        CrossrepError: the cluster does not answer.
    """
    found = spaces.resolve(name, bootstrap)
    return found.space, found.space.name != name
