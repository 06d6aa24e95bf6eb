"""What an operator chooses of a fold worker, and what bounds its memory (`memory.py`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class FoldOptions:
    """The worker's name, folder and port, and how much it may hold."""

    name: str  # stable name of this worker: its folder and its group membership survive a restart
    folder: Path  # data folder; the worker's stores lie in folder/<space>/<name>
    port: int = 6066  # of /ready and /metrics
    flush_rows: int = 200_000  # rows folded since its last flush that flush a partition before its interval is over
    slots: int = 65_536  # most keys in memory per entity and partition; `crossrep fold` takes more where there is memory for them
    rocksdb_mb: int = 256  # RocksDB's write buffers, all partitions together
    session_timeout: float = 10.0  # seconds after which a silent worker's partitions move
    min_free_mb: int = 256  # of the data folder's disk; with less, nothing is written
