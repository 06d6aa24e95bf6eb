"""Handing over from a replay to the live stream: the new space's inference workers begin exactly behind the replay's cut."""

from __future__ import annotations

from confluent_kafka import KafkaException

from crossrep import kafka
from crossrep.control import groups
from crossrep.control.cuts import Cut
from crossrep.control.groups import Offsets
from crossrep.errors import CrossrepError, SpaceError, StateError
from crossrep.spec import Space, infer_group


def offsets(cut: Cut, archived: Space, space: Space, bootstrap: str) -> Offsets:
    """Where the space's inference workers have to begin. Empty: no events were inferred in front of the cut.

    Raises:
        SpaceError: the space reads other events than the archived one did.
        StateError: the events behind the cut are gone; the group has members; or it has been elsewhere already.
    """
    to, group = cut.groups.get(infer_group(archived), {}), infer_group(space)
    reads = {space.inputs.impressions, space.inputs.clicks}
    if foreign := sorted(to.keys() - reads):
        raise SpaceError(
            f"space {archived.name!r} was made of {', '.join(foreign)}, but space {space.name!r} reads {', '.join(sorted(reads))}: "
            "there is nothing to hand over to. Replay without it: --no-hand-over"
        )
    client = kafka.consumer(bootstrap)
    try:
        for topic, numbers in to.items():
            for number, offset in numbers.items():
                log = kafka.watermarks(client, topic, number)
                if groups.missed(offset, *log):
                    raise StateError(
                        f"the events behind the cut begin at {topic}[{number}]@{offset}, but those before {log[0]} were deleted. Archive "
                        "again, for a newer cut; with --until, say a later time. Or leave those out: --no-hand-over"
                    )
    finally:
        client.close()
    groups.refuse_active(bootstrap, group)
    for topic, numbers in groups.offsets(bootstrap, group).items():
        for number, offset in numbers.items():
            if offset != to.get(topic, {}).get(number):
                raise StateError(
                    f"group {group} is at {topic}[{number}]@{offset} already, and the cut at {to.get(topic, {}).get(number)}: events would "
                    "count twice, or not at all. Replay into a new space"
                )
    return to


def hand_over(space: Space, to: Offsets, bootstrap: str) -> None:
    """Let the inference workers begin there.

    Raises:
        CrossrepError: one was started meanwhile, or the cluster is away. Repeating the replay is safe.
    """
    if not to:
        return
    try:
        groups.move(bootstrap, infer_group(space), to)
    except KafkaException as error:
        raise CrossrepError(
            f"the offsets of group {infer_group(space)} cannot be set: {error.args[0].str()}. Stop its workers, and repeat the command"
        ) from None
