"""Telling others what changes in a view: callbacks, and asynchronous iteration."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass

from crossrep.errors import CrossrepError

log = logging.getLogger(__name__)

CHECK_EVERY = 0.5  # seconds in which an iterator that waits learns that its view has ended


@dataclass(frozen=True)
class Changes:
    """Ids whose records changed together; a look-up already shows it, or what is newer still. Unpacks as `updated, deleted`."""

    updated: list[str]  # have a new record
    deleted: list[str]  # were held, and are gone
    space: str  # that they are of
    switched: bool = False  # the view went over to that space: all it holds is in `updated`, what only the former held in `deleted`

    def __iter__(self) -> Iterator[list[str]]:
        return iter((self.updated, self.deleted))


Callback = Callable[[Changes], object]


class Subscribers:
    """Callbacks of a view, told one after the other, in order."""

    def __init__(self) -> None:
        self.lock = threading.RLock()  # a callback may subscribe others, or end itself
        self._callbacks: list[Callback] = []
        self._error: BaseException | None = None

    def add(self, callback: Callback, held: Callable[[], tuple[str, list[str]]]) -> Callable[[], None]:
        """See `LocalView.subscribe`; `held` gives the space, and every id held by now."""
        with self.lock:
            space, ids = held()
            callback(Changes(ids, [], space))
            self._callbacks.append(callback)

        def end() -> None:
            with self.lock:
                if callback in self._callbacks:
                    self._callbacks.remove(callback)

        return end

    def tell(self, updated: list[bytes], deleted: list[bytes], space: str, still: Callable[[], bool]) -> None:
        """Call every one, if the view `still` answers from this space; one that raises has missed a change, and is not called again."""
        with self.lock:
            if self._callbacks and (updated or deleted) and still():
                came, gone = ([name.decode(errors="replace") for name in names] for names in (updated, deleted))
                self._call(Changes(came, gone, space))

    def switched(self, space: str, former: Callable[[], list[str]], fresh: Callable[[], list[str]]) -> None:
        """The view has gone over to `space`; called with the lock held."""
        if self._callbacks:
            held = fresh()
            self._call(Changes(held, list(set(former()) - set(held)), space, switched=True))

    def _call(self, changes: Changes) -> None:
        for callback in list(self._callbacks):
            try:
                callback(changes)
            except Exception as error:
                log.exception("%r failed and is not told of changes any more", callback)
                self._callbacks.remove(callback)
                self._error = self._error or error

    def check(self) -> None:
        """Raise CrossrepError if a callback has failed."""
        if self._error is not None:
            raise CrossrepError(f"a callback for changes has failed and is not called any more: {self._error!r}") from self._error


async def iterate(subscribe: Callable[[Callback], Callable[[], None]], check: Callable[[], None]) -> AsyncGenerator[Changes, None]:
    """See `LocalView.changes`. What comes while nobody asks is merged by id, so that what waits is never more than there are ids."""
    loop, arrived, lock = asyncio.get_running_loop(), asyncio.Event(), threading.Lock()
    waiting: dict[str, bool] = {}  # id -> is it gone?
    space, switched = "", False

    def note(changes: Changes) -> None:
        nonlocal space, switched
        with lock:
            space, switched = changes.space, switched or changes.switched
            waiting.update(dict.fromkeys(changes.updated, False))
            waiting.update(dict.fromkeys(changes.deleted, True))
        loop.call_soon_threadsafe(arrived.set)

    first, end = True, await asyncio.to_thread(subscribe, note)
    try:
        while True:
            try:
                await asyncio.wait_for(arrived.wait(), CHECK_EVERY)
            except TimeoutError:
                check()
                continue
            arrived.clear()
            with lock:
                seen, went_over = dict(waiting), switched
                waiting.clear()
                switched = False
            if seen or first or went_over:  # also when nothing is held: who waits for the beginning learns that this is it
                first = False
                yield Changes([id for id, gone in seen.items() if not gone], [id for id, gone in seen.items() if gone], space, went_over)
    finally:
        end()
