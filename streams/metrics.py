"""`/ready` and `/metrics` of the workers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

if TYPE_CHECKING:
    from streams.fold import Fold


class FoldCollector:
    """Reads the partitions' counters when asked; nothing is counted twice."""

    def __init__(self, fold: Fold):
        self._fold = fold

    def collect(self) -> Iterator[Metric]:
        counters = {
            "rows": ("rows folded", lambda p: p.stats.rows),
            "frames": ("frames folded", lambda p: p.stats.frames),
            "dead_letters": ("frames refused", lambda p: p.stats.dead_letters),
            "records": ("changelog records written", lambda p: p.stats.records),
            "flushes": ("transactions committed", lambda p: p.stats.flushes),
            "flush_seconds": ("seconds spent in commits", lambda p: p.stats.flush_seconds),
        }
        gauges = {
            "progress": ("next frame offset to fold", lambda p: p.progress),
            "dirty_rows": ("rows folded and not yet flushed", lambda p: p.dirty_rows),
            "keys_in_memory": ("keys in the slabs", lambda p: p.keys_in_memory),
            "restored_records": ("changelog records read at takeover", lambda p: p.stats.restored),
            "restore_records": ("changelog records to read at takeover", lambda p: p.stats.restore_total),
            "restore_seconds": ("seconds the last takeover took", lambda p: p.stats.restore_seconds),
            "flowing": ("1 when restored and flowing", lambda p: int(p.number in self._fold.flowing)),
        }
        for kind, described in ((CounterMetricFamily, counters), (GaugeMetricFamily, gauges)):
            for name, (text, value) in described.items():
                family = kind(f"crossrep_fold_{name}", text, labels=["space", "partition"])
                for number, partition in list(self._fold.partitions.items()):
                    family.add_metric([self._fold.space.name, str(number)], value(partition))
                yield family
        yield GaugeMetricFamily("crossrep_fold_ready", "1 when all owned partitions flow", int(self._fold.ready))


def serve_with(fold: Fold) -> None:
    """Add `/ready` (503 until every owned partition flows) and `/metrics` (Prometheus text) to Faust's web server."""
    registry = CollectorRegistry()
    registry.register(FoldCollector(fold))

    async def ready(self: Any, request: Any) -> Any:
        owned = sorted(fold.assigned or ())
        body = {"ready": fold.ready, "space": fold.space.name, "partitions": owned, "flowing": sorted(fold.flowing)}
        return self.json(body, status=200 if fold.ready else 503)

    async def metrics(self: Any, request: Any) -> Any:
        return self.text(generate_latest(registry).decode(), content_type="text/plain")

    fold.app.page("/ready", name="ready")(ready)
    fold.app.page("/metrics", name="metrics")(metrics)
