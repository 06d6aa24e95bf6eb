"""Whoever is told of changes knows what the view holds: by callbacks, and with asyncio."""

from __future__ import annotations

import asyncio

import pytest

from crossrep import Changes, CrossrepError, LocalView, kafka
from crossrep.spec import Space
from tests.cluster import wait_for
from tests.crossrep.snapshot_world import Changelog

IDS = [f"k{i}" for i in range(300)]


class Mirror:
    """What one knows who is told of every change, and looks up what he is told of."""

    def __init__(self, view: LocalView):
        self.view, self.counts, self.told = view, dict[str, int](), 0

    def __call__(self, changes: Changes) -> None:
        self.told += len(changes.updated) + len(changes.deleted)
        for id in changes.deleted:
            self.counts.pop(id, None)
        answer = self.view.get(changes.updated)
        self.counts |= {id: count for id, count, found in zip(changes.updated, answer.counts.tolist(), answer.found) if found}

    def agrees(self) -> bool:
        ids = self.view.ids()
        return self.counts == dict(zip(ids, self.view.get(ids).counts.tolist()))


def test_callbacks_see_every_change(bootstrap: str, space: Space) -> None:
    log = Changelog(space, bootstrap)
    log.put("user", IDS[:100], 1)
    with LocalView("user", space.name, bootstrap) as view:
        early = Mirror(view)
        view.subscribe(early)  # perhaps before anything is there
        view.wait(60)
        late, ended = Mirror(view), Mirror(view)
        view.subscribe(late)
        end = view.subscribe(ended)
        assert len(late.counts) == len(ended.counts) == 100  # what was held is told at once
        end()
        end()
        for turn in range(5):
            log.put("user", IDS[turn * 40 : turn * 40 + 140], turn)
            log.delete("user", [*IDS[turn * 40 : turn * 40 + 30], "never there"])
        log.put("user", ["last"])
        wait_for(lambda: all("last" in mirror.counts for mirror in (early, late)), "they hear of the last one")
        assert early.agrees() and late.agrees() and len(early.counts) == len(view) == 151 and "never there" not in view.ids()
        assert ended.told == 100
        view.check()


def test_a_callback_that_fails_is_reported_and_the_view_goes_on(bootstrap: str, space: Space, caplog: pytest.LogCaptureFixture) -> None:
    log = Changelog(space, bootstrap)
    with LocalView("user", space.name, bootstrap) as view:
        view.wait(60)
        calls = []

        def fails(changes: Changes) -> None:
            calls.append(changes)
            if changes.updated:
                raise ZeroDivisionError("of the callback")

        mirror = Mirror(view)
        view.subscribe(fails)
        view.subscribe(mirror)
        log.put("user", ["a"])
        log.put("user", ["b"])
        wait_for(lambda: "b" in mirror.counts, "the other one is told of both")
        assert len(calls) == 2 and mirror.agrees() and view.get(["a", "b"]).found.all()
        with pytest.raises(CrossrepError, match="ZeroDivisionError"):
            view.check()
        assert "of the callback" in caplog.text
        with pytest.raises(ZeroDivisionError):  # the first call is made by who subscribes
            view.subscribe(fails)


def test_asyncio(bootstrap: str, space: Space) -> None:
    log = Changelog(space, bootstrap)
    log.put("user", IDS, 1)

    async def trainer(view: LocalView) -> None:
        await view.until_caught_up(60)
        answer = await view.aget(["k1", "nobody"], columns=["cr"])
        assert answer.found.tolist() == [True, False] and list(answer) == ["cr"]
        mirror = Mirror(view)
        changes = view.changes()
        mirror(await anext(changes))
        assert len(mirror.counts) == 300
        log.put("user", IDS[:50], 2)
        log.delete("user", IDS[100:200])
        log.put("user", ["last"])
        await asyncio.sleep(0.5)  # slower than the stream
        async for change in changes:
            mirror(change)
            if "last" in change.updated:
                break
        await changes.aclose()
        assert mirror.agrees() and len(mirror.counts) == 201 and not view._subscribers._callbacks

    with LocalView("user", space.name, bootstrap) as view:
        asyncio.run(trainer(view))


def test_asyncio_learns_that_a_view_has_ended(bootstrap: str, space: Space) -> None:
    async def waits(view: LocalView) -> None:
        await view.until_caught_up(60)
        changes = view.changes()
        await anext(changes)
        producer = kafka.producer(bootstrap)
        producer.produce(space.representations_topic("user"), b"garbage", "b", partition=0)
        producer.flush(30)
        with pytest.raises(CrossrepError, match="has failed"):
            await asyncio.wait_for(anext(changes), 20)

    with LocalView("user", space.name, bootstrap) as view:
        asyncio.run(waits(view))
