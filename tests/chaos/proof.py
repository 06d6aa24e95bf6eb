"""Bring the system to rest and hold everything it shows against the truth."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
from confluent_kafka import TopicPartition

from crossrep import LocalView, kafka
from crossrep.errors import CrossrepError
from schemas import codec
from streams.proof.verify import verify
from tests import cluster
from tests.chaos.load import Place
from tests.chaos.world import PATIENCE, Stuck, World, until
from tests.streams import small_model

Differences = Counter[str]  # what is wrong → how often


def prove(world: World) -> Differences:
    """Everything that is wrong, once all is inferred and folded; empty when nothing is. The load pauses meanwhile.

    Raises:
        Stuck: it never comes to rest.
    """
    world.wait_until_well()
    try:
        world.load.pause(PATIENCE)
    except AssertionError as error:
        return Differences({str(error): 1})
    until(lambda: _asked(lambda: small_model.inferred(world.space, world.bootstrap)), "all events inferred")
    until(lambda: _asked(lambda: cluster.settled(world.space, world.bootstrap)), "all frames folded")
    until(world.observer.caught_up, "the observer has read everything")
    world.observer.rest()
    found = Differences(dict.fromkeys(world.all_problems(), 1))
    found += _counts(world) + _letters(world) + _views(world)
    found += Differences({f"a key went back: {said}": 1 for said in world.observer.went_back})
    world.load.resume()
    return found


def _asked(question: Callable[[], bool]) -> bool:
    """An answer that a cluster on its way back cannot give is a no."""
    try:
        return question()
    except CrossrepError:
        return False


def _counts(world: World) -> Differences:
    """Every key's count and vectors against an independent computation, and their sums against what was acknowledged."""
    found = Differences()
    try:
        verdicts = verify(world.space, world.bootstrap)
    except CrossrepError as error:
        return Differences({f"verify: {error}": 1})
    for verdict in verdicts:
        truth = world.load.counts[verdict.entity]
        found[f"{verdict.entity}s that differ from the independent computation: {verdict}"] += verdict.differences
        found[f"{verdict.entity}: {verdict.events} events counted, {truth} acknowledged"] += abs(verdict.events - truth)
    return found


def _letters(world: World) -> Differences:
    """Each poison message must be in the dead letters once, and nothing else."""
    letters = Counter(read_letters(world))
    poison = Counter(world.load.poison)
    found = Differences({f"poison without a dead letter: {place}": 1 for place in poison - letters})
    for place, times in (letters - poison).items():
        found[f"{'doubled dead letter' if place in poison else 'dead letter of a good message'}: {place}"] += times
    return found


def read_letters(world: World) -> list[Place]:
    """Where each dead letter says that it stood."""
    topic = world.space.dead_letters_topic
    client = kafka.consumer(world.bootstrap, config=kafka.ENDS)
    places: list[Place] = []
    try:
        client.assign([TopicPartition(topic, 0, 0)])
        while True:
            for message in client.consume(1000, 0.1):
                if kafka.is_end(message):
                    return places
                if message.error() is None:
                    letter = codec("dead_letter").decode(message.value())
                    places.append((letter["topic"], letter["partition"], letter["offset"]))
    finally:
        client.close()


def _views(world: World) -> Differences:
    """The views that were open all along against fresh ones."""
    found = Differences()
    for entity, held in world.views.items():
        with world.view(entity) as fresh:
            try:
                fresh.wait(PATIENCE)
                until(lambda held=held: held.lag == 0 and _unlike(held, fresh) == 0, "", 10)  # type: ignore[misc]
            except CrossrepError as error:
                found[f"the view of {entity}s is dead: {error}"] += 1
            except Stuck:
                found[f"{entity}s that a view held open shows otherwise than a fresh one"] += max(1, _unlike(held, fresh))
    return found


def _unlike(held: LocalView, fresh: LocalView) -> int:
    """Keys that two views show differently."""
    ids = sorted(set(held.ids()) | set(fresh.ids()))
    one, two = held.get(ids, at=0.0), fresh.get(ids, at=0.0)
    unlike = (one.found != two.found) | (one.counts != two.counts) | (one.event_times != two.event_times)
    for name in one:
        for a, b in zip(vars(one[name]).values(), vars(two[name]).values()):
            unlike |= ~np.all(np.isclose(a, b, rtol=0, atol=0, equal_nan=True).reshape(len(ids), -1), axis=1)
    return int(unlike.sum())
