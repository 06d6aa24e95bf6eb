"""The inference worker: events in, the upstream model's representations of every sample out, as combined frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from confluent_kafka import Message
from numpy.typing import NDArray

from crossrep.columnar.frames import CLOCK_SKEW
from crossrep.control import binding
from crossrep.errors import BadRecord, CrossrepError, ModelError
from crossrep.spec import MAX_KEY_BYTES, Space, infer_group
from crossrep.writer import rows_of
from models.upstream import Identity, UpstreamModel
from schemas import codec
from schemas.columns import ColumnDecoder, Columns
from schemas.events import check_event
from streams import metrics, topics
from streams.inference.features import FeatureView
from streams.inference.pipeline import Options, Output, Pipeline
from streams.inference.vectors import narrowed


def check_model(space: Space, model: UpstreamModel, identity: Identity) -> None:
    """Does the model give what the space aggregates, and was it made for this space?

    Raises:
        ModelError: an output is missing or has another dimension, or it was registered for another space; names it.
    """
    if identity.space not in (None, space.name):
        raise ModelError(f"model {identity.label} was registered for space {identity.space!r}, not for {space.name!r}")
    for source, dim in space.sources.items():
        if model.outputs.get(source) != dim:
            given = ", ".join(f"{name}[{size}]" for name, size in model.outputs.items())
            raise ModelError(f"space {space.name!r} needs {source}[{dim}], but model {model.name!r} gives {given}")


@dataclass(frozen=True)
class Batch:
    """n events of one batch that can be read, and their features as the model takes them; B messages in all."""

    messages: list[Message]  # [n]
    refused: list[tuple[Message, BadRecord]]
    columns: Columns  # of all B messages
    places: NDArray[np.int64]  # [n], of the events in `columns`
    kinds: NDArray[np.str_]  # [n], "impression" or "click"
    times: NDArray[np.float64]  # [n], seconds since 1970
    users: NDArray[np.int32]  # [n, F] each
    items: NDArray[np.int32]
    events: NDArray[np.int32]


class Infer:
    """What happens to a batch of impressions and clicks, in three stages: read, forward, rows."""

    def __init__(self, space: Space, model: UpstreamModel, users: FeatureView, items: FeatureView):
        self._space, self._model, self._users, self._items = space, model, users, items
        self._topics = [space.inputs.impressions, space.inputs.clicks]
        self._kinds = np.array(["impression", "click"])
        self._codecs = [codec(kind) for kind in self._kinds.tolist()]
        known = {field["name"] for codec in self._codecs for field in codec.newest["fields"] if field["name"] != "event_time"}
        # What no event names is left to other writers of the space.
        self._keys = {entity: space.key_field(entity) for entity in space.entities if space.key_field(entity) in known}
        self._optional = sorted({"scenario", *self._keys.values()} - {"user_id", "item_id", "branch"})
        self._decoder = ColumnDecoder(self._codecs, ["user_id", "item_id", "event_time", "branch", *self._optional])

    def read(self, messages: Sequence[Message]) -> Batch:
        """Decode, check, look up features."""
        kinds = np.fromiter(map(self._topics.index, map(Message.topic, messages)), np.int8, len(messages))
        columns = self._decoder.decode(list(map(Message.value, messages)), kinds)
        appended = np.array([message.timestamp()[1] for message in messages])
        good = columns.sure & _within_bounds(columns, appended, self._optional)
        refused: list[tuple[Message, BadRecord]] = []
        for i in np.flatnonzero(~good).tolist():
            try:
                check_event(self._codecs[kinds[i]].decode(messages[i].value()), appended[i] / 1000, self._optional)
                if not columns.whole[i]:
                    raise BadRecord("undecodable", "written in a way that Avro's specification does not know")
                good[i] = True
            except BadRecord as error:
                refused.append((messages[i], error))
        places = np.flatnonzero(good)
        times = columns.of("event_time")[places] / 1000
        return Batch(
            [messages[i] for i in places.tolist()],
            refused,
            columns,
            places,
            self._kinds[kinds[places]],
            times,
            self._users.rows(columns.keys("user_id", places)),
            self._items.rows(columns.keys("item_id", places)),
            self._model.encode_events(columns.texts("scenario", places), columns.texts("branch", places), times),
        )

    def forward(self, batch: Batch) -> tuple[Batch, dict[str, NDArray[np.float32]]]:
        """The model's outputs for the batch, float32 [n, dim] each."""
        return batch, self._model.forward(batch.users, batch.items, batch.events) if len(batch.places) else {}

    def rows(self, inferred: tuple[Batch, dict[str, NDArray[np.float32]]]) -> Output:
        """Rows of every entity."""
        batch, outputs = inferred
        if not len(batch.places):
            return Output([], batch.refused)
        sources, finite, refused = narrowed(self._space, batch.messages, {name: outputs[name] for name in self._space.sources})
        output = Output([], batch.refused + refused)
        for entity, field in self._keys.items():
            # Only an entity keyed by an optional field can have no id here; such an event does not count for it.
            taken = finite[~batch.columns.empty(field, batch.places[finite])]
            if len(taken):
                chosen = sources if len(taken) == len(batch.places) else {name: array[taken] for name, array in sources.items()}
                keys = batch.columns.keys(field, batch.places[taken])
                output.rows.append(rows_of(self._space, entity, keys, batch.kinds[taken], batch.times[taken], chosen))
        return output


def _within_bounds(columns: Columns, appended: NDArray[np.int64], optional: Sequence[str]) -> NDArray[np.bool_]:
    """What `check_event` checks, of all events at once: bool [n]. `appended` is in ms since 1970."""
    times = columns.of("event_time")
    good: NDArray[np.bool_] = (times >= 0) & (times <= appended + int(1000 * CLOCK_SKEW))
    for name in ("user_id", "item_id"):
        good &= columns.of(name) > 0
    for name in ("user_id", "item_id", *optional):
        good &= columns.of(name) <= MAX_KEY_BYTES
    return good


def run(space: Space, bootstrap: str, model: UpstreamModel, identity: Identity, options: Options, accept_model: bool = False) -> None:
    """Infer until told to stop.

    Args:
        accept_model: take the place of the model that has written to the space until now.

    Raises:
        CrossrepError: the space, its topics or the model do not fit; or the worker cannot go on. Says what to do.
    """
    published = topics.check(space, bootstrap)
    check_model(space, model, identity)
    binding.bind(published, identity, bootstrap, accept_model)
    users = FeatureView("user", space.inputs.user_features, model, bootstrap)
    items = FeatureView("item", space.inputs.item_features, model, bootstrap)
    inputs = [space.inputs.impressions, space.inputs.clicks]
    work = Infer(space, model, users, items)
    admit = partial(binding.check, published, identity, bootstrap)
    pipeline = Pipeline(space, bootstrap, infer_group(space), inputs, [work.read, work.forward, work.rows], options, admit)

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
