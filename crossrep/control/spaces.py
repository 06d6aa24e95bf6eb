"""The control topic `spaces`: from it readers learn everything about a space, knowing only its name, or a name that follows.

An alias, such as `current`, stands for the space that was promoted last. Both are keys of the topic, so a name is one or the other.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from crossrep import kafka
from crossrep.errors import CrossrepError, SpaceError, TopicError
from crossrep.kafka import Answer
from crossrep.spec import Space

SPACES_TOPIC = "spaces"  # compacted, one partition; name of a space or an alias -> JSON
MODELS_TOPIC = "models"  # likewise: space name -> the model that writes to it (crossrep/control/binding.py)
READ_WITHIN = 20.0  # seconds, of the whole topic
ASK_AGAIN = 0.5  # seconds after which a broker that knows no such topic, or no leader, is asked again
REMEMBERED = 50  # promotions that an alias keeps


@dataclass(frozen=True)
class Published:
    """A space as its owner published it."""

    space: Space
    topic_ids: dict[str, str]  # topic -> the id Kafka gave it when it was created
    rewinding: str = ""  # while a rewind is under way: how it was called; no worker may start on half of it
    rewound: int = 0  # how often events were set back to be read again; every frame says it (crossrep/control/lineage.py)
    retiring: bool = False  # from when its deletion began: nobody may begin to use it


@dataclass(frozen=True)
class Promotion:
    space: str
    at: float  # seconds since 1970, by the clock of who promoted


@dataclass(frozen=True)
class Alias:
    """A name that follows: it stands for the space promoted last."""

    name: str
    history: tuple[Promotion, ...]  # the newest last; at least one

    @property
    def space(self) -> str:
        return self.history[-1].space


def encode(published: Published) -> bytes:
    """The value on the control topic."""
    space = published.space
    said = {"spec": space.toml_dict, "hash": space.hash.hex(), "topic_ids": published.topic_ids}
    rewinds = {"rewinding": published.rewinding, "rewound": published.rewound}
    return json.dumps({**said, **rewinds, **({"retiring": True} if published.retiring else {})}, indent=1).encode()


def read_all(bootstrap: str | None = None, topic: str = SPACES_TOPIC) -> dict[str, bytes]:
    """What is published, by name, still to be decoded: one space that this version cannot read must not hide the others.

    Raises:
        TopicError: the topic must not be read.
        CrossrepError: the cluster does not answer, within READ_WITHIN.
    """
    address = kafka.bootstrap_servers(bootstrap)
    deadline = time.monotonic() + READ_WITHIN

    def in_time() -> None:
        if time.monotonic() > deadline:
            raise CrossrepError(
                f"Kafka at {address} answers, but does not hand out topic {topic} within {READ_WITHIN:g} s: it fell silent, or the "
                "partition has no leader. Try again when the cluster is healthy"
            )

    def watermarks() -> tuple[int, int]:
        in_time()
        first, end = client.get_watermark_offsets(TopicPartition(topic, 0), timeout=READ_WITHIN / 4)
        return first, end

    client = kafka.consumer(address, config=kafka.ENDS)
    try:
        try:
            if not _exists(client, topic, in_time):
                return {}
            first, _ = kafka.retried(watermarks, kafka.TRANSIENT)
        except KafkaException as error:
            raise CrossrepError(
                f"no Kafka answers at {address} ({error.args[0].str()}). Start one: crossrep kafka up, or set KAFKA_BOOTSTRAP"
            ) from None
        client.assign([TopicPartition(topic, 0, first)])
        found: dict[str, bytes] = {}
        while True:
            in_time()
            for message in client.consume(100, 0.1):
                if kafka.is_end(message):
                    return found
                if message.error():
                    if message.error().code() in kafka.TRANSIENT:
                        continue
                    raise _unreadable(topic, message.error())
                name = message.key().decode(errors="replace")
                if message.value() is None:
                    found.pop(name, None)
                else:
                    found[name] = message.value()
    finally:
        client.close()


def _exists(client: Consumer, topic: str, in_time: Callable[[], None]) -> bool:
    """Is there such a topic? Only if a broker twice knows none is there none: one that has just started may not have heard of it."""
    unknown = False
    while (error := client.list_topics(topic, timeout=READ_WITHIN / 2).topics[topic].error) is not None:
        if error.code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
            if unknown:
                return False
            unknown = True
        elif error.code() not in kafka.TRANSIENT:
            raise _unreadable(topic, error)
        in_time()
        time.sleep(ASK_AGAIN)
    return True


def _unreadable(topic: str, error: KafkaError) -> TopicError:
    return TopicError(f"topic {topic} cannot be read: {error.str()}. Where there are ACLs, everybody here needs READ on it")


def outlasting(ask: Callable[[], Answer]) -> Answer:
    """What `ask` gives, asked again while the cluster is away, for a minute at most; what else it raises it raises at once."""
    deadline = time.monotonic() + kafka.RETRY_FOR
    while True:
        try:
            return ask()
        except CrossrepError as error:
            if type(error) is not CrossrepError or time.monotonic() > deadline:
                raise
            time.sleep(ASK_AGAIN)


def find(name: str, bootstrap: str | None = None) -> Published:
    """One published space.

    Raises:
        SpaceError: there is none of that name, or it is an alias; says which there are.
    """
    return _of(name, read_all(bootstrap), bootstrap)


def resolve(name: str, bootstrap: str | None = None) -> Published:
    """The space of that name, or the one that an alias of that name stands for now: for readers. Workers belong to one space.

    Raises:
        SpaceError: there is neither, or it is being retired.
    """
    published = read_all(bootstrap)
    alias = aliases(published).get(name)
    found = _of(name if alias is None else alias.space, published, bootstrap)
    refuse_retiring(found)
    return found


def refuse_retiring(published: Published) -> None:
    """Raise SpaceError if its deletion has begun."""
    if published.retiring:
        name = published.space.name
        raise SpaceError(f"space {name!r} is being retired: parts of it are gone. Finish that: crossrep space retire {name}")


def refuse_rewinding(published: Published) -> None:
    """Raise SpaceError if a rewind of it is half done."""
    if published.rewinding:
        name = published.space.name
        raise SpaceError(
            f"a rewind of {name!r} was interrupted, and half of it is done. Finish it first: crossrep rewind {name} {published.rewinding}"
        )


def _of(name: str, published: Mapping[str, bytes], bootstrap: str | None) -> Published:
    known = aliases(published)
    if name in known:
        raise SpaceError(
            f"{name!r} is no space but stands for {known[name].space!r} now, and for another one tomorrow. Name the space here"
        )
    if name not in published:
        others = ", ".join([*sorted(published.keys() - known), *(f"{a.name} → {a.space}" for a in known.values())]) or "none yet"
        raise SpaceError(
            f"no space {name!r} at {kafka.bootstrap_servers(bootstrap)} (known: {others}). Create it: crossrep topics create SPEC.toml"
        )
    return decode(name, published[name])


def aliases(published: Mapping[str, bytes]) -> dict[str, Alias]:
    """The aliases among what `read_all` gives."""
    found = {}
    for name, value in published.items():
        try:
            said = json.loads(value)
            if "alias" in said:
                found[name] = Alias(name, tuple(Promotion(**each) for each in said["history"]))
        except (ValueError, KeyError, TypeError):
            continue  # whoever asks for it by its name is told
    return found


def promoted(published: Mapping[str, bytes], alias: str, space: str, bootstrap: str) -> bytes:
    """The control topic's value for an alias that stands for `space` from now on.

    Raises:
        SpaceError: a space is called like the alias, or there is no such space to promote.
    """
    known = aliases(published)
    if alias in published and alias not in known:
        raise SpaceError(f"{alias!r} is a space: an alias needs a name of its own")
    refuse_retiring(_of(space, published, bootstrap))
    former = known[alias].history if alias in known else ()
    history = (*former, Promotion(space, time.time()))[-REMEMBERED:]
    return json.dumps({"alias": space, "history": [asdict(each) for each in history]}, indent=1).encode()


def change(bootstrap: str, decide: Callable[[dict[str, bytes]], dict[str, bytes | None]]) -> None:
    """Write to the control topic what `decide` makes of it (None: delete), as if nobody else promoted or retired meanwhile.

    Raises:
        CrossrepError: somebody did, or the cluster does not answer: nothing was written; and whatever `decide` raises.
    """
    producer = kafka.transactional_producer(bootstrap, f"{SPACES_TOPIC}.control", 10.0)
    try:
        kafka.retried(lambda: producer.init_transactions(kafka.REQUEST_TIMEOUT))  # fences whoever has read before us and not yet written
        values = decide(read_all(bootstrap))
        producer.begin_transaction()
        for name, value in values.items():
            producer.produce(SPACES_TOPIC, value, name, partition=0)
        kafka.retried(producer.commit_transaction)
    except KafkaException as error:
        raise CrossrepError(
            f"topic {SPACES_TOPIC} was not written: {error.args[0].str()}. Somebody else may have promoted or retired at the same moment: "
            "look (crossrep space list) and repeat"
        ) from None


def decode(name: str, value: bytes) -> Published:
    """A space as published.

    Raises:
        SpecError, SpaceError: it is invalid here, or has not the hash it was published with: this crossrep is too old or too new for it.
    """
    try:
        declared = json.loads(value)
        spec, digest, topic_ids = declared["spec"], declared["hash"], declared["topic_ids"]
    except (ValueError, KeyError, TypeError) as error:
        raise SpaceError(f"what topic {SPACES_TOPIC} says of space {name!r} cannot be read: {error!r}") from None
    space = Space.from_dict(spec, source=f"space {name!r} on topic {SPACES_TOPIC}")
    if space.hash.hex() != digest:
        raise SpaceError(
            f"space {name!r} was published with hash {digest}, read here as {space.hash.hex()}: use the crossrep version that published it"
        )
    return Published(space, topic_ids, declared.get("rewinding", ""), declared.get("rewound", 0), declared.get("retiring", False))
