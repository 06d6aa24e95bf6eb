"""Publish a data set: features first, then impressions and clicks in event-time order, at full or chosen speed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from confluent_kafka import Producer

from crossrep import kafka
from crossrep.errors import CrossrepError
from crossrep.spec import Inputs
from models.datasets import Dataset
from schemas import codec

# Kafka's own default partitioner, so that Java producers of the same topics agree on a key's partition.
PARTITIONER = {"partitioner": "murmur2_random"}


@dataclass
class Published:
    """What was sent and acknowledged."""

    users: int = 0
    items: int = 0
    impressions: int = 0
    clicks: int = 0
    seconds: float = 0.0

    @property
    def events(self) -> int:
        return self.impressions + self.clicks


def publish_features(dataset: Dataset, inputs: Inputs, bootstrap: str) -> Published:
    """Send every user's and item's features. Raises CrossrepError if not all are acknowledged."""
    producer = kafka.producer(bootstrap, **PARTITIONER)
    sent = Published(users=len(dataset.user_ids), items=len(dataset.item_ids))
    for kind, topic, ids, columns in (
        ("user", inputs.user_features, dataset.user_ids, dataset.user_features),
        ("item", inputs.item_features, dataset.item_ids, dataset.item_features),
    ):
        encode, names = codec(f"{kind}_features").encode, list(columns)
        for id, values in zip(ids, zip(*columns.values()), strict=True):
            _produce(producer, topic, id, encode({f"{kind}_id": id, "values": dict(zip(names, values))}))
    _flush(producer)
    return sent


def publish_events(
    dataset: Dataset,
    inputs: Inputs,
    bootstrap: str,
    rate: float | None = None,
    limit: int | None = None,
    skip: int = 0,
    progressed: Callable[[Published], None] = lambda sent: None,
) -> Published:
    """Send impressions and clicks in event-time order; a click follows its impression and has its time (logs give no other).

    Args:
        rate: events a second; None: as fast as the brokers take them.
        limit: stop after that many impressions.
        skip: leave out that many impressions at the beginning.
        progressed: told now and then what was sent so far.

    Raises:
        CrossrepError: not all were acknowledged.
    """
    producer = kafka.producer(bootstrap, **PARTITIONER)
    sent, started = Published(), time.monotonic()
    impression, click = codec("impression").encode, codec("click").encode
    stop = None if limit is None else skip + limit
    for number, (event, clicked) in enumerate(islice(_events(dataset), skip, stop)):
        user, id = event["user_id"], event["event_id"]
        _produce(producer, inputs.impressions, user, impression(event))
        sent.impressions += 1
        if clicked:
            _produce(producer, inputs.clicks, user, click({**event, "event_id": f"{id}-click", "impression_id": id}))
            sent.clicks += 1
        if number % 256 == 0:
            producer.poll(0)
            progressed(sent)
            if rate:
                time.sleep(max(0.0, started + sent.events / rate - time.monotonic()))
    _flush(producer)
    sent.seconds = time.monotonic() - started
    progressed(sent)
    return sent


def _events(dataset: Dataset) -> Iterator[tuple[dict[str, Any], bool]]:
    number = 0
    for run in dataset.impressions():
        times = np.round(run.event_time * 1000).astype(np.int64).tolist()
        columns = (run.user.tolist(), run.item.tolist(), times, run.scenario.tolist(), run.ad.tolist(), run.clicked.tolist())
        for user, item, moment, scenario, ad, clicked in zip(*columns):
            event = {
                "event_id": f"{dataset.name}-{number}",
                "user_id": dataset.user_ids[user],
                "item_id": dataset.item_ids[item],
                "event_time": moment,
                "scenario": dataset.scenarios[scenario],
                "branch": "ad" if ad else "content",
            }
            yield event, clicked
            number += 1


def _produce(producer: Producer, topic: str, key: str, value: bytes) -> None:
    while True:
        try:
            producer.produce(topic, value, key, on_delivery=_check)
            return
        except BufferError:  # the queue is full: wait for the brokers
            producer.poll(0.05)


def _check(error: Any, message: Any) -> None:
    if error is not None:
        raise CrossrepError(f"an event for {message.topic()} was not taken: {error.str()}")


def _flush(producer: Producer) -> None:
    left = producer.flush(60)
    if left:
        raise CrossrepError(f"{left} events were not acknowledged within a minute; is Kafka up? See: crossrep kafka status")
