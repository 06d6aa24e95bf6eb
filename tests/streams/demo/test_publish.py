"""Publishing a data set: everything once, in event-time order, on the partition every client would choose."""

from __future__ import annotations

import dataclasses
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from confluent_kafka import Message, TopicPartition

from crossrep import CrossrepError, kafka
from crossrep.keys import Keys
from models.datasets import Dataset
from schemas import codec
from streams.demo import publish
from tests.cluster import free_port, new_space
from tests.streams.small_model import small_dataset


def read(topic: str, bootstrap: str) -> dict[int, list[Message]]:
    """Every message of a topic, by partition."""
    client = kafka.consumer(bootstrap, config=kafka.ENDS)
    try:
        left = set(client.list_topics(topic, timeout=30).topics[topic].partitions)
        found: dict[int, list[Message]] = {number: [] for number in left}
        client.assign([TopicPartition(topic, number, 0) for number in left])
        while left:
            for message in client.consume(1000, 0.1):
                if kafka.is_end(message):
                    left.discard(message.partition())
                else:
                    assert message.error() is None
                    found[message.partition()].append(message)
        return found
    finally:
        client.close()


def decoded(messages: dict[int, list[Message]], kind: str) -> dict[int, list[dict[str, Any]]]:
    decode = codec(kind).decode
    return {number: [decode(message.value()) for message in of_one] for number, of_one in messages.items()}


def check_partitions(messages: dict[int, list[Message]]) -> None:
    for number, of_one in messages.items():
        keys = [message.key() for message in of_one]
        assert (Keys.of(keys).partitions(len(messages)) == number).all()


def test_all_events_once_in_order_and_where_their_keys_belong(bootstrap: str, tmp_path: Path) -> None:
    space, _ = new_space(bootstrap, tmp_path, partitions=5)
    dataset = small_dataset(3000)
    told: list[int] = []
    sent = publish.publish_events(dataset, space.inputs, bootstrap, progressed=lambda sent: told.append(sent.impressions))
    (run,) = dataset.impressions()
    assert (sent.impressions, sent.clicks) == (3000, int(run.clicked.sum())) and sent.events == 3000 + sent.clicks
    assert sent.seconds > 0 and told == sorted(told) and told[-1] == 3000

    messages = {kind: read(topic, bootstrap) for kind, topic in (("impression", space.inputs.impressions), ("click", space.inputs.clicks))}
    events = {kind: decoded(of_kind, kind) for kind, of_kind in messages.items()}
    for kind, of_kind in messages.items():
        check_partitions(of_kind)
        for number, of_one in of_kind.items():
            assert [message.key().decode() for message in of_one] == [event["user_id"] for event in events[kind][number]]
            assert all(a["event_time"] <= b["event_time"] for a, b in pairwise(events[kind][number]))
        assert len([number for number, of_one in of_kind.items() if of_one]) == 5

    impressions = {event["event_id"]: event for of_one in events["impression"].values() for event in of_one}
    assert len(impressions) == 3000
    expected = Counter(
        (dataset.user_ids[u], dataset.item_ids[i], round(t * 1000), dataset.scenarios[s], "ad" if a else "content")
        for u, i, t, s, a in zip(run.user, run.item, run.event_time, run.scenario, run.ad)
    )
    fields = ("user_id", "item_id", "event_time", "scenario", "branch")
    assert Counter(tuple(event[name] for name in fields) for event in impressions.values()) == expected
    clicks = [event for of_one in events["click"].values() for event in of_one]
    assert len({event["event_id"] for event in clicks}) == len(clicks) == sent.clicks
    for click in clicks:
        assert [impressions[click["impression_id"]][name] for name in fields] == [click[name] for name in fields]


def test_features_of_everybody(bootstrap: str, tmp_path: Path) -> None:
    space, _ = new_space(bootstrap, tmp_path, partitions=3)
    dataset = small_dataset(100)
    odd = np.array([None, 1, 2.5, "text", *[None] * (len(dataset.user_ids) - 4)], dtype=object)
    dataset = dataclasses.replace(dataset, user_features={**dataset.user_features, "odd": odd})
    sent = publish.publish_features(dataset, space.inputs, bootstrap)
    assert (sent.users, sent.items, sent.events) == (len(dataset.user_ids), len(dataset.item_ids), 0)
    for kind, topic, ids, columns in (
        ("user", space.inputs.user_features, dataset.user_ids, dataset.user_features),
        ("item", space.inputs.item_features, dataset.item_ids, dataset.item_features),
    ):
        messages = read(topic, bootstrap)
        check_partitions(messages)
        records = [record for of_one in decoded(messages, f"{kind}_features").values() for record in of_one]
        assert {record[f"{kind}_id"]: record["values"] for record in records} == {
            id: {name: column[i] for name, column in columns.items()} for i, id in enumerate(ids)
        }
        assert len(records) == len(ids)


def test_limit_and_rate(bootstrap: str, tmp_path: Path) -> None:
    space, _ = new_space(bootstrap, tmp_path, partitions=2)
    dataset: Dataset = small_dataset(3000)
    (run,) = dataset.impressions()
    events = 1100 + int(run.clicked[:1100].sum())
    sent = publish.publish_events(dataset, space.inputs, bootstrap, rate=1000, limit=1100)
    assert (sent.impressions, sent.events) == (1100, events)
    # Never faster than asked for; how much slower is up to the machine. Pauses come every 256 impressions.
    assert sent.seconds > 0.7 * events / 1000
    assert sum(map(len, read(space.inputs.impressions, bootstrap).values())) == 1100
    assert publish.publish_events(dataset, space.inputs, bootstrap, limit=10_000).impressions == 3000


def test_what_is_not_acknowledged_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    producer = kafka.producer
    monkeypatch.setattr(kafka, "producer", lambda bootstrap, **config: producer(bootstrap, **{**config, "message.timeout.ms": 1000}))
    dataset = small_dataset(50)
    with pytest.raises(CrossrepError, match=r"was not taken|not acknowledged"):
        publish.publish_events(dataset, new_inputs(), f"127.0.0.1:{free_port()}")


def new_inputs() -> Any:
    from crossrep.spec import Inputs

    return Inputs()
