"""`crossrep frame`: one Avro record per sample in, frames out. For models that cannot write frames themselves."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from confluent_kafka import Message

from crossrep.columnar.frames import CLOCK_SKEW, EVENT_WEIGHT_LIMIT
from crossrep.errors import BadEvent, BadRecord
from crossrep.spec import MAX_KEY_BYTES, Space, frame_group
from crossrep.writer import rows_of
from schemas import codec
from streams import metrics, topics
from streams.inference.pipeline import Options, Output, Pipeline
from streams.inference.vectors import narrowed

CODEC = codec("inference")


class Frame:
    """What happens to a batch of per-sample inference outputs."""

    def __init__(self, space: Space):
        self._space = space

    def __call__(self, messages: Sequence[Message]) -> Output:
        output = Output()
        good: list[Message] = []
        samples: list[dict[str, Any]] = []
        for message in messages:
            try:
                sample = CODEC.decode(message.value())
                check_sample(self._space, sample, message.timestamp()[1] / 1000)
            except BadRecord as error:
                output.refused.append((message, error))
            else:
                good.append(message)
                samples.append(sample)
        sources = {
            name: np.frombuffer(b"".join(s["vectors"].get(name) or bytes(4 * dim) for s in samples), "<f4").reshape(-1, dim)
            for name, dim in self._space.sources.items()
        }
        vectors, finite, refused = narrowed(self._space, good, sources)
        output.refused += refused
        members = defaultdict(list)
        for i in finite.tolist():
            for entity in samples[i]["keys"]:
                members[entity].append(i)
        for entity, rows in members.items():
            chosen = [samples[i] for i in rows]
            weights = np.array([s["weight"] or self._space.weights[s["event"]] for s in chosen])
            times = np.array([s["event_time"] for s in chosen]) / 1000
            ids = [s["keys"][entity] for s in chosen]
            own = {name: array[rows] for name, array in vectors.items()}
            output.rows.append(rows_of(self._space, entity, ids, [s["event"] for s in chosen], times, own, weights))
        return output


def check_sample(space: Space, sample: dict[str, Any], append_time: float) -> None:
    """What must hold of a sample behind its schema.

    Raises:
        BadEvent: reason "event", "time", "weight", "entity", "id" or "vector".
    """
    if sample["event"] not in space.weights:
        raise BadEvent("event", f"{sample['event']!r} is not in the space's [weights]: {', '.join(space.weights)}")
    if not 0 <= sample["event_time"] <= (append_time + CLOCK_SKEW) * 1000:
        raise BadEvent("time", f"event_time {sample['event_time']} ms: before 1970, or over 5 minutes after it was appended")
    weight = sample["weight"]
    if weight is not None and not 0 < weight <= EVENT_WEIGHT_LIMIT:
        raise BadEvent("weight", f"weight {weight}: finite and > 0")
    if not sample["keys"]:
        raise BadEvent("entity", "keys is empty: the sample counts for nothing")
    for source, dim in space.sources.items():  # also those that no entity of the sample needs: they stand in the same array
        if len(sample["vectors"].get(source, b"")) not in (0, 4 * dim):
            raise BadEvent("vector", f"vector {source!r} must be {dim} float32")
    for entity, id in sample["keys"].items():
        if entity not in space.entities:
            raise BadEvent("entity", f"{entity!r} is not an entity of space {space.name!r}")
        if not 0 < len(id.encode()) <= MAX_KEY_BYTES:
            raise BadEvent("id", f"{entity} id {id!r}: 1 to {MAX_KEY_BYTES} bytes are allowed")
        for name, column in space.entities[entity].columns.items():
            if column.dim and len(sample["vectors"].get(column.source, b"")) != 4 * column.dim:
                raise BadEvent("vector", f"{entity}.{name} needs vector {column.source!r} of {column.dim} float32")


def run(space: Space, bootstrap: str, options: Options) -> None:
    """Frame until told to stop. Raises CrossrepError as `infer.run` does."""
    topics.check(space, bootstrap)
    pipeline = Pipeline(space, bootstrap, frame_group(space), [space.inference_topic], [Frame(space)], options)
    about = {"space": space.name}
    server = metrics.serve(options.port, lambda: (pipeline.ready, about), lambda: metrics.of_stats("crossrep_frame", pipeline.stats))
    try:
        pipeline.run()
    finally:
        server.shutdown()
