"""When the join may go on with one topic alone: not because a fetch of the other once came to its end, but when the broker says so."""

from __future__ import annotations

import time
from typing import Any

import pytest
from confluent_kafka import KafkaError, Message

from crossrep.spec import Space
from schemas import codec
from state import samples
from state.samples import SamplesPartition
from state.samples_progress import Settings
from tests.cluster import SPEC

SHOWN, CLICKED = 0, 1
START = 1_650_000_000_000  # ms
PATIENCE = 0.02  # seconds


@pytest.fixture
def partition(monkeypatch: pytest.MonkeyPatch) -> SamplesPartition:
    """A window of a minute, and no lateness worth speaking of. Nothing here asks a broker."""
    monkeypatch.setattr(samples, "PATIENCE", PATIENCE)
    return SamplesPartition(Settings(Space.parse(SPEC.format(name="joined", partitions=1)), "", 60_000, 1), 0)


def take_in(partition: SamplesPartition, which: int, offset: int, minutes: float | None) -> None:
    """An event of impression e0 at that time, or the news that the topic is at its end."""
    topic = partition._settings.inputs[which]
    if minutes is None:
        partition.take_in(Message(topic=topic, partition=0, offset=offset, error=KafkaError(KafkaError._PARTITION_EOF)))
        return
    moment = START + round(minutes * 60_000)
    about: dict[str, Any] = {"event_id": f"e{offset}", "user_id": "u", "item_id": "i", "event_time": moment}
    kind = "click" if which == CLICKED else "impression"
    value = codec(kind).encode({**about, "impression_id": "e0"} if which == CLICKED else about)
    partition.take_in(Message(topic=topic, partition=0, offset=offset, key=b"u", value=value, timestamp=(2, moment)))


def told(partition: SamplesPartition, which: int, end: int) -> None:
    """The broker is asked, and answers."""
    assert partition.lacking == which
    partition.holds(which, end, time.monotonic())


def labels(partition: SamplesPartition) -> dict[int, int | None]:
    """By offset of the impression: minutes until its click; what is left is of no window that is over."""
    return {sample.offset: sample.clicked_at and round((sample.clicked_at - START) / 60_000, 1) for sample in partition.join.take()[0]}


def test_a_click_on_its_way_is_not_late_though_its_topic_was_at_its_end_once(partition: SamplesPartition) -> None:
    """Read as it happens at full speed: the clicks' fetch ends, then clicks are appended, and the impressions' next fetch holds an hour."""
    take_in(partition, CLICKED, 0, None)
    for offset, minutes in enumerate([0.0, 30.0, 60.0]):
        take_in(partition, SHOWN, offset, minutes)
    time.sleep(3 * PATIENCE)
    take_in(partition, SHOWN, 3, 90.0)  # patience is over: whoever trusts that end joins all four now, and the click comes too late
    told(partition, CLICKED, 1)  # it holds one by now
    take_in(partition, SHOWN, 4, 120.0)
    assert partition.join.marks.newest < START and partition.stats.impressions == 0
    take_in(partition, CLICKED, 0, 0.5)
    time.sleep(3 * PATIENCE)
    told(partition, CLICKED, 1)  # that is all
    partition._join_all()
    assert labels(partition) == {0: 0.5, 1: None, 2: None, 3: None}
    assert (partition.stats.impressions, partition.stats.clicks, partition.stats.dead_letters) == (5, 1, 0)


def test_what_the_broker_said_before_an_event_came_says_nothing_of_it(partition: SamplesPartition) -> None:
    take_in(partition, SHOWN, 0, 0.0)
    time.sleep(3 * PATIENCE)
    told(partition, CLICKED, 0)
    take_in(partition, SHOWN, 1, 30.0)
    assert partition.stats.impressions == 1  # the first has waited long enough by then, the second has just come
    time.sleep(3 * PATIENCE)
    assert partition.lacking == CLICKED and partition.stats.impressions == 1
    take_in(partition, CLICKED, 0, 0.5)
    take_in(partition, CLICKED, 1, 45.0)
    assert labels(partition) == {0: 0.5} and partition.stats.impressions == 2


def test_markers_of_transactions_behind_the_last_event_are_no_events(partition: SamplesPartition) -> None:
    take_in(partition, SHOWN, 0, 0.0)
    time.sleep(3 * PATIENCE)
    told(partition, CLICKED, 2)  # two offsets that nobody has seen yet: events, for all we know
    partition._join_all()
    assert partition.stats.impressions == 0
    take_in(partition, CLICKED, 2, None)  # a fetch found none there
    told(partition, CLICKED, 2)
    partition._join_all()
    assert partition.stats.impressions == 1
