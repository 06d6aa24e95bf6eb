"""Frames come complete, in order and once, and nothing that was fetched for an older flow is ever taken for a newer one's."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from confluent_kafka import Message, TopicPartition
from confluent_kafka.admin import NewTopic

from crossrep import kafka
from crossrep.errors import CrossrepError, StateError
from streams import silence
from streams.stateful import fetch as module
from streams.stateful.fetch import Fetch, Run

PARTITIONS = 3
Frame = tuple[int, int]  # offset, hash of the value
_names = itertools.count()


class Written:
    """A topic, and what was committed to each partition of it: some in transactions, some without; what was aborted is not there."""

    def __init__(self, bootstrap: str, seed: int = 0):
        self.bootstrap, self.topic = bootstrap, f"fetch-{os.getpid()}-{next(_names)}"
        self.committed: list[list[Frame]] = [[] for _ in range(PARTITIONS)]
        self._random = random.Random(seed)
        admin = kafka.admin(bootstrap)
        admin.create_topics([NewTopic(self.topic, PARTITIONS, 1)])[self.topic].result(30)
        self._transactional = kafka.transactional_producer(bootstrap, self.topic, 30.0)
        self._transactional.init_transactions(30)
        self._plain = kafka.producer(bootstrap)

    def write(self, frames: int) -> None:
        """So many more frames, in random batches: a third of them transactions, a sixth transactions that are aborted."""
        while frames > 0:
            number = min(frames, self._random.randint(1, 200))
            frames -= number
            kind = self._random.randrange(6)
            written: list[tuple[int, Frame]] = []
            producer = self._transactional if kind < 3 else self._plain
            if kind < 3:
                producer.begin_transaction()
            for _ in range(number):
                value = self._random.randbytes(self._random.randint(1, 4000)) if self._random.random() < 0.98 else None
                producer.produce(self.topic, value, partition=self._random.randrange(PARTITIONS), on_delivery=partial(_note, written))
            if kind == 0:
                producer.flush(30)
                producer.abort_transaction(30)
                continue
            if kind < 3:
                producer.commit_transaction(30)
            assert producer.flush(30) == 0 and len(written) == number
            for partition, frame in written:
                self.committed[partition].append(frame)

    def since(self, partition: int, offset: int) -> list[Frame]:
        frames = self.committed[partition]
        return frames[bisect_left(frames, (offset,)) :]

    def end(self, partition: int) -> int:
        return self.committed[partition][-1][0] + 1

    @asynccontextmanager
    async def fetched(self) -> AsyncIterator[Fetch]:
        fetch = Fetch([self.topic], self.bootstrap)
        try:
            yield fetch
        finally:
            fetch._thread.submit(fetch._client.close).result()
            fetch._thread.shutdown()


def _note(written: list[tuple[int, Frame]], error: Any, message: Message) -> None:
    written.append((message.partition(), _frame(message)))


def _frame(message: Message) -> Frame:
    return message.offset(), hash(message.value())


def frames_of(runs: list[Run]) -> dict[int, list[Frame]]:
    found: dict[int, list[Frame]] = {}
    for run in runs:
        assert run.frames and {(frame.error(), frame.partition()) for frame in run.frames} == {(None, run.partition)}
        found.setdefault(run.partition, []).extend(map(_frame, run.frames))
    return found


async def until(fetch: Fetch, reached: Callable[[list[Run]], bool], seconds: float = 20.0) -> list[Run]:
    """What may be folded of all that came, until it is enough."""
    runs: list[Run] = []
    deadline = time.monotonic() + seconds
    while not reached(runs):
        assert time.monotonic() < deadline, f"only {[(run.partition, run.flow, len(run.frames)) for run in runs]}"
        runs += [run for run in await fetch.runs() if fetch.current(run)]
    return runs


async def overtaken(fetch: Fetch, partitions: set[int], order: Callable[[], None]) -> list[Run]:
    """What came of these partitions before the order, and of a fetch that was under way then."""
    for partition in partitions:
        fetch.flow(partition, 0)
    runs = await until(fetch, lambda runs: {run.partition for run in runs} == partitions)
    under_way = asyncio.create_task(fetch.runs())
    await asyncio.sleep(0)
    order()
    return runs + await under_way


def run_with(written: Written, check: Callable[[Fetch], Awaitable[None]]) -> None:
    async def main() -> None:
        async with written.fetched() as fetch:
            await check(fetch)

    asyncio.run(main())


@pytest.fixture(scope="module")
def written(bootstrap: str) -> Written:
    """Nine megabytes that no test adds to."""
    found = Written(bootstrap)
    found.write(4500)
    return found


def test_what_flows_comes_complete_in_order_and_once(written: Written) -> None:
    middle = written.committed[1][500][0]

    async def check(fetch: Fetch) -> None:
        assert await fetch.runs() == [] and fetch.flowing == set()
        fetch.flow(0, 0)
        fetch.flow(1, middle)
        assert fetch.flowing == {0, 1}
        wanted = {0: written.since(0, 0), 1: written.since(1, middle)}
        runs = await until(fetch, lambda runs: frames_of(runs) == wanted)
        assert len({(run.partition, run.flow) for run in runs}) == 2
        assert max(sum(len(frame) for frame in run.frames) for run in runs) < module.RUN + module.AT_ONCE * 4000
        assert [await fetch.runs() for _ in range(5)] == [[]] * 5

    run_with(written, check)


def test_a_new_position_voids_what_was_fetched_before_it(written: Written) -> None:
    async def check(fetch: Fetch) -> None:
        old = await overtaken(fetch, {0, 1}, lambda: fetch.flow(0, written.end(0) - 1))
        assert {run.partition for run in old if fetch.current(run)} == {1}
        new = await until(fetch, lambda runs: any(run.partition == 0 for run in runs))
        assert frames_of(new)[0] == written.committed[0][-1:]

    run_with(written, check)


def test_a_hold_voids_everything_and_stops_it(written: Written) -> None:
    def hold(fetch: Fetch) -> None:
        assert fetch.hold() == {0, 2} and fetch.flowing == set() and fetch.hold() == set()

    async def check(fetch: Fetch) -> None:
        old = await overtaken(fetch, {0, 2}, lambda: hold(fetch))
        later = [await fetch.runs() for _ in range(5)]
        assert not any(fetch.current(run) for run in itertools.chain(old, *later)) and later[2:] == [[]] * 3
        fetch.flow(2, 0)
        new = await until(fetch, lambda runs: frames_of(runs) == {2: written.committed[2]})
        assert not {run.flow for run in old} & {run.flow for run in new}

    run_with(written, check)


def test_a_new_flow_begins_promptly_while_others_are_idle(written: Written) -> None:
    async def check(fetch: Fetch) -> None:
        fetch.flow(0, written.end(0))
        for _ in range(10):
            assert await fetch.runs() == []
        begun = time.monotonic()
        fetch.flow(1, 0)
        await until(fetch, bool)
        assert time.monotonic() - begun < 0.5

    run_with(written, check)


def test_deleted_frames_are_refused_and_only_where_they_are_needed(bootstrap: str) -> None:
    written = Written(bootstrap)
    written.write(50)
    deleted = written.committed[0][-1][0]
    admin = kafka.admin(bootstrap)
    for future in admin.delete_records([TopicPartition(written.topic, 0, deleted)]).values():
        future.result(30)

    async def check(fetch: Fetch) -> None:
        fetch.flow(0, deleted)
        fetch.flow(1, 0)
        wanted = {0: written.committed[0][-1:], 1: written.committed[1]}
        await until(fetch, lambda runs: frames_of(runs) == wanted)
        fetch.flow(0, deleted - 1)
        with pytest.raises(StateError, match=rf"{written.topic}\[0\]: frames were deleted before they were folded"):
            await until(fetch, lambda runs: False)

    run_with(written, check)


def test_a_connection_that_is_lost_for_good_ends_it(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr(silence, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    _, log_end = kafka.bounds(written.bootstrap, written.topic)[0]

    async def check(fetch: Fetch) -> None:
        nonlocal clock
        for _ in range(2):  # behind the last frame may be the end of its transaction, which is no frame
            clock = itertools.repeat(0)
            fetch.flow(0, written.end(0))
            await until(fetch, lambda runs: fetch._silence._reached.get((written.topic, 0)) == log_end)
            clock = itertools.count(step=silence.SILENCE)
            assert [await fetch.runs() for _ in range(4)] == [[]] * 4
        fetch.flow(0, 0)
        fetch._thread.submit(fetch._client.pause, [TopicPartition(written.topic, 0)]).result()
        with pytest.raises(CrossrepError, match="the connection is gone for good"):
            await until(fetch, lambda runs: False)

    run_with(written, check)


async def stress(fetch: Fetch, written: Written, chance: random.Random, steps: int, writing: Awaitable[None]) -> Counter[str]:
    """Random flows, holds and fetches, also in each other's way, with runs that wait a while before they are folded, as in the worker.

    What each flow let through must be what was committed from its offset on, without a gap; and the last flows must come to the end.
    """
    counts: Counter[str] = Counter()
    flows: list[tuple[int, int, list[Frame]]] = []  # partition, offset, what it let through
    last: dict[int, tuple[int, list[Frame]]] = {}  # the same of the partitions that flow
    waiting: deque[Run] = deque()

    def act() -> None:
        kind = chance.choices(("flow", "hold", "nothing"), (0.3, 0.03, 0.67))[0]
        counts[kind] += 1
        if kind == "flow":
            flow(chance.randrange(PARTITIONS))
        elif kind == "hold":
            assert fetch.hold() == set(last)
            last.clear()

    def flow(partition: int) -> None:
        offset = chance.randint(0, written.end(partition))
        fetch.flow(partition, offset)
        last[partition] = offset, []
        flows.append((partition, *last[partition]))

    def fold(upto: int) -> None:
        while len(waiting) > upto:
            run = waiting.popleft()
            current = fetch.current(run)
            counts["frames" if current else "void frames"] += len(run.frames)
            if current:
                last[run.partition][1].extend(frames_of([run])[run.partition])

    for _ in range(steps):
        act()
        under_way = asyncio.create_task(fetch.runs())
        if chance.random() < 0.3:
            await asyncio.sleep(chance.random() * 0.003)
            act()
        waiting += await under_way
        fold(chance.randrange(8))
        if chance.random() < 0.05:
            await asyncio.sleep(chance.random() * 0.05)  # librdkafka fetches ahead meanwhile
    await writing
    for partition in set(range(PARTITIONS)) - fetch.flowing:
        flow(partition)
    deadline = time.monotonic() + 30
    while any(found != written.since(partition, offset) for partition, (offset, found) in last.items()):
        assert time.monotonic() < deadline, "the last flows do not come to the end"
        waiting += await fetch.runs()
        fold(0)
    for partition, offset, found in flows:
        assert found == written.since(partition, offset)[: len(found)], f"partition {partition} from {offset}"
        counts["flows that let something through"] += bool(found)
    return counts


@pytest.mark.parametrize("seed", [1, 2])
def test_no_stale_frame_gets_through(bootstrap: str, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr(module, "RUN", 50_000 * seed)  # so that most of what librdkafka has fetched stays behind
    written = Written(bootstrap, seed)
    written.write(3000)

    async def check(fetch: Fetch) -> None:
        writing = asyncio.create_task(asyncio.to_thread(written.write, 1500))
        counts = await stress(fetch, written, random.Random(seed), 200, writing)
        assert counts["frames"] > 500 and counts["void frames"] > 50, counts

    run_with(written, check)
