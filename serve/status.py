"""The state of the whole flow for the page, collected in a thread of its own, and only while somebody looks at the page."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from confluent_kafka import KafkaException

from crossrep.control.workers import lag
from crossrep.spec import Space
from serve.answers import lag as replica_lag
from serve.cluster import Cluster, Freshness, Look, Member, Rates
from serve.letters import DeadLetters
from serve.replica import Replica
from serve.workers import Workers

log = logging.getLogger(__name__)

EVERY = 0.5  # seconds between looks at offsets
SELDOM = 2.0  # seconds between looks at everything else
WATCHED = 10.0  # seconds after the last question for which looking goes on


class Status:
    """Everything that the page shows, as plain data.

    Nobody looks: nothing is asked and no connection is open. The cluster is away: `error` says so, and the last that was seen stays.

    Args:
        folder: where the replicas' disks are, one folder an entity.
        workers: addresses of fold workers, whose restore progress is then known.
    """

    def __init__(self, space: Space, bootstrap: str, replicas: Mapping[str, Replica], folder: Path, workers: tuple[str, ...]):
        self._space, self._bootstrap, self._replicas, self._folder = space, bootstrap, replicas, folder
        self._digest = space.hash.hex()
        self._workers = Workers(space.name, workers)
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._asked = 0.0  # monotonic
        self._looked: float | None = None  # monotonic
        self._error: str | None = None
        self._flow: dict[str, Any] | None = None
        self._disks: dict[str, int] = {}

    def said(self) -> dict[str, Any]:
        """The state as of the last look. Does not wait; the first question only begins the looking. Raises CrossrepError."""
        self._asked = now = time.monotonic()
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="status", daemon=True)
                self._thread.start()
        return {
            "space": self._space.name,
            "hash": self._digest,
            "time": time.time(),
            "looked": None if self._looked is None else now - self._looked,
            "error": self._error,
            "weights": self._space.weights,
            "entities": {name: self._of_entity(name, replica) for name, replica in self._replicas.items()},
            "flow": self._flow,
        }

    def _of_entity(self, name: str, replica: Replica) -> dict[str, Any]:
        return {
            "topic": self._space.representations_topic(name),
            "caught_up": replica.caught_up,
            "lag": replica_lag(replica),
            "keys": replica.keys,
            "keys_exact": replica.recent.whole,
            "keys_in_memory": len(replica.recent),
            "slots": replica.recent.capacity,
            "record_bytes": replica.layout.size,
            "disk_bytes": self._disks.get(name),
            "stream_time": replica.stream_time,
            "columns": {
                column: {"dim": spec.dim, "half_life": spec.half_life, "events": spec.events}
                for column, spec in self._space.entities[name].columns.items()
            },
        }

    def _run(self) -> None:
        while not self._left():
            watch = _Watch(self._space, self._bootstrap, self._workers)
            try:
                while not self._left():
                    self._flow = watch.look()
                    self._looked, self._error = time.monotonic(), None
                    self._disks = {name: _size(self._folder / name) for name in self._replicas} if watch.seldom else self._disks
                    time.sleep(EVERY)
            except (KafkaException, TimeoutError) as error:
                said = error.args[0].str() if isinstance(error, KafkaException) else "it does not answer"
                self._error = f"the cluster at {self._bootstrap} cannot be asked: {said}"
            except Exception as error:
                log.exception("looking at the cluster failed")
                self._error = f"looking at the cluster failed: {error}; the log says more"
            finally:
                watch.close()
            if self._error is not None:
                time.sleep(EVERY)

    def _left(self) -> bool:
        """Has everybody left? Then this thread is not there any more either."""
        with self._lock:
            if time.monotonic() < self._asked + WATCHED:
                return False
            self._thread = None
            return True


class _Watch:
    """One stretch of looking, over one set of connections."""

    def __init__(self, space: Space, bootstrap: str, workers: Workers):
        self._space, self._workers = space, workers
        self._cluster = Cluster(space, bootstrap)
        self._letters = DeadLetters(bootstrap, space.dead_letters_topic)
        self._rates, self._freshness = Rates(), Freshness()
        self._members: dict[str, list[Member]] = {}
        self._newest: dict[str, float] = {}
        self._next = 0.0
        self.seldom = False  # was the last look one at everything?

    def look(self) -> dict[str, Any]:
        self.seldom = time.monotonic() >= self._next
        if self.seldom:
            self._next = time.monotonic() + SELDOM
            self._cluster.describe()
            self._members, self._newest = self._cluster.members(), self._cluster.newest()
            if self._space.dead_letters_topic in self._cluster.topics:
                self._letters.look()
            self._workers.look()
        look = self._cluster.look()
        self._freshness.add(look)
        counters: dict[str, float] = {f"topic {name}": self._sum(look.ends, name) for name in self._cluster.topics}
        for role, committed in look.committed.items():
            counters[f"stage {role}"] = sum(committed.values())
        if self._workers.partitions:
            counters["rows"] = sum(facts.get("rows_total", 0.0) for facts in self._workers.partitions.values())
        self._rates.add(look.at, counters)
        return {
            "topics": {name: self._of_topic(name, look) for name in self._cluster.topics},
            "stages": {role: self._of_stage(role, look) for role in self._cluster.stages},
            "partitions": self._of_partitions(look),
            "freshness": {"seconds": self._freshness.seconds, "waiting": self._freshness.waiting()},
            "rows_per_second": self._rates.of("rows"),
            "dead_letters": self._letters.said(),
            "workers": [{"url": url, "error": self._workers.errors.get(url)} for url in self._workers.urls],
        }

    def close(self) -> None:
        self._letters.close()

    def _sum(self, offsets: Mapping[tuple[str, int], int], topic: str) -> int:
        return sum(offset for (name, _), offset in offsets.items() if name == topic)

    def _of_topic(self, name: str, look: Look) -> dict[str, Any]:
        return {
            "partitions": self._cluster.topics[name],
            "end": self._sum(look.ends, name),
            "per_second": self._rates.of(f"topic {name}"),
            "newest": self._newest.get(name),
        }

    def _of_stage(self, role: str, look: Look) -> dict[str, Any]:
        stage, committed = self._cluster.stages[role], look.committed[role]
        behind = [lag(role, end, committed.get(place)) for place, end in look.ends.items() if place[0] in stage.topics]
        return {
            "group": stage.group,
            "topics": stage.topics,
            "used": bool(committed),
            "lag": sum(behind),
            "per_second": self._rates.of(f"stage {role}"),
            "members": [{"name": m.name, "host": m.host, "partitions": len(m.places)} for m in self._members.get(role, [])],
        }

    def _of_partitions(self, look: Look) -> list[dict[str, Any]]:
        """Of the fold: who owns each, how far behind it is, and how far restored as its worker says."""
        topic, committed = self._space.frames_topic, look.committed["fold"]
        owners = {number: member for member in self._members.get("fold", []) for name, number in member.places if name == topic}
        rows = []
        for number in range(self._cluster.topics.get(topic, 0)):
            end, position, owner = look.ends.get((topic, number)), committed.get((topic, number)), owners.get(number)
            facts = self._workers.partitions.get(number)
            rows.append(
                {
                    "number": number,
                    "owner": owner and owner.name,
                    "host": owner and owner.host,
                    "position": position,
                    "end": end,
                    "lag": None if end is None else lag("fold", end, position),
                    "worker": facts,
                }
            )
        return rows


def _size(folder: Path) -> int:
    """Bytes of the files in a folder; some may go away meanwhile."""
    total = 0
    for file in folder.glob("*"):
        try:
            total += file.stat().st_size
        except OSError:
            continue
    return total
