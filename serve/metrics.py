"""What a replica tells Prometheus at /metrics."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from serve.replica import Replica
from serve.serving import Served

BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0, 5.0)


class Metrics:
    """Requests as they are counted, and the replicas as they are when somebody asks."""

    def __init__(self, served: Served, waiting: Callable[[], int]):
        self._served, self._waiting = served, waiting
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self.requests = Counter("crossrep_serve_requests", "requests answered", ["route", "status"], registry=self._registry)
        self.seconds = Histogram(
            "crossrep_serve_request_seconds",
            "seconds from the request's head to its answer",
            ["route"],
            buckets=BUCKETS,
            registry=self._registry,
        )
        self.keys = Counter("crossrep_serve_keys", "keys looked up", ["entity"], registry=self._registry)
        self.unknown = Counter("crossrep_serve_unknown_keys", "keys among them that do not exist", ["entity"], registry=self._registry)

    @functools.cache  # noqa: B019  as long as the process; a fifth of the time that labels() takes
    def of(self, route: str, status: int) -> tuple[Counter, Histogram]:
        """The counter and the histogram of one route's answers."""
        return self.requests.labels(route, status), self.seconds.labels(route)

    def text(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterable[Metric]:
        """Called by prometheus_client."""
        yield GaugeMetricFamily("crossrep_serve_waiting_requests", "requests received and not yet answered", self._waiting())
        space = GaugeMetricFamily("crossrep_serve_space", "1: the space that is served", labels=["space", "hash"])
        space.add_metric([self._served.now.space.name, self._served.now.hash], 1)
        yield space
        if alias := self._served.alias:
            failed = "1 when what was promoted cannot be loaded, and the former is served still"
            yield GaugeMetricFamily("crossrep_serve_promotion_failed", failed, int(alias["problem"] is not None))
        yield from self._of_replicas()

    def _of_replicas(self) -> Iterator[Metric]:
        gauges: dict[str, tuple[str, Callable[[Replica], float]]] = {
            "ready": ("1 when caught up", lambda r: int(r.caught_up)),
            "lag_records": ("offsets behind the end of the topic", lambda r: r.lag),
            "lag_seconds": ("whatever was visible longer ago than this is in the answers", lambda r: r.staleness),
            "keys_in_memory": ("keys held in memory", lambda r: len(r.recent)),
            "memory_slots": ("keys that memory has room for", lambda r: r.recent.capacity),
            "all_in_memory": ("1 when no key is on the disk alone", lambda r: int(r.recent.whole)),
            "resumed_records": ("records of the disk read into memory at the start", lambda r: r.resumed),
        }
        counters: dict[str, tuple[str, Callable[[Replica], float]]] = {
            "applied_records": ("records read from the topic since the start", lambda r: r.applied),
            "disk_keys": ("keys looked up on the disk", lambda r: r.disk_reads),
        }
        for family_of, described in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, (text, value) in described.items():
                family = family_of(f"crossrep_serve_{name}", text, labels=["entity"])
                for entity, replica in self._served.now.replicas.items():
                    family.add_metric([entity], value(replica))
                yield family
