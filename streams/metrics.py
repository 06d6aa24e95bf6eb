"""`/ready` and `/metrics` of every worker, served from a thread of their own: they answer also while the worker is busy."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from crossrep.errors import CrossrepError
from state.partition import Partition


def serve(port: int, ready: Callable[[], tuple[bool, dict[str, Any]]], collect: Callable[[], Iterable[Metric]]) -> ThreadingHTTPServer:
    """Serve until the process ends or `shutdown` is called.

    Args:
        ready: whether the worker is ready (200 or 503), and what else to say at `/ready`.
        collect: the metrics as they are now, for `/metrics` (Prometheus text).

    Raises:
        CrossrepError: the port is taken.
    """
    registry = CollectorRegistry()
    registry.register(_Collector(collect))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/metrics":
                self._answer(200, "text/plain; version=0.0.4", generate_latest(registry))
            elif self.path == "/ready":
                now, about = ready()
                self._answer(200 if now else 503, "application/json", json.dumps({"ready": now, **about}).encode())
            else:
                self._answer(404, "text/plain", b"/ready or /metrics\n")

        def _answer(self, status: int, content_type: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
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


def of_stats(prefix: str, stats: Any) -> Iterator[Metric]:
    """A dataclass of counters, one metric a field."""
    for name, value in asdict(stats).items():
        yield CounterMetricFamily(f"{prefix}_{name}", name.replace("_", " "), value)


def of_partitions(space: str, partitions: Mapping[int, Partition], flowing: set[int]) -> Iterator[Metric]:
    """What a fold worker knows of each partition it holds."""
    counters: dict[str, tuple[str, Callable[[Partition], float]]] = {
        "rows": ("rows folded", lambda p: p.stats.rows),
        "frames": ("frames folded", lambda p: p.stats.frames),
        "dead_letters": ("frames refused", lambda p: p.stats.dead_letters),
        "records": ("changelog records written", lambda p: p.stats.records),
        "deleted": ("tombstones among them: expired or forgotten keys", lambda p: p.stats.deleted),
        "flushes": ("transactions committed", lambda p: p.stats.flushes),
        "flush_seconds": ("seconds spent in commits", lambda p: p.stats.flush_seconds),
    }
    gauges: dict[str, tuple[str, Callable[[Partition], float]]] = {
        "progress": ("next frame offset to fold", lambda p: p.progress.offset),
        "dirty_rows": ("rows folded and not yet flushed", lambda p: p.dirty_rows),
        "keys_in_memory": ("keys in the slabs", lambda p: p.keys_in_memory),
        "restored_records": ("changelog records read at takeover", lambda p: p.stats.restored),
        "restore_records": ("changelog records to read at takeover", lambda p: p.stats.restore_total),
        "restore_seconds": ("seconds the last takeover took", lambda p: p.stats.restore_seconds),
        "flowing": ("1 when restored and flowing", lambda p: int(p.number in flowing)),
    }
    for family_of, described in ((CounterMetricFamily, counters), (GaugeMetricFamily, gauges)):
        for name, (text, value) in described.items():
            family = family_of(f"crossrep_fold_{name}", text, labels=["space", "partition"])
            for number, partition in list(partitions.items()):
                family.add_metric([space, str(number)], value(partition))
            yield family


class _Collector:
    """What prometheus_client wants to be handed."""

    def __init__(self, collect: Callable[[], Iterable[Metric]]):
        self.collect = collect
