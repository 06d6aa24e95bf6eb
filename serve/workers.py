"""What fold workers say of themselves at /metrics: how far their partitions are restored. Kafka does not know it."""

from __future__ import annotations

import http.client
import math
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

TIMEOUT = 1.0  # seconds
MOST = 4 << 20  # bytes of an answer
FIELDS = ("restored_records", "restore_records", "restore_seconds", "flowing", "keys_in_memory", "dirty_rows", "rows_total")
_PREFIX = "crossrep_fold_"


@dataclass
class Workers:
    """Some fold workers of a space.

    Args:
        urls: such as http://fold-0:8001; their /metrics is asked.
    """

    space: str
    urls: tuple[str, ...]
    errors: dict[str, str] = field(default_factory=dict)  # by url: why it did not answer
    partitions: dict[int, dict[str, Any]] = field(default_factory=dict)  # by number: FIELDS

    def look(self) -> None:
        """Ask them all, at the same time."""
        if not self.urls:
            return
        with ThreadPoolExecutor(min(len(self.urls), 8), "workers") as pool:
            answers = dict(zip(self.urls, pool.map(self._ask, self.urls)))
        self.errors = {url: answer for url, answer in answers.items() if isinstance(answer, str)}
        partitions: dict[int, dict[str, Any]] = {}
        for url, answer in answers.items():
            for number, facts in {} if isinstance(answer, str) else answer.items():
                # Right after a rebalance two may name a partition: the one that is not left behind has read more of it.
                if number not in partitions or facts.get("flowing", 0) >= partitions[number].get("flowing", 0):
                    partitions[number] = {"url": url, **facts}
        self.partitions = partitions

    def _ask(self, url: str) -> dict[int, dict[str, float]] | str:
        found: dict[int, dict[str, float]] = {}
        try:
            with urllib.request.urlopen(url.rstrip("/") + "/metrics", timeout=TIMEOUT) as answer:
                text = answer.read(MOST).decode()
            for family in text_string_to_metric_families(text):
                for sample in family.samples:
                    name = sample.name.removeprefix(_PREFIX)
                    if name in FIELDS and name != sample.name and sample.labels.get("space") == self.space and math.isfinite(sample.value):
                        found.setdefault(int(sample.labels["partition"]), {})[name] = sample.value
        except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
            return str(error)[:200] or type(error).__name__
        return found
