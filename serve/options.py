"""What an operator chooses. The command's help explains it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from crossrep.spec import MAX_KEY_BYTES


@dataclass(frozen=True)
class Limits:
    """What a replica takes on."""

    keys: int = 1000  # of a batch
    waiting: int = 256  # requests received and not yet answered
    searches: int = 2  # for nearest keys, at a time
    max_lag: float = math.inf  # seconds behind, above which it is not ready

    @property
    def body(self) -> int:
        """Bytes: an id of 64 bytes takes at most six times as many in JSON."""
        return (64 << 10) + self.keys * (6 * MAX_KEY_BYTES + 4)


@dataclass(frozen=True)
class Options:
    """Of one replica process."""

    folder: Path
    host: str = "127.0.0.1"
    port: int = 8080
    memory_mb: int = 1024
    rocksdb_mb: int = 64
    min_free_mb: int = 256
    limits: Limits = field(default_factory=Limits)
    client_timeout: float = 10.0
    drain: float = 10.0
    tokens: tuple[bytes, ...] = ()
    tls_cert: Path | None = None
    tls_key: Path | None = None
    insecure: bool = False
    workers: tuple[str, ...] = ()  # addresses of fold workers' /metrics, for the page
