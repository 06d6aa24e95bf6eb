"""The samples worker: a Faust app with one agent (`owner.py`), which joins impressions with their clicks (`state.samples`)."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from confluent_kafka import Message
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from crossrep import kafka
from crossrep.errors import CrossrepError, TopicError
from crossrep.spec import Space, samples_group
from state.samples import SamplesPartition
from state.samples_progress import Settings
from streams import metrics, topics
from streams.stateful.fetch import Run
from streams.stateful.membership import Membership
from streams.stateful.owner import Owner

log = logging.getLogger(__name__)

BALANCE = 0.1  # seconds between looks at which input is ahead


@dataclass(frozen=True)
class Options:
    """What an operator chooses."""

    name: str  # stable name of this worker: its group membership survives a restart
    folder: Path  # nothing is kept there but a lock on the name
    port: int = 6069  # of /ready and /metrics
    window: float = 1800.0  # seconds behind an impression in which a click labels it
    lateness: float = 1800.0  # seconds that an event may be late
    session_timeout: float = 10.0  # seconds after which a silent worker's partitions move
    start: str | None = None  # earliest or latest: where to begin if the group has no offsets although there are samples


class Samples:
    """The worker's partitions, and what is paused because the other input is behind."""

    def __init__(self, space: Space, bootstrap: str, options: Options):
        topics.check(space, bootstrap)
        partitions = _partitions(space, bootstrap)
        self._space = space
        self._settings = Settings(space, bootstrap, round(options.window * 1000), round(options.lateness * 1000), options.start)
        self._flows: dict[int, int] = {}  # partition -> the flow of its last run
        self._asking = kafka.consumer(bootstrap)
        self._paused: dict[tuple[int, int], int] = {}  # partition and which input -> the flow in which it was paused
        folder = options.folder / space.name / options.name
        inputs = self._settings.inputs
        member = Membership(samples_group(space), inputs, partitions, bootstrap, options.name, folder, options.session_timeout)
        self.owner = Owner(member, lambda number: SamplesPartition(self._settings, number), self._take_in, ends=True)
        metrics.serve(options.port, self._ready, self._metrics)

    async def _take_in(self, run: Run, message: Message) -> None:
        partition = self.owner.partitions[run.partition]
        partition.take_in(message)
        self._flows[run.partition] = run.flow
        self._balance(run.partition)
        if partition.full:
            await self.owner.flush(run.partition)

    def _balance(self, number: int) -> None:
        """Pause the input that is ahead of the other, and let it go on when it is not."""
        flow = self._flows[number]
        for which, ahead in enumerate(self.owner.partitions[number].ahead):
            place = (number, which)
            if ahead != (self._paused.get(place) == flow):
                self.owner.fetch.pause(self._settings.inputs[which], number, ahead)
                self._paused[place] = flow if ahead else -1

    async def balance_forever(self) -> None:
        """What waits is also joined while nothing comes, by a flush."""
        while True:
            await asyncio.sleep(BALANCE)
            flowing = self.owner.fetch.flowing & set(self._flows)
            for number in flowing:
                self._balance(number)
            await self._ask(flowing)

    async def _ask(self, flowing: set[int]) -> None:
        """Where events of one input wait for earlier ones of the other: does that one hold any?"""
        for number in flowing:
            partition = self.owner.partitions.get(number)
            which = partition.lacking if partition is not None else None
            if partition is None or which is None:
                continue
            asked = time.monotonic()
            try:
                _, end = await asyncio.to_thread(kafka.watermarks, self._asking, self._settings.inputs[which], number)
            except CrossrepError as error:
                log.warning("%s; what waits for it waits on", error)
                return
            partition.holds(which, end, asked)

    def _ready(self) -> tuple[bool, dict[str, Any]]:
        owned, flowing = sorted(self.owner.assigned or ()), sorted(self.owner.fetch.flowing)
        return self.owner.flows, {"space": self._space.name, "partitions": owned, "flowing": flowing}

    def _metrics(self) -> Iterator[Metric]:
        partitions = list(self.owner.partitions.items())
        described = {"open": "impressions whose window is not over", "events": "events held"}
        labels = ["space", "partition"]
        gauges = {name: GaugeMetricFamily(f"crossrep_samples_{name}", text, labels=labels) for name, text in described.items()}
        for number, partition in partitions:
            gauges["open"].add_metric([self._space.name, str(number)], partition.join.open)
            gauges["events"].add_metric([self._space.name, str(number)], len(partition.join))
        yield from gauges.values()
        for name in asdict(partitions[0][1].stats) if partitions else ():
            family = CounterMetricFamily(f"crossrep_samples_{name}", name.replace("_", " "), labels=labels)
            for number, partition in partitions:
                family.add_metric([self._space.name, str(number)], getattr(partition.stats, name))
            yield family


def run(space: Space, bootstrap: str, options: Options) -> NoReturn:
    """Join until told to stop (SIGTERM, SIGINT).

    Raises:
        CrossrepError: the space or its topics do not fit, or another worker has this name.
    """
    samples = Samples(space, bootstrap, options)
    samples.owner.run(samples.owner.flush_forever(space.flush), samples.balance_forever())


def _partitions(space: Space, bootstrap: str) -> int:
    """Of both inputs. Raises TopicError if they differ: a click must lie where its impression does."""
    impressions, clicks = (len(kafka.bounds(bootstrap, topic)) for topic in (space.inputs.impressions, space.inputs.clicks))
    if impressions != clicks:
        raise TopicError(
            f"{space.inputs.impressions} has {impressions} partitions, {space.inputs.clicks} {clicks}: a user's clicks do not lie where "
            "the impressions do, and cannot be joined. Create the smaller one anew with as many, and publish again"
        )
    return impressions
