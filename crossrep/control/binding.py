"""Which model writes to a space: recorded on the compacted control topic `models` before its first frame, and asked at every assignment.

Vectors of two models must never be averaged, and nothing in a frame tells them apart. So who is the first to bring vectors binds the space
to the weights that made them, by their digest, and whoever brings those of others is refused: inference workers, imports and replays.
Snapshots and archives say which model their vectors are of. What keeps it exact:

- Two that bind at once: one transactional id for the whole topic. Whoever initialises it fences the other, and reads what is bound only
  then. An id a space would not do: what another space's binder leaves open when it is killed hides all that is committed behind it.
- A binding holds for one frames topic, by its id. Where that was made anew, the state is made anew too, and any model may begin.
- `--accept-model` binds anew, and only while the group has no member. A worker that was suspended meanwhile comes back as a new member
  and asks again; a batch of before carries the group's former generation and cannot be committed.

Who brings vectors of a model that we do not know is trusted to know it: FrameWriter, `crossrep frame`, Parquet of unknown origin, snapshots
and archives of spaces that those have filled. They bind nothing and are not asked.
"""

from __future__ import annotations

import json
import random
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from confluent_kafka import KafkaError, KafkaException

from crossrep import kafka
from crossrep.control import groups, spaces
from crossrep.control.spaces import MODELS_TOPIC, Published
from crossrep.errors import CrossrepError, ModelError, SpaceError, TopicError
from crossrep.spec import infer_group, next_name

TIMEOUT = 10.0  # seconds the transaction may stay open
_LOST = {KafkaError._FENCED, KafkaError._FATAL, KafkaError.PRODUCER_FENCED, KafkaError.INVALID_PRODUCER_EPOCH}


@dataclass(frozen=True)
class Model:
    """Which weights make vectors, or have made them."""

    label: str  # for people: kuairand@3, or the folder they were loaded from
    digest: str  # SHA-256 of the model's files


@dataclass(frozen=True)
class Binding(Model):
    """The model of a space."""

    frames: str  # the frames topic's id
    since: str  # when it was bound, UTC


def bind(published: Published, model: Model, bootstrap: str, accept: bool = False) -> None:
    """Make the model the space's, unless another one is.

    Args:
        accept: take the place of another one.

    Raises:
        ModelError: the space is another model's.
        StateError: `accept` while workers of it run.
        TopicError: there is no topic to record it on.
        CrossrepError: the cluster does not answer.
    """
    bound = read(published, bootstrap)
    if bound is not None and bound.digest == model.digest:
        return None
    if accept:
        groups.refuse_active(bootstrap, infer_group(published.space))
    space = published.space
    deadline = time.monotonic() + kafka.RETRY_FOR
    while True:
        producer = kafka.transactional_producer(bootstrap, f"{MODELS_TOPIC}.control", TIMEOUT)
        try:
            if MODELS_TOPIC not in producer.list_topics(timeout=kafka.REQUEST_TIMEOUT).topics:
                raise TopicError(
                    f"topic {MODELS_TOPIC} is missing: the topics of space {space.name!r} are an older crossrep's. Once more: crossrep "
                    "topics create SPEC.toml"
                )
            kafka.retried(lambda: producer.init_transactions(kafka.REQUEST_TIMEOUT))  # noqa: B023  called at once
            if not accept:
                bound = read(published, bootstrap)
                if bound is not None:
                    return refuse_other(published, model, bound)
            wanted = Binding(model.label, model.digest, _frames(published), datetime.now(UTC).isoformat(timespec="seconds"))
            producer.begin_transaction()
            producer.produce(MODELS_TOPIC, json.dumps(asdict(wanted)).encode(), space.name)
            kafka.retried(producer.commit_transaction)
            return None
        except KafkaException as error:
            problem = error.args[0]
            if not (problem.code() in _LOST or problem.txn_requires_abort()) or time.monotonic() > deadline:
                raise CrossrepError(f"the model of space {space.name!r} cannot be recorded: {problem.str()}. Try again") from None
            time.sleep(random.uniform(0, 0.5))  # somebody else binds a space at this moment


def check(published: Published, model: Model, bootstrap: str) -> None:
    """Is the space still this model's? Waits out a cluster that is away. Raises ModelError: it is not."""
    spaces.outlasting(lambda: refuse_other(published, model, read(published, bootstrap)))


def read(published: Published, bootstrap: str) -> Binding | None:
    """The space's model; None: it has none yet."""
    value = spaces.read_all(bootstrap, MODELS_TOPIC).get(published.space.name)
    try:
        found = None if value is None else Binding(**json.loads(value))
    except (ValueError, TypeError) as error:
        raise SpaceError(f"what topic {MODELS_TOPIC} says of space {published.space.name!r} cannot be read: {error!r}") from None
    return found if found is not None and found.frames == _frames(published) else None


def model_of(published: Published, bootstrap: str) -> Model | None:
    """Whose vectors are in a space's state and frames: for what is taken of them. None: nobody told.

    Ask when they have been read, or their ends: a model is bound before its first frame.
    """
    bound = read(published, bootstrap)
    return None if bound is None else Model(bound.label, bound.digest)


def refuse_other(published: Published, model: Model, bound: Binding | None) -> None:
    """Raises ModelError if the space is another model's."""
    name = published.space.name
    if bound is None or bound.digest != model.digest:
        whose = "no model's any more" if bound is None else f"that of model {bound.label} ({bound.digest[:12]}) since {bound.since}"
        raise ModelError(
            f"space {name!r} is {whose}, not of {model.label} ({model.digest[:12]}). Vectors of two models are never averaged: give this "
            f"one a space of its own, crossrep models space {model.label} --like {name} (it will be called {next_name(name)})"
        )


def _frames(published: Published) -> str:
    return published.topic_ids[published.space.frames_topic]
