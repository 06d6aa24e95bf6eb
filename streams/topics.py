"""Topics derived from a space: created, published, and checked before any worker starts."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

from confluent_kafka import KafkaError, KafkaException, TopicCollection
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource, NewTopic, ResourceType

from crossrep import kafka
from crossrep.control import spaces
from crossrep.control.spaces import MODELS_TOPIC, SPACES_TOPIC, Published
from crossrep.errors import CrossrepError, SpaceError, TopicError
from crossrep.spec import Space, fold_group, next_name
from state import history

TOMBSTONES_KEPT = 2 * 86_400  # seconds, delete.retention.ms of the representation topics
ERASED_WITHIN = 86_400  # seconds, max.compaction.lag.ms: after that, former records of a key are gone from the brokers' disks
_WEEK_MS = str(7 * 86_400_000)
# Event time is in the events. With it as record time, retention would delete a replay of 2022 within minutes.
_STREAM = {"message.timestamp.type": "LogAppendTime", "retention.ms": _WEEK_MS, "cleanup.policy": "delete"}
_COMPACTED = {"cleanup.policy": "compact"}


@dataclass(frozen=True)
class Topic:
    """A topic as it must be. `config` holds the settings whose wrong value would lose or stall something."""

    name: str
    partitions: int
    config: dict[str, str]
    shared: bool = False  # belongs to the platform: an existing one may have any number of partitions


# Of the platform, not of one space.
CONTROL = [Topic(SPACES_TOPIC, 1, _COMPACTED, shared=True), Topic(MODELS_TOPIC, 1, _COMPACTED, shared=True)]


def plan(space: Space) -> list[Topic]:
    """Every topic of a space, in the order of the flow."""
    inputs = space.inputs
    topics = [
        Topic(inputs.impressions, space.partitions, _STREAM, shared=True),
        Topic(inputs.clicks, space.partitions, _STREAM, shared=True),
        Topic(inputs.user_features, space.partitions, _COMPACTED, shared=True),
        Topic(inputs.item_features, space.partitions, _COMPACTED, shared=True),
        Topic(space.inference_topic, space.partitions, _STREAM),
        Topic(space.frames_topic, space.partitions, {**_STREAM, "max.message.bytes": str(8 << 20)}),
        Topic(space.samples_topic, space.partitions, _STREAM),
        Topic(space.training_topic, space.partitions, {**_STREAM, "max.message.bytes": str(8 << 20)}),
        Topic(space.dead_letters_topic, 1, {**_STREAM, "max.message.bytes": str(8 << 20)}),
    ]
    kept = space.history * (1 + 1 / history.POINTS) + 600
    topics.append(Topic(space.history_topic, space.partitions, {**_STREAM, "retention.ms": str(int(kept * 1000)), "segment.ms": "600000"}))
    compacted = {
        **_COMPACTED,
        "message.timestamp.type": "LogAppendTime",  # a worker's wrong clock must not decide when compaction comes
        "delete.retention.ms": str(TOMBSTONES_KEPT * 1000),
        "min.cleanable.dirty.ratio": "0.3",
        "max.compaction.lag.ms": str(ERASED_WITHIN * 1000),
    }
    topics += [Topic(space.representations_topic(entity), space.partitions, compacted) for entity in space.entities]
    return topics


def create(space: Space, bootstrap: str, replication: int = -1) -> list[str]:
    """Create what is missing, check what exists, publish the space. Safe to repeat. Returns the names of the topics created.

    Args:
        replication: of new topics; -1: the cluster's default.

    Raises:
        SpaceError: another spec was published under this name, it is an alias, or the space is being retired.
        TopicError: an existing topic does not fit; says which setting and how to change it.
        CrossrepError: the cluster does not answer, or refuses.
    """
    found = spaces.read_all(bootstrap)
    if alias := spaces.aliases(found).get(space.name):
        raise SpaceError(f"{space.name!r} is no free name: it stands for space {alias.space!r}. Give the space another one")
    published = spaces.decode(space.name, found[space.name]) if space.name in found else None
    if published is not None:
        _same_spec(space, published)
        spaces.refuse_retiring(published)
    admin = kafka.admin(bootstrap)
    existing = _existing(admin)
    missing = [topic for topic in [*CONTROL, *plan(space)] if topic.name not in existing]
    _check_topics(admin, [topic for topic in plan(space) if topic not in missing])
    if missing:
        _create_all(admin, missing, replication)
    ids = topic_ids(admin, space, new=bool(missing))
    if published is not None and published.topic_ids != ids:
        _renew(space, bootstrap, {name for name, id in ids.items() if published.topic_ids.get(name) != id})
    wanted = replace(published, space=space, topic_ids=ids) if published else Published(space, ids)
    if published != wanted:
        _keep_history(admin, space)
        publish(wanted, bootstrap)
    return [topic.name for topic in missing]


def publish(wanted: Published, bootstrap: str) -> None:
    """Tell everybody. Raises CrossrepError if the cluster does not take it."""
    producer = kafka.producer(bootstrap, acks="all")
    producer.produce(SPACES_TOPIC, spaces.encode(wanted), wanted.space.name)
    if producer.flush(kafka.REQUEST_TIMEOUT):
        raise CrossrepError(f"the space {wanted.space.name!r} could not be published to topic {SPACES_TOPIC}")


def _renew(space: Space, bootstrap: str, changed: set[str]) -> None:
    """Topics were deleted and created anew: begin from the recorded frames, if that gives the whole truth.

    Raises:
        TopicError: it does not; says why.
    """
    states = {space.representations_topic(entity) for entity in space.entities}
    new_frames = space.frames_topic in changed
    unchanged = states - changed | ({space.history_topic} - changed if new_frames else set())
    left = {name for name in unchanged if any(end for _, end in kafka.bounds(bootstrap, name).values())}
    if left:
        raise TopicError(f"{', '.join(sorted(changed))} was created anew, but {', '.join(sorted(left))} still holds old state. {_RENEW}")
    gone = {number: first for number, (first, _) in kafka.bounds(bootstrap, space.frames_topic).items() if first > 0}
    if gone:
        raise TopicError(
            f"the state of {space.name!r} cannot be built again: {space.frames_topic} has lost its first frames to retention (partition -> "
            f"first offset: {gone}). Create a new space"
        )
    admin = kafka.admin(bootstrap)  # its futures never end once it is gone
    for future in admin.delete_consumer_groups([fold_group(space)]).values():
        try:
            future.result()
        except KafkaException as error:
            if error.args[0].name() != "GROUP_ID_NOT_FOUND":
                raise TopicError(
                    f"the progress of group {fold_group(space)} must begin anew, but cannot be deleted: {error.args[0].str()}. Stop all "
                    "fold workers; one that has just ended counts until its session is over"
                ) from None


def _keep_history(admin: AdminClient, space: Space) -> None:
    """How long the history is kept may be changed by declaring it anew."""
    (wanted,) = (topic.config["retention.ms"] for topic in plan(space) if topic.name == space.history_topic)
    entry = ConfigEntry("retention.ms", wanted, incremental_operation=AlterConfigOpType.SET)
    resource = ConfigResource(ResourceType.TOPIC, space.history_topic, incremental_configs=[entry])
    kafka.retried(lambda: admin.incremental_alter_configs([resource])[resource].result(), _UNHEARD)


def check(space: Space, bootstrap: str) -> Published:
    """What a worker does before it starts: is the space published just so, and do its topics fit?

    Raises:
        SpaceError, TopicError: no; says what to do.
    """
    published = spaces.find(space.name, bootstrap)
    _same_spec(space, published)
    spaces.refuse_retiring(published)
    spaces.refuse_rewinding(published)
    _check_topics(kafka.admin(bootstrap), [*CONTROL, *plan(space)])
    same_topics(space, bootstrap, published)
    return published


def same_topics(space: Space, bootstrap: str, published: Published) -> None:
    """Are the topics that hold progress and state still those that were published?

    Raises:
        TopicError: no; says what to do.
    """
    admin = kafka.admin(bootstrap)
    missing = sorted(set(published.topic_ids) - _existing(admin))
    if missing:
        raise TopicError(f"{', '.join(missing)} is gone. {_RENEW}")
    ids = topic_ids(admin, space)
    changed = sorted(name for name, id in ids.items() if published.topic_ids.get(name) != id)
    if changed:
        raise TopicError(f"{', '.join(changed)} was deleted and created anew since space {space.name!r} was published. {_RENEW}")


_RENEW = (
    "The state that is recorded there is gone. To build it again from the recorded frames: stop all workers, delete all representation "
    "topics of the space, and crossrep topics create SPEC.toml"
)


# What a broker answers that has not heard of a new topic yet: another one than the one that showed it.
_UNHEARD = {KafkaError.UNKNOWN_TOPIC_OR_PART}


def topic_ids(admin: AdminClient, space: Space, new: bool = False) -> dict[str, str]:
    """The ids of the topics that hold a space's progress, state and history.

    Args:
        new: they were just created, so a broker may have to be asked again.

    Raises:
        CrossrepError: the cluster does not answer.
    """
    names = [space.frames_topic, space.history_topic, *(space.representations_topic(entity) for entity in space.entities)]

    def ask() -> dict[str, str]:
        described = admin.describe_topics(TopicCollection(names), request_timeout=kafka.REQUEST_TIMEOUT)
        return {name: str(future.result().topic_id) for name, future in described.items()}

    try:
        return kafka.retried(ask, _UNHEARD if new else ())
    except KafkaException as error:
        raise CrossrepError(f"the cluster does not describe {', '.join(names)}: {error.args[0].str()}") from None


def _same_spec(space: Space, published: Published) -> None:
    if published.space.hash != space.hash:
        raise SpaceError(
            f"space {space.name!r} was published with another spec (hash {published.space.hash.hex()}, not {space.hash.hex()}). Vectors of "
            "two specs are never mixed: give the new one another name, such as "
            f"{next_name(space.name)}, and create its topics"
        )


def _existing(admin: AdminClient) -> set[str]:
    try:
        return set(admin.list_topics(timeout=kafka.REQUEST_TIMEOUT).topics)
    except KafkaException as error:
        raise CrossrepError(f"no Kafka answers: {error.args[0].str()}. Start one: crossrep kafka up, or set KAFKA_BOOTSTRAP") from None


def _create_all(admin: AdminClient, topics: list[Topic], replication: int) -> None:
    new = [NewTopic(topic.name, topic.partitions, replication, config=topic.config) for topic in topics]
    for name, future in admin.create_topics(new, operation_timeout=kafka.REQUEST_TIMEOUT).items():
        try:
            future.result()
        except KafkaException as error:
            if error.args[0].name() != "TOPIC_ALREADY_EXISTS":
                raise CrossrepError(f"topic {name} cannot be created: {error.args[0].str()}") from None
    _wait_until_known(admin, {topic.name for topic in topics})


def _wait_until_known(admin: AdminClient, names: set[str]) -> None:
    """Brokers show a new topic only a moment after it was created."""
    deadline = time.monotonic() + kafka.REQUEST_TIMEOUT
    while missing := names - _existing(admin):
        if time.monotonic() > deadline:
            raise CrossrepError(f"topics {', '.join(sorted(missing))} were created, but the brokers do not show them")
        time.sleep(0.05)


def _check_topics(admin: AdminClient, topics: Iterable[Topic]) -> None:
    metadata = admin.list_topics(timeout=kafka.REQUEST_TIMEOUT).topics
    problems = []
    found = [topic for topic in topics if topic.name in metadata]
    problems += [f"{topic.name} is missing. Create it: crossrep topics create SPEC.toml" for topic in topics if topic.name not in metadata]
    problems += [
        f"{topic.name} has {len(metadata[topic.name].partitions)} partitions, the space declares {topic.partitions}; keys would move. "
        "Never add partitions to a space's topic: use a new space"
        for topic in found
        if not topic.shared and topic.partitions != len(metadata[topic.name].partitions)
    ]
    resources = [ConfigResource(ResourceType.TOPIC, topic.name) for topic in found]
    configs = {}
    if resources:
        configs = kafka.retried(lambda: {r.name: answer.result() for r, answer in admin.describe_configs(resources).items()}, _UNHEARD)
    for topic in found:
        for key, wanted in topic.config.items():
            value = configs[topic.name][key].value
            if key in ("cleanup.policy", "message.timestamp.type") and value != wanted:
                problems.append(
                    f"{topic.name} has {key}={value}, not {wanted}. Set it: "
                    f"kafka-configs.sh --alter --topic {topic.name} --add-config {key}={wanted}"
                )
            if key == "max.message.bytes" and int(value) < int(wanted):
                problems.append(f"{topic.name} has {key}={value}, less than {wanted}. Set it with kafka-configs.sh --alter")
    if problems:
        raise TopicError("the topics do not fit the space:\n" + "\n".join(f"  {problem}" for problem in problems))
