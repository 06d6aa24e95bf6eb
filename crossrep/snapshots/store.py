"""What a snapshot is, and where snapshots lie.

<url>/<space>/<id>/<entity>/part-00000.parquet ...      one file a partition
<url>/<space>/<id>/manifest.json                        written last: its presence is publication (crossrep/files/publication.py)
"""

from __future__ import annotations

from pydantic import BaseModel

from crossrep.control.binding import Model
from crossrep.control.cuts import Cut
from crossrep.files.dated import Dated, DatedFolders


class Part(BaseModel):
    """One partition of one entity, in one file."""

    path: str  # within the snapshot's folder
    partition: int
    first_offset: int  # of the representation topic, when it was read
    end_offset: int  # the rows are what a reader has who has read everything below it
    source_offset: int  # every frame of frames.<space>, same partition, up to and including it is in the rows; -1: nothing says so
    rows: int
    bytes: int
    sha256: str


class Replayed(BaseModel):
    """Of a snapshot that was not read from a changelog, but built (crossrep/rollout/replay_tables.py): its parts have no offsets."""

    source: str  # an archive's or files' URL
    cut: Cut | None  # the rows are what was made of the events in front of it; None: nobody knows where they end
    until: float | None = None  # seconds since 1970: frames appended later were left out (crossrep/archive/earlier.py)


class Manifest(Dated):
    """What a snapshot is."""

    stream_times: dict[str, float | None]  # by entity: the newest event of any row, seconds since 1970; None: no rows
    parts: dict[str, list[Part]]  # by entity, in the order of partitions
    model: Model | None = None  # that made the vectors; None: nothing says so
    replayed: Replayed | None = None

    def sizes(self) -> dict[str, int]:
        return {part.path: part.bytes for parts in self.parts.values() for part in parts}

    @property
    def rows(self) -> int:
        return sum(part.rows for parts in self.parts.values() for part in parts)

    @property
    def bytes(self) -> int:
        return sum(self.sizes().values())


class Store(DatedFolders[Manifest]):
    """The folder of one space's snapshots."""

    what, command, described = "snapshot", "crossrep snapshot", Manifest
