"""Impressions and their clicks, joined by event time: one partition's state, in memory alone.

An impression is open for `window` behind its event time; a click labels it that names its id, user and item and happened in that time. How
far event time has come is the newest event's time. When an impression's window is over it is *emitted*, with the label it has; a label that
comes later makes a correction, the same sample again. Events may be late by `lateness`: what is older than newest - lateness - window
(the *horizon*) is forgotten, and an impression that old is refused, since its clicks may be forgotten too.

What is known is a function of the marks and of the events that the log holds from `starts` on, in whatever order the two topics are read:
whoever reads those again has the same state. That is why a click labels every impression that it fits, and why an impression sent again is
one with the same id, user, item *and* time.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, replace
from typing import Any

from crossrep.errors import BadEvent

Key = tuple[str, str, str]  # the impression's id, user, item
NEVER = -(2**63)


@dataclass(slots=True)
class Impression:
    """Times are ms since 1970."""

    offset: int
    key: Key
    time: int
    scenario: str
    branch: str
    clicked_at: int | None = None
    emitted: bool = False


@dataclass(slots=True)
class Click:
    offset: int
    key: Key
    time: int
    message: Any  # as it came, for a dead letter; None once it has met its impression


@dataclass(frozen=True)
class Marks:
    """Event times, ms since 1970, that only rise: what has been done up to where. With the log they say what was emitted."""

    newest: int = NEVER  # of all events
    closed: int = NEVER  # impressions up to it are emitted
    settled: int = NEVER  # clicks up to it have met an impression or are dead letters
    horizon: int = NEVER  # impressions up to it are refused, events up to it meet nobody any more


@dataclass
class Stats:
    """Counters since the process started, for metrics."""

    impressions: int = 0
    clicks: int = 0
    samples: int = 0
    corrections: int = 0
    duplicates: int = 0
    dead_letters: int = 0


class Join:
    """Takes in events, gives samples.

    Args:
        window, lateness: ms.
        marks: as they were committed with the positions up to which `restore` reads the log again.
    """

    def __init__(self, window: int, lateness: int, stats: Stats, marks: Marks | None = None):
        self.window, self.lateness = window, lateness
        self.marks = marks or Marks()
        self._stats = stats
        self._impressions: dict[Key, tuple[Impression, ...]] = {}
        self._clicks: dict[Key, tuple[Click, ...]] = {}
        self._impressions_read: deque[Impression] = deque()  # in the log's order
        self._clicks_read: deque[Click] = deque()
        self._open: list[tuple[int, int, Impression]] = []  # a heap by time
        self._alone: list[tuple[int, int, Click]] = []  # a heap by time
        self._out: dict[int, Impression] = {}  # samples to write, by offset
        self._lost: list[Click] = []  # dead letters to write

    def __len__(self) -> int:
        """Events held."""
        return len(self._impressions_read) + len(self._clicks_read)

    @property
    def starts(self) -> tuple[int | None, int | None]:
        """The oldest impression and click that are still needed: their offsets; None: there is none."""
        return (
            self._impressions_read[0].offset if self._impressions_read else None,
            self._clicks_read[0].offset if self._clicks_read else None,
        )

    @property
    def open(self) -> int:
        """Impressions whose window is not over."""
        return len(self._open)

    @property
    def pending(self) -> int:
        """Samples and dead letters that wait for `take`."""
        return len(self._out) + len(self._lost)

    def take(self) -> tuple[list[Impression], list[Click]]:
        """What is to be written since the last call: samples as they are now, and clicks that nobody waits for."""
        out, self._out = list(self._out.values()), {}
        lost, self._lost = self._lost, []
        return out, lost

    def impression(self, offset: int, event: dict[str, Any]) -> None:
        """Raises BadEvent ("late") if it is as old as the horizon."""
        self._stats.impressions += 1
        if event["event_time"] <= self.marks.horizon:
            behind = (self.marks.newest - event["event_time"]) / 1000
            raise BadEvent("late", f"{behind:g} s behind the newest event, so its clicks may be forgotten: see --lateness")
        found = self._meet(offset, event)
        if found is None:
            self._stats.duplicates += 1
        elif found.time <= self.marks.closed:
            self._emit(found)
        else:
            heapq.heappush(self._open, (found.time, offset, found))
        self._advance(event["event_time"])

    def click(self, offset: int, event: dict[str, Any], message: Any) -> None:
        self._stats.clicks += 1
        click = self._click(offset, event, message)
        for impression in self._fitting(click):
            click.message = None
            if impression.clicked_at is None or click.time < impression.clicked_at:
                impression.clicked_at = click.time
                if impression.emitted:
                    self._stats.corrections += 1
                    self._out[impression.offset] = impression
        if click.message is not None:
            heapq.heappush(self._alone, (click.time, offset, click))
        self._advance(click.time)

    def close(self) -> None:
        """No more events come for now: every window is over."""
        self._advance(NEVER, closed=self.marks.newest)

    def restore(self, impressions: list[tuple[int, dict[str, Any]]], clicks: list[tuple[int, dict[str, Any], Any]]) -> None:
        """Know again what the log holds up to the positions that were committed with the marks; nothing of it is given out again."""
        for offset, event, message in clicks:
            if event["event_time"] > self.marks.horizon:
                self._click(offset, event, message)
        for offset, event in impressions:
            if event["event_time"] > self.marks.horizon:
                self._meet(offset, event)
        for impression in self._impressions_read:
            impression.emitted = impression.time <= self.marks.closed
        self._open = [(i.time, i.offset, i) for i in self._impressions_read if not i.emitted]
        self._alone = [(c.time, c.offset, c) for c in self._clicks_read if c.message is not None and c.time > self.marks.settled]
        heapq.heapify(self._open)
        heapq.heapify(self._alone)

    def _meet(self, offset: int, event: dict[str, Any]) -> Impression | None:
        """A new impression, with the clicks that came before it; None if it is known."""
        key = (event["event_id"], event["user_id"], event["item_id"])
        impression = Impression(offset, key, event["event_time"], event["scenario"], event["branch"])
        known = self._impressions.get(key, ())
        if any(other.time == impression.time for other in known):
            return None
        self._impressions[key] = (*known, impression)
        self._impressions_read.append(impression)
        for click in self._clicks.get(key, ()):
            if impression.time <= click.time <= impression.time + self.window:
                click.message = None
                first = impression.clicked_at
                impression.clicked_at = click.time if first is None else min(click.time, first)
        return impression

    def _click(self, offset: int, event: dict[str, Any], message: Any) -> Click:
        click = Click(offset, (event["impression_id"], event["user_id"], event["item_id"]), event["event_time"], message)
        if click.time > self.marks.horizon:
            self._clicks[click.key] = (*self._clicks.get(click.key, ()), click)
            self._clicks_read.append(click)
        return click

    def _fitting(self, click: Click) -> list[Impression]:
        return [
            impression
            for impression in self._impressions.get(click.key, ())
            if self.marks.horizon < impression.time <= click.time <= impression.time + self.window
        ]

    def _emit(self, impression: Impression) -> None:
        impression.emitted = True
        self._stats.samples += 1
        self._out[impression.offset] = impression

    def _advance(self, time: int, closed: int = NEVER) -> None:
        marks = self.marks
        if time <= marks.newest and closed <= marks.closed and not (self._alone and self._alone[0][0] <= marks.settled):
            return
        newest = max(marks.newest, time)
        self.marks = marks = replace(
            marks,
            newest=newest,
            closed=max(marks.closed, newest - self.window, closed),
            settled=max(marks.settled, newest - self.lateness),
            horizon=max(marks.horizon, newest - self.lateness - self.window),
        )
        while self._open and self._open[0][0] <= marks.closed:
            self._emit(heapq.heappop(self._open)[2])
        while self._alone and self._alone[0][0] <= marks.settled:
            click = heapq.heappop(self._alone)[2]
            if click.message is not None:
                self._stats.dead_letters += 1
                self._lost.append(click)
        _forget(self._impressions_read, self._impressions, marks.horizon)
        _forget(self._clicks_read, self._clicks, marks.horizon)


def _forget(read: deque[Any], known: dict[Key, tuple[Any, ...]], horizon: int) -> None:
    """What lies at the log's beginning and is as old as the horizon."""
    while read and read[0].time <= horizon:
        gone = read.popleft()
        left = tuple(other for other in known[gone.key] if other is not gone)
        if left:
            known[gone.key] = left
        else:
            del known[gone.key]
