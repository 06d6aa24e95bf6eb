"""The join of impressions and clicks against its definition, whatever the order, the lateness and the crashes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossrep.errors import BadEvent
from state.join import Join, Stats

WINDOW, LATENESS = 10, 15  # ms
SHOWN, CLICKED = 0, 1

Event = dict[str, Any]


def event(id: str, time: int, item: str = "i") -> Event:
    return {"event_id": id, "user_id": "u", "item_id": item, "event_time": time, "scenario": "", "branch": "ad", "impression_id": id}


class World:
    """A log of both topics in the order of their append times, and a worker that reads, commits and crashes."""

    def __init__(self, log: list[tuple[int, Event]]) -> None:
        self.log = log
        self.join = Join(WINDOW, LATENESS, Stats())
        self.read = self.committed = 0
        self.starts: list[int] = [0, 0]
        self.marks = self.join.marks
        self.samples: dict[int, int | None] = {}  # what readers have: the last word on every impression, by offset
        self.late: list[int] = []
        self.lost: list[int] = []
        self._late: list[int] = []  # not committed

    def step(self) -> None:
        which, what = self.log[self.read]
        try:
            if which == SHOWN:
                self.join.impression(self.read, what)
            else:
                self.join.click(self.read, what, "message")
        except BadEvent:
            self._late.append(self.read)
        self.read += 1

    def commit(self) -> None:
        samples, lost = self.join.take()
        self.samples |= {sample.offset: sample.clicked_at for sample in samples}
        self.lost += [click.offset for click in lost]
        self.late, self._late = self.late + self._late, []
        self.committed, self.marks = self.read, self.join.marks
        self.starts = [self.read if start is None else start for start in self.join.starts]

    def crash(self) -> None:
        """What the log holds from the oldest needed event to the committed position is all there is."""
        self.join, self._late, self.read = Join(WINDOW, LATENESS, Stats(), self.marks), [], self.committed
        again = [(at, *self.log[at]) for at in range(self.committed)]
        self.join.restore(
            [(at, what) for at, which, what in again if which == SHOWN and at >= self.starts[SHOWN]],
            [(at, what, "message") for at, which, what in again if which == CLICKED and at >= self.starts[CLICKED]],
        )

    def finish(self) -> World:
        while self.read < len(self.log):
            self.step()
        self.join.close()
        self.commit()
        return self


@st.composite
def logs(draw: st.DrawFn) -> list[tuple[int, Event]]:
    """Of few ids, so that clicks meet impressions; times that go on, lag behind by more than is allowed, and run ahead."""
    now, log = 100, []
    for which in draw(st.lists(st.sampled_from([SHOWN, CLICKED]), max_size=40)):
        now += draw(st.integers(0, 4))
        shift = draw(st.one_of(st.integers(-8, 3), st.integers(-40, 12)))
        log.append((which, event(draw(st.sampled_from("abc")), now + shift, draw(st.sampled_from("iij")))))
    return log


def definition(log: list[tuple[int, Event]], late: list[int]) -> dict[int, int | None]:
    """Every impression that was neither late nor sent again, and when it was clicked first."""
    clicks = [what for which, what in log if which == CLICKED]
    first: dict[tuple[str, str, int], int] = {}
    for at, (which, what) in enumerate(log):
        if which == SHOWN and at not in late:
            first.setdefault((what["event_id"], what["item_id"], what["event_time"]), at)
    return {
        at: min(
            (c["event_time"] for c in clicks if (c["impression_id"], c["item_id"]) == (id, item) and 0 <= c["event_time"] - time <= WINDOW),
            default=None,
        )
        for (id, item, time), at in first.items()
    }


@given(logs())
def test_it_is_the_definition(log: list[tuple[int, Event]]) -> None:
    """Every impression once, late ones apart, with the label of the definition unless an event came when it was as old as the horizon."""
    world = World(log).finish()
    expected = definition(log, world.late)
    newest, too_late = -1, set()
    for at, (_, what) in enumerate(log):
        if what["event_time"] <= newest - LATENESS:
            too_late.add(what["event_id"])
        assert (at in world.late) == (log[at][0] == SHOWN and what["event_time"] <= newest - LATENESS - WINDOW)
        newest = max(newest, what["event_time"])
    assert set(world.samples) == set(expected)
    assert {at for at in expected if world.samples[at] != expected[at]} <= {at for at in expected if log[at][1]["event_id"] in too_late}


@given(logs(), st.lists(st.sampled_from(["step", "step", "step", "commit", "crash", "close"]), max_size=120))
def test_crashes_change_nothing(log: list[tuple[int, Event]], steps: list[str]) -> None:
    """The same samples, labels and dead letters, whenever it commits, crashes, or closes its windows because nothing came for long."""
    world, whole = World(log), World(log).finish()
    for step in steps:
        if step == "close":
            world.join.close()
        elif step != "step":
            getattr(world, step)()
        elif world.read < len(log):
            world.step()
    world.finish()
    assert world.samples == whole.samples
    assert sorted(world.late) == whole.late and sorted(world.lost) == sorted(whole.lost)


def joined(*steps: tuple[int, Event]) -> tuple[Join, list[tuple[int, int | None]], list[int], Stats]:
    """After each event: what is written, and who is lost."""
    join = Join(WINDOW, LATENESS, stats := Stats())
    written: list[tuple[int, int | None]] = []
    lost: list[int] = []
    for offset, (which, what) in enumerate(steps):
        join.impression(offset, what) if which == SHOWN else join.click(offset, what, "message")
        out, gone = join.take()
        written += [(sample.offset, sample.clicked_at) for sample in out]
        lost += [click.offset for click in gone]
    return join, written, lost, stats


def test_a_sample_is_written_when_its_window_is_over_and_again_for_a_late_click() -> None:
    _, written, lost, stats = joined(
        (SHOWN, event("a", 100)),
        (SHOWN, event("b", 101)),
        (CLICKED, event("b", 105)),
        (SHOWN, event("c", 110)),  # a's window is over
        (SHOWN, event("d", 111)),  # b's too
        (CLICKED, event("a", 109)),  # late, but it happened within the window
        (CLICKED, event("a", 107)),  # and an earlier one
        (CLICKED, event("a", 108)),
        (CLICKED, event("d", 122)),  # not within the window; c's is over, and d's
    )
    assert written == [(0, None), (1, 105), (0, 109), (0, 107), (3, None), (4, None)]
    assert not lost and (stats.samples, stats.corrections) == (4, 2)


def test_clicks_that_nobody_waits_for_and_impressions_sent_again() -> None:
    _, written, lost, stats = joined(
        (CLICKED, event("a", 101)),  # before its impression came
        (SHOWN, event("a", 100)),
        (SHOWN, event("a", 100)),  # sent again
        (SHOWN, event("a", 104)),  # the same id, but another time: another impression
        (CLICKED, event("a", 103, item="j")),  # not the item that was shown
        (CLICKED, event("never", 102)),
        (CLICKED, event("", 103)),
        (SHOWN, event("z", 119)),
    )
    assert written == [(1, 101), (3, None)] and sorted(lost) == [4, 5, 6]
    assert (stats.duplicates, stats.dead_letters) == (1, 3)


def test_what_is_as_old_as_the_horizon_is_refused_and_forgotten() -> None:
    join, _, _, _ = joined((SHOWN, event("a", 100)), (CLICKED, event("a", 100)), (SHOWN, event("b", 125)))
    assert len(join) == 1 and join.starts == (2, None)
    with pytest.raises(BadEvent, match="late"):
        join.impression(3, event("c", 100))
    join.impression(4, event("d", 101))
    assert [sample.offset for sample in join.take()[0]] == [4]
