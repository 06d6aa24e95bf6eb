"""What a check of the doctor's says, and what checks share: limits of brokers' settings, and how numbers and lists are written."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from enum import StrEnum

from streams.operations.cluster_facts import Facts

REPLICAS = 3
DAY, WEEK = 86_400.0, 7 * 86_400.0  # seconds


class Status(StrEnum):
    """From good to bad."""

    OK = "ok"
    SKIPPED = "skipped"  # could not be learned
    WARNING = "warning"
    PROBLEM = "problem"


OK, SKIPPED, WARNING, PROBLEM = Status


@dataclass(frozen=True)
class Remark:
    status: Status
    found: str
    fix: str = ""


@dataclass(frozen=True)
class Finding:
    """What one check says."""

    check: str
    status: Status
    found: str
    why: str
    fixes: tuple[str, ...] = ()


Remarks = Iterator[Remark]


@dataclass(frozen=True)
class Limit:
    """A broker's setting must be from `least` to `most`, or "false" where that is what it is set to; `status` if it is not."""

    status: Status
    setting: str
    to: str  # what to set it to
    least: float = 0
    most: float = float("inf")
    several: bool = False  # a cluster of one broker need not care

    def holds(self, value: str) -> bool:
        return value == "false" if self.to == "false" else self.least <= float(value) <= self.most


def beyond(facts: Facts, *limits: Limit) -> Remarks:
    """Of each setting the first limit that does not hold on every broker that tells it."""
    done: set[str] = set()
    for limit in limits:
        name = limit.setting
        wrong = {id: told[name] for id, told in facts.brokers.items() if name in told and not limit.holds(told[name].value)}
        if not wrong or name in done or (limit.several and not facts.production):
            continue
        done.add(name)
        fix = f"{name}={limit.to} in server.properties of every broker, then restart them one by one"
        if all(found.dynamic for found in wrong.values()):
            change = f"--alter --entity-type brokers --entity-default --add-config {name}={limit.to}"
            fix = f"kafka-configs.sh --bootstrap-server {facts.bootstrap} {change}"
        values = ", ".join(dict.fromkeys(found.value for found in wrong.values()))
        yield Remark(limit.status, f"{name}={values} on broker {listed(wrong)}", fix)


def listed(things: Collection[object], most: int = 100) -> str:
    more = len(things) - most
    return ", ".join(str(thing) for thing in [*things][:most]) + (f" and {more} more" if more > 0 else "")


def written(seconds: float) -> str:
    for unit, size in (("d", DAY), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}" if seconds < 1e12 else "for ever"
    return f"{seconds:.3g} s"
