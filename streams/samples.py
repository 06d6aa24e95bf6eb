"""The samples worker: a Faust app with one agent (`streams.owner`), which joins impressions with their clicks (`state.samples`)."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from confluent_kafka import Message
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from crossrep import kafka
from crossrep.errors import TopicError
from crossrep.spec import Space
from state.samples import SamplesPartition, Settings, group_of
from streams import metrics, topics
from streams.fetch import Run
from streams.owner import Membership, Owner

log = logging.getLogger(__name__)


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
        self._paused: set[tuple[int, int]] = set()  # partition, which input
        folder = options.folder / space.name / options.name
        inputs = self._settings.inputs
        member = Membership(group_of(space), inputs, partitions, bootstrap, options.name, folder, options.session_timeout)
        self.owner = Owner(member, lambda number: SamplesPartition(self._settings, number), self._take_in, ends=True)
        metrics.serve(options.port, self._ready, self._metrics)

    async def _take_in(self, run: Run, message: Message) -> None:
        partition = self.owner.partitions[run.partition]
        partition.take_in(message)
        for which, ahead in enumerate(partition.ahead):
            place = (run.partition, which)
            if ahead != (place in self._paused):
                self._paused ^= {place}
                self.owner.fetch.pause(message.topic() if ahead else self._settings.inputs[which], run.partition, ahead)
        if partition.full:
            await self.owner.flush(run.partition)

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
    samples.owner.run(samples.owner.flush_forever(space.flush))


def _partitions(space: Space, bootstrap: str) -> int:
    """Of both inputs. Raises TopicError if they differ: a click must lie where its impression does."""
    impressions, clicks = (len(kafka.bounds(bootstrap, topic)) for topic in (space.inputs.impressions, space.inputs.clicks))
    if impressions != clicks:
        raise TopicError(
            f"{space.inputs.impressions} has {impressions} partitions, {space.inputs.clicks} {clicks}: a user's clicks do not lie where "
            "the impressions do, and cannot be joined. Create the smaller one anew with as many, and publish again"
        )
    return impressions
