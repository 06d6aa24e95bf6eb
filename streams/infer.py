"""The inference worker: events in, the upstream model's representations of every sample out, as combined frames."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from confluent_kafka import Message

from crossrep.errors import BadEvent, BadRecord, CrossrepError, ModelError
from crossrep.frames import CLOCK_SKEW
from crossrep.rows import Rows
from crossrep.spec import MAX_KEY_BYTES, Space
from crossrep.writer import rows_of
from models.upstream import UpstreamModel
from schemas import codec
from streams import metrics, topics
from streams.features import FeatureView
from streams.pipeline import Options, Output, Pipeline, split_finite


def group_of(space: Space) -> str:
    return f"infer.{space.name}"


def check_model(space: Space, model: UpstreamModel) -> None:
    """Does the model give what the space aggregates?

    Raises:
        ModelError: an output is missing or has another dimension; names it.
    """
    for source, dim in space.sources.items():
        if model.outputs.get(source) != dim:
            given = ", ".join(f"{name}[{size}]" for name, size in model.outputs.items())
            raise ModelError(f"space {space.name!r} needs {source}[{dim}], but model {model.name!r} gives {given}")


class Infer:
    """The transform of a batch of impressions and clicks: decode, validate, gather features, forward."""

    def __init__(self, space: Space, model: UpstreamModel, users: FeatureView, items: FeatureView):
        self._space, self._model, self._users, self._items = space, model, users, items
        self._kinds = {space.inputs.impressions: "impression", space.inputs.clicks: "click"}
        self._codecs = {topic: codec(kind) for topic, kind in self._kinds.items()}

    def __call__(self, messages: Sequence[Message]) -> Output:
        output = Output()
        good: list[Message] = []
        events: list[dict[str, Any]] = []
        for message in messages:
            try:
                event = self._codecs[message.topic()].decode(message.value())
                check_event(event, message.timestamp()[1] / 1000)
            except BadRecord as error:
                output.refused.append((message, error))
            else:
                good.append(message)
                events.append(event)
        if events:
            self._forward(good, events, output)
        return output

    def _forward(self, messages: list[Message], events: list[dict[str, Any]], output: Output) -> None:
        times = np.array([event["event_time"] for event in events]) / 1000
        encoded = self._model.encode_events([event["scenario"] for event in events], [event["branch"] for event in events], times)
        users = self._users.rows([event["user_id"] for event in events])
        items = self._items.rows([event["item_id"] for event in events])
        sources = self._model.forward(users, items, encoded)
        finite, refused = split_finite(self._space, messages, {name: sources[name] for name in self._space.sources})
        output.refused += refused
        kinds = np.array([self._kinds[message.topic()] for message in messages])
        for entity in self._space.entities:
            rows = self._rows(entity, events, kinds, times, sources, finite)
            if rows is not None:
                output.rows.append(rows)

    def _rows(self, entity: str, events: list[dict[str, Any]], kinds: Any, times: Any, sources: Any, finite: Any) -> Rows | None:
        field = self._space.key_field(entity)
        ids = [event[field] for event in events]
        # Only an entity keyed by an optional field can have no id here; such an event does not count for it.
        taken = np.flatnonzero(finite & np.fromiter(map(bool, ids), np.bool_, len(ids)))
        if not len(taken):
            return None
        chosen = {name: array[taken] for name, array in sources.items()}
        return rows_of(self._space, entity, [ids[i] for i in taken], kinds[taken], times[taken], chosen)


def check_event(event: dict[str, Any], append_time: float) -> None:
    """What must hold of an event behind its schema.

    Args:
        append_time: the broker's time of the message, seconds since 1970.

    Raises:
        BadEvent: an id is missing or too long ("id"), the time is before 1970 or over five minutes after the append time ("time").
    """
    for name in ("user_id", "item_id"):
        if not event[name] or _too_long(event[name]):
            raise BadEvent("id", f"{name} {event[name]!r}: 1 to {MAX_KEY_BYTES} bytes are allowed")
    if _too_long(event["scenario"]):
        raise BadEvent("id", f"scenario {event['scenario']!r} is longer than {MAX_KEY_BYTES} bytes")
    if not 0 <= event["event_time"] <= (append_time + CLOCK_SKEW) * 1000:
        raise BadEvent("time", f"event_time {event['event_time']} ms: before 1970, or over 5 minutes after it was appended")


def _too_long(id: str) -> bool:
    # No character has over four bytes: most ids need not be encoded to know.
    return 4 * len(id) > MAX_KEY_BYTES and len(id.encode()) > MAX_KEY_BYTES


def run(space: Space, bootstrap: str, model: UpstreamModel, options: Options) -> None:
    """Infer until told to stop.

    Raises:
        CrossrepError: the space, its topics or the model do not fit; or the worker cannot go on. Says what to do.
    """
    topics.check(space, bootstrap)
    check_model(space, model)
    users = FeatureView("user", space.inputs.user_features, model, bootstrap)
    items = FeatureView("item", space.inputs.item_features, model, bootstrap)
    inputs = [space.inputs.impressions, space.inputs.clicks]
    pipeline = Pipeline(space, bootstrap, group_of(space), inputs, Infer(space, model, users, items), options)

    def ready() -> tuple[bool, dict[str, Any]]:
        skipped = users.skipped + items.skipped
        known: dict[str, Any] = {"space": space.name, "users": len(users), "items": len(items), "features_skipped": skipped}
        try:
            return pipeline.ready and users.caught_up and items.caught_up, known
        except CrossrepError as error:
            return False, {**known, "error": str(error)}

    server = metrics.serve(options.port, ready, lambda: metrics.of_stats("crossrep_infer", pipeline.stats))
    users.wait()
    items.wait()
    try:
        pipeline.run()
    finally:
        users.close()
        items.close()
        server.shutdown()
