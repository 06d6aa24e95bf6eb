"""`/ready` and `/metrics` of the workers."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from crossrep.errors import CrossrepError

if TYPE_CHECKING:
    from state.partition import Partition
    from streams.fold import Fold
    from streams.pipeline import Pipeline


class FoldCollector:
    """Reads the partitions' counters when asked; nothing is counted twice."""

    def __init__(self, fold: Fold):
        self._fold = fold

    def collect(self) -> Iterator[Metric]:
        counters: dict[str, tuple[str, Callable[[Partition], float]]] = {
            "rows": ("rows folded", lambda p: p.stats.rows),
            "frames": ("frames folded", lambda p: p.stats.frames),
            "dead_letters": ("frames refused", lambda p: p.stats.dead_letters),
            "records": ("changelog records written", lambda p: p.stats.records),
            "flushes": ("transactions committed", lambda p: p.stats.flushes),
            "flush_seconds": ("seconds spent in commits", lambda p: p.stats.flush_seconds),
        }
        gauges: dict[str, tuple[str, Callable[[Partition], float]]] = {
            "progress": ("next frame offset to fold", lambda p: p.progress),
            "dirty_rows": ("rows folded and not yet flushed", lambda p: p.dirty_rows),
            "keys_in_memory": ("keys in the slabs", lambda p: p.keys_in_memory),
            "restored_records": ("changelog records read at takeover", lambda p: p.stats.restored),
            "restore_records": ("changelog records to read at takeover", lambda p: p.stats.restore_total),
            "restore_seconds": ("seconds the last takeover took", lambda p: p.stats.restore_seconds),
            "flowing": ("1 when restored and flowing", lambda p: int(p.number in self._fold.flowing)),
        }
        for family_of, described in ((CounterMetricFamily, counters), (GaugeMetricFamily, gauges)):
            for name, (text, value) in described.items():
                family = family_of(f"crossrep_fold_{name}", text, labels=["space", "partition"])
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


class PipelineCollector:
    """Reads a pipeline's counters when asked."""

    def __init__(self, kind: str, pipeline: Pipeline):
        self._kind, self._pipeline = kind, pipeline

    def collect(self) -> Iterator[Metric]:
        stats = self._pipeline.stats
        for name, text in {
            "messages": "messages consumed",
            "batches": "batches, one transaction each",
            "rows": "rows made, before combining",
            "frames": "frames written",
            "dead_letters": "messages refused",
            "retried_batches": "batches dropped after a failed commit and read again",
            "transform_seconds": "seconds spent in decoding, the model and encoding",
            "commit_seconds": "seconds spent in commits",
        }.items():
            yield CounterMetricFamily(f"crossrep_{self._kind}_{name}", text, getattr(stats, name))


def serve(port: int, kind: str, pipeline: Pipeline, ready: Callable[[], bool]) -> ThreadingHTTPServer:
    """Serve `/ready` and `/metrics` of a pipeline from a thread of its own.

    Raises:
        CrossrepError: the port is taken.
    """
    registry = CollectorRegistry()
    registry.register(PipelineCollector(kind, pipeline))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/metrics":
                self._answer(200, "text/plain; version=0.0.4", generate_latest(registry))
            elif self.path == "/ready":
                now = ready()
                body = json.dumps({"ready": now, "space": pipeline.space.name}).encode()
                self._answer(200 if now else 503, "application/json", body)
            else:
                self._answer(404, "text/plain", b"/ready or /metrics\n")

        def _answer(self, status: int, kind: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    try:
        server = ThreadingHTTPServer(("0.0.0.0", port), Handler)
    except OSError as error:
        raise CrossrepError(f"port {port} of /ready and /metrics: {error.strerror}. Choose another: --port") from None
    threading.Thread(target=server.serve_forever, name="http", daemon=True).start()
    return server
