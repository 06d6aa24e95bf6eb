"""A model that gives bad vectors: each costs its own event alone. No broker."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from confluent_kafka import Message
from numpy.typing import NDArray

from crossrep.columnar import frames
from crossrep.columnar.rows import Rows
from crossrep.keys import Keys
from crossrep.spec import Space
from models.upstream import UpstreamModel
from streams.inference.infer import Infer
from tests.streams.bad_samples import event


def message(topic: str, value: bytes, offset: int) -> Message:
    return Message(topic=topic, partition=0, offset=offset, value=value, timestamp=(2, int(time.time() * 1000)))


class Table:
    """Features of everybody: the number in the id."""

    def rows(self, keys: Keys) -> NDArray[np.int32]:
        return np.array([[int(key)] for key in keys.tolist()], np.int32).reshape(-1, 1)


class Fake:
    """cr is filled with what the item's number stands for; ur and ir are fine."""

    name = "fake"
    features: Mapping[str, tuple[str, ...]] = {"user": ("user_id",), "item": ("item_id",), "event": ("scenario",)}
    outputs: Mapping[str, int] = {"ur": 4, "ir": 4, "cr": 8}
    values = (1.0, np.nan, np.inf, -np.inf, 65504.0, 65519.9, 65520.0, -1e30, 0.0)

    def encode(self, kind: str, ids: Sequence[str], rows: Sequence[Mapping[str, object]]) -> NDArray[np.int32]:
        return np.zeros((len(ids), 1), np.int32)

    def encode_events(self, scenario: Sequence[str], branch: Sequence[str], event_time: NDArray[np.float64]) -> NDArray[np.int32]:
        return np.zeros((len(scenario), 1), np.int32)

    def forward(self, user: NDArray[np.int32], item: NDArray[np.int32], event: NDArray[np.int32]) -> dict[str, NDArray[np.float32]]:
        n = len(user)
        cr = np.ones((n, 8), np.float32)
        cr[:, 3] = np.array(self.values)[item[:, 0]]
        return {"ur": np.ones((n, 4), np.float32), "ir": np.ones((n, 4), np.float32), "cr": cr}


@pytest.mark.parametrize("precision", ["float16", "float32"])
def test_a_vector_that_cannot_be_written_costs_its_event_only(precision: str) -> None:
    from tests.cluster import SPEC as PLAIN

    text = PLAIN.format(name="fake", partitions=1).replace('flush = "50ms"', f'flush = "50ms"\nvectors = "{precision}"')
    space, model = Space.parse(text), Fake()
    assert isinstance(model, UpstreamModel)
    infer = Infer(space, model, Table(), Table())  # type: ignore[arg-type]
    n = len(Fake.values)
    values = [event(user_id=str(item), item_id=str(item)) for item in range(n)]
    values.insert(2, b"undecodable")
    messages = [message(space.inputs.impressions, value, offset) for offset, value in enumerate(values)]
    output = infer.rows(infer.forward(infer.read(messages)))
    with np.errstate(over="ignore"):
        wrong = {item for item, value in enumerate(Fake.values) if not np.isfinite(np.dtype(precision).type(value))}
    offsets = {item if item < 2 else item + 1 for item in wrong}
    assert {message.offset() for message, _ in output.refused} == offsets | {2}
    assert len(output.refused) == len(offsets) + 1, "each is refused once"
    assert {message.offset(): error.reason for message, error in output.refused} == {**dict.fromkeys(offsets, "vector"), 2: "schema"}
    rows: list[Rows] = output.rows
    assert {r.entity for r in rows} == {"user", "item"}
    for r in rows:
        assert r.keys.tolist() == [str(item).encode() for item in range(n) if item not in wrong]
        assert list(frames.encode(space, r)), "all that is left can be written"


def test_a_batch_of_nothing_but_bad_vectors_gives_no_rows() -> None:
    from tests.cluster import SPEC as PLAIN

    space = Space.parse(PLAIN.format(name="fake", partitions=1))
    infer = Infer(space, Fake(), Table(), Table())  # type: ignore[arg-type]
    messages = [message(space.inputs.clicks, event("click", user_id="1", item_id="1"), offset) for offset in range(3)]
    output = infer.rows(infer.forward(infer.read(messages)))
    assert output.rows == [] and len(output.refused) == 3


def test_entities_keyed_by_what_only_some_events_have() -> None:
    from tests.cluster import SPEC as PLAIN

    seen = '[entities.{0}.columns.seen]\nsource = "cr"\ndim = 8\naggregate = "latest"\n'
    text = (
        PLAIN.format(name="fake", partitions=1) + '[entities.shown]\nkey = "impression_id"\n' + seen.format("shown") + seen.format("seller")
    )
    space = Space.parse(text)
    infer = Infer(space, Fake(), Table(), Table())  # type: ignore[arg-type]
    values = [
        (space.inputs.impressions, event(user_id="0", item_id="0")),
        (space.inputs.clicks, event("click", user_id="0", item_id="0", impression_id="é" * 32)),
        (space.inputs.clicks, event("click", user_id="0", item_id="0", impression_id="é" * 33)),
    ]
    output = infer.rows(infer.forward(infer.read([message(topic, value, offset) for offset, (topic, value) in enumerate(values)])))
    assert [(refused.offset(), error.reason) for refused, error in output.refused] == [(2, "id")]
    rows = {rows.entity: rows.keys.tolist() for rows in output.rows}
    assert rows == {"user": [b"0", b"0"], "item": [b"0", b"0"], "shown": ["é".encode() * 32]}  # no event names a seller
