"""Making an alias stand for another space, and what speaks against it."""

from __future__ import annotations

from crossrep.control import spaces, workers
from crossrep.control.spaces import Published
from crossrep.rollout import comparing
from crossrep.rollout.comparing import Progressed

COVERAGE = 0.99  # share of the former's keys that the new one has at least, in every entity
CAUGHT_UP_WITHIN = 10.0  # seconds in which its workers get to where their inputs end now


def objections(former: Published | None, new: Published, bootstrap: str, progressed: Progressed = lambda offsets: None) -> list[str]:
    """Why readers would be worse off, in one line each; empty: nothing speaks against it.

    Raises:
        SpaceError, TopicError: one of the two is being rewound or retired, or its topics are not those that were published.
        CrossrepError: the cluster does not answer.
    """
    name, found = new.space.name, []
    for role in workers.falls_behind(new.space, bootstrap, CAUGHT_UP_WITHIN):
        found.append(f"its {role} workers are behind: within {CAUGHT_UP_WITHIN:g} s they did not get to where their input ended")
    if former is not None:
        found += comparing.missing(former.space, new.space)
        for pair in comparing.compare(former, new, bootstrap, sample=0, progressed=progressed):
            if pair.coverage < COVERAGE:
                found.append(f"it has {pair.both:,} of the {pair.a.keys:,} {pair.entity} keys of {former.space.name}: {pair.coverage:.1%}")
    return [f"{name}: {objection}" for objection in found]


def promote(alias: str, space: str, bootstrap: str) -> str | None:
    """Let the alias stand for the space from now on. Returns the former one; None: there was none.

    Raises:
        SpaceError: there is no such space, it is being retired, or the alias is a space's name.
        CrossrepError: the cluster does not take it, or somebody else promoted in the same moment; nothing is changed then.
    """
    former: list[str] = []

    def decide(published: dict[str, bytes]) -> dict[str, bytes | None]:
        former.extend(found.space for found in spaces.aliases(published).values() if found.name == alias)
        return {alias: spaces.promoted(published, alias, space, bootstrap)}

    spaces.change(bootstrap, decide)
    return former[0] if former else None
