"""Two further comparisons for `crossrep verify`: counts against the source events, and a worker's RocksDB against the changelog."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from confluent_kafka import KafkaException, TopicPartition
from rich.table import Table
from rocksdict import AccessType, Options, Rdict

from crossrep import kafka
from crossrep.columnar import forget
from crossrep.control import lineage
from crossrep.errors import BadRecord, CrossrepError, StateError
from crossrep.keys import Keys
from crossrep.spec import Space
from schemas import codec
from streams import topics
from streams.proof.readout import Bounds, chosen, look, newest, settled
from streams.proof.verify import EXAMPLES, name_of, unfolded


@dataclass(frozen=True)
class Check:
    """One comparison of keys."""

    what: str
    keys: int
    note: str
    differences: int
    examples: tuple[str, ...]  # the first keys that differ, and in what


def table(checks: list[Check]) -> Table:
    rows = Table("compared", "keys", "", "differences", box=None)
    for check in checks:
        rows.add_row(check.what, f"{check.keys:,}", check.note, str(check.differences))
    return rows


def _check(what: str, keys: int, note: str, found: list[str]) -> Check:
    return Check(what, keys, note, len(found), tuple(found[:EXAMPLES]))


def _of_sample(keys: list[bytes], share: float) -> list[bytes]:
    return [keys[i] for i in np.flatnonzero(chosen(Keys.of(keys), share)).tolist()]


# --- counts against events ---


def events(space: Space, bootstrap: str, share: float = 1.0) -> list[Check]:
    """Every key's count against the impressions and clicks that name it, the refused ones (in the dead letters) left out.

    A rewind is no obstacle: the events it reads again must count once, as all others.

    Raises:
        CrossrepError: the comparison is not possible: events or frames are no longer whole, keys expire or were forgotten, frames came
            from elsewhere than `crossrep infer`; or this is no quiet moment: events are being sent, inferred or folded.
    """
    kinds = {space.inputs.impressions: "impression", space.inputs.clicks: "click"}
    log = settled(bootstrap, [*kinds, space.dead_letters_topic, space.frames_topic])
    _refuse_partial(space, bootstrap, log)
    group = f"infer.{space.name}"
    inferred = _committed(bootstrap, group, {topic: log[topic] for topic in kinds})
    if behind := unfolded(space, bootstrap, log[space.frames_topic]):
        raise CrossrepError(f"frames of partitions {sorted(behind)} are not folded yet. {_QUIET}")
    seen = look(space, bootstrap, share)
    letters = kafka.messages(bootstrap, space.dead_letters_topic, settled(bootstrap, [space.dead_letters_topic])[space.dead_letters_topic])
    refused = {(letter["topic"], letter["partition"], letter["offset"]) for letter in map(_letter, letters)}
    counts: dict[str, Counter[bytes]] = {entity: Counter() for entity in space.entities}
    waiting = 0
    for topic, kind in kinds.items():
        for message in kafka.messages(bootstrap, topic, log[topic]):
            place = (topic, message.partition(), message.offset())
            waiting += message.offset() >= inferred[topic, message.partition()]
            if place not in refused:
                _count(space, kind, message, counts)
    if waiting:
        raise CrossrepError(f"{waiting:,} events are not inferred yet. {_QUIET}")
    if any(settled(bootstrap, [topic])[topic] != log[topic] for topic in kinds):
        raise CrossrepError(f"events were sent meanwhile. {_QUIET}")
    return [
        _compare_counts(entity, counts[entity], dict(zip(seen.records[entity].keys, seen.records[entity].values["count"].tolist())), share)
        for entity in space.entities
    ]


_QUIET = "Counts can be compared with events only in a quiet moment: when nobody sends events, and all are inferred and folded"


def _refuse_partial(space: Space, bootstrap: str, log: dict[str, Bounds]) -> None:
    why = [f"{entity}s expire" for entity, spec in space.entities.items() if spec.expire_after is not None]
    for topic, bounds in log.items():
        if any(first > 0 for first, _ in bounds.values()):
            why.append(f"{topic} has lost its first messages to retention")
    if not why:
        orders = others = 0
        for message in kafka.messages(bootstrap, space.frames_topic, log[space.frames_topic]):
            if forget.is_order(message.value()):
                orders += 1
            else:
                source = lineage.decode(message)
                others += source is None or source.group != f"infer.{space.name}"
        why += [f"{orders} orders to forget a key were given"] * bool(orders)
        why += [f"{others} frames were written by others than crossrep infer"] * bool(others)
    if why:
        raise CrossrepError(f"counts cannot be compared with events: {'; '.join(why)}. Compare with the frames: without --events")


def _committed(bootstrap: str, group: str, log: dict[str, Bounds]) -> dict[tuple[str, int], int]:
    client = kafka.consumer(bootstrap, group)
    try:
        parts = kafka.committed(client, [TopicPartition(topic, number) for topic, bounds in log.items() for number in bounds])
        return {(part.topic, part.partition): part.offset for part in parts}
    except KafkaException as error:
        raise CrossrepError(f"the cluster does not say how far group {group!r} is: {error.args[0].str()}") from None
    finally:
        client.close()


def _letter(message: Any) -> dict[str, Any]:
    return codec("dead_letter").decode(message.value())


def _count(space: Space, kind: str, message: Any, counts: dict[str, Counter[bytes]]) -> None:
    try:
        event = codec(kind).decode(message.value())
    except BadRecord as error:
        place = f"{message.topic()}[{message.partition()}]@{message.offset()}"
        raise CrossrepError(f"{place} is no event ({error}), but is not among the dead letters: it was passed in silence") from None
    for entity, counted in counts.items():
        if id := event[space.key_field(entity)]:
            counted[id.encode()] += 1


def _compare_counts(entity: str, sent: Counter[bytes], held: dict[tuple[int, bytes], float], share: float) -> Check:
    sample = {key: sent[key] for key in _of_sample(list(sent), share)}
    found = [f"{name_of(entity, place)}: count {n:.0f}, by the events {sent[place[1]]}" for place, n in held.items() if n != sent[place[1]]]
    there = {key for _, key in held}
    found += [f"{entity} {key.decode()}: it is missing; by the events it counts {n}" for key, n in sample.items() if key not in there]
    return _check(f"{entity}: counts with events", len(sample), f"{sum(sample.values()):,} events", found)


# --- a worker's stores against the changelog ---


def stores(space: Space, bootstrap: str, folder: Path, share: float = 1.0) -> list[Check]:
    """Every key's bytes in a worker's RocksDB against the changelog, up to where each store says that it is true.

    The worker may be running. A key that has a newer record in the changelog may have lost the older one to compaction; where it differs
    from what is left, that cannot be told, and it is only counted.

    Raises:
        CrossrepError: there are no stores, or one is of another space or of topics that were made anew; or the cluster does not answer.
    """
    folders = sorted((path for path in folder.glob("partition-*") if path.is_dir()), key=lambda path: int(path.name.split("-")[1]))
    if not folders:
        raise CrossrepError(f"{folder} holds no partition-N; a worker's stores lie in its data folder, in {space.name}/<the worker's name>")
    ids = topics.topic_ids(kafka.admin(bootstrap), space)
    return [_compare_store(space, bootstrap, path, int(path.name.split("-")[1]), ids, share) for path in folders]


def _compare_store(space: Space, bootstrap: str, path: Path, number: int, ids: dict[str, str], share: float) -> Check:
    try:
        try:
            contents = dict(_contents(path))
        except Exception:  # its worker may just have compacted away what was being opened
            contents = dict(_contents(path))
    except Exception as error:  # rocksdict raises plain Exceptions
        return _check(path.name, 0, "damaged", [f"{path} cannot be read whole: {error}"])
    if _META not in contents:
        return _check(path.name, 0, "empty", [f"{path} has records, but does not say up to where they are true"] if contents else [])
    meta = json.loads(contents.pop(_META))
    if meta["space_hash"] != space.hash.hex() or meta["topic_ids"] != ids:
        raise StateError(f"{path} is of another spec, or of topics that were deleted and made anew; its worker would rebuild it")
    found: list[str] = []
    keys = untold = 0
    for i, entity in enumerate(space.entities):
        topic, upto = space.representations_topic(entity), meta["changelog"][entity]
        first, end = settled(bootstrap, [topic])[topic][number]
        truth = {key: value for (_, key), value in newest(bootstrap, topic, {number: (first, min(upto, end))}, share).items()}
        later = {key for _, key in newest(bootstrap, topic, {number: (min(upto, end), end)}, share)}
        held = {key[1:]: value for key, value in contents.items() if key[0] == i}
        here = {key: held[key] for key in _of_sample(list(held), share)}
        keys += len(here)
        for key in here.keys() | truth.keys():
            if here.get(key, b"") != truth.get(key, b""):
                if key in later:
                    untold += 1
                else:
                    found.append(f"{name_of(entity, (number, key))}: {_difference(here.get(key, b''), truth.get(key, b''))}")
    return _check(path.name, keys, f"{untold} overtaken" if untold else "", found)


_META = b"\xffmeta"  # the other keys begin with their entity's number


def _contents(path: Path) -> Iterator[tuple[bytes, bytes]]:
    """Everything in a store, opened read-only: as it is at this moment, beside the worker that owns it."""
    options = Options(raw_mode=True)
    options.set_max_open_files(-1)  # all at once: the worker's compactions may delete them meanwhile
    db = Rdict(str(path), options, access_type=AccessType.read_only())
    try:
        entries = db.iter()
        entries.seek_to_first()
        while entries.valid():
            yield entries.key(), entries.value()
            entries.next()
        entries.status()  # raises if the end came by a damaged block
    finally:
        db.close()


def _difference(here: bytes, there: bytes) -> str:
    if not here:
        return "it is missing in the store"
    if not there:
        return "the changelog does not have it"
    places = [i for i, (a, b) in enumerate(zip(here, there)) if a != b]
    return f"{len(places)} of {len(there)} bytes differ, the first at {places[0]}" if places else f"{len(here)} bytes, not {len(there)}"
