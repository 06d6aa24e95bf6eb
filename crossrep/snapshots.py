"""Where snapshots lie, and which of them are published: a folder each, local or on any object store that fsspec knows.

<url>/<space>/<id>/<entity>/part-00000.parquet ...      one file a partition
<url>/<space>/<id>/manifest.json                        written last: its presence is publication (crossrep/publication.py)
"""

from __future__ import annotations

import logging
import re
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from crossrep import kafka
from crossrep.errors import DataError
from crossrep.publication import MANIFEST, Folders
from crossrep.spec import Space

log = logging.getLogger(__name__)

_ID = "%Y%m%dT%H%M%S.%fZ"


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


class Manifest(BaseModel):
    """What a snapshot is. `format` changes when an older reader would misunderstand it."""

    format: Literal[1] = 1
    id: str
    space: str
    spec_hash: str
    spec: dict[str, Any]
    created: datetime
    crossrep: str
    stream_times: dict[str, float | None]  # by entity: the newest event of any row, seconds since 1970; None: no rows
    parts: dict[str, list[Part]]  # by entity, in the order of partitions

    def declared(self) -> Space:
        """The spec. Raises SpecError, DataError if this crossrep reads it differently."""
        space = Space.from_dict(self.spec, source=f"snapshot {self.id} of space {self.space!r}")
        if space.hash.hex() != self.spec_hash:
            raise DataError(f"snapshot {self.id} of space {self.space!r} was written by crossrep {self.crossrep}: use that version")
        return space

    @property
    def rows(self) -> int:
        return sum(part.rows for parts in self.parts.values() for part in parts)

    @property
    def bytes(self) -> int:
        return sum(part.bytes for parts in self.parts.values() for part in parts)


class Store(Folders):
    """The folder of one space's snapshots.

    Args:
        url: a local folder, or an URL that fsspec knows, such as s3://bucket/snapshots; default CROSSREP_HOME/snapshots.

    Raises:
        CrossrepError: the URL's protocol is unknown, or what it needs is not installed.
    """

    def __init__(self, url: str | None, space: str):
        super().__init__(url or str(kafka.home() / "snapshots"), space)
        self.space = space

    @property
    def _command(self) -> str:
        return f"crossrep snapshot {self.space} --to {self.url}"

    def ids(self) -> list[str]:
        """Of all snapshots, finished or not, oldest first; whatever else lies there is left alone."""
        return [name for name in self.names() if started(name) is not None]

    def manifest(self, id: str) -> Manifest | None:
        """None: not published. Raises DataError if what is there is no manifest."""
        text = self.read(id)
        try:
            return None if text is None else Manifest.model_validate_json(text)
        except ValidationError as error:
            raise DataError(f"{self.path(id, MANIFEST)} is no manifest this crossrep can read: {error.errors()[0]['msg']}") from None

    def published(self) -> list[Manifest]:
        """Complete snapshots, oldest first; what cannot be read is logged."""
        return [found for id in self.ids() if (found := self._readable(id))]

    def find(self, id: str | None = None) -> Manifest:
        """A published snapshot: by its id, or the newest.

        Raises:
            DataError: there is none, or its files are not those of its manifest.
        """
        if id is not None:
            found = self.manifest(id) if started(id) else None
        else:
            found = next(filter(None, map(self._readable, reversed(self.ids()))), None)
        if found is None:
            known = ", ".join(manifest.id for manifest in self.published()) or "none yet"
            what = f"snapshot {id!r}" if id else "snapshot"
            raise DataError(f"no {what} of space {self.space!r} in {self.url} (known: {known}). Take one: {self._command}")
        self.refuse_incomplete(found)
        return found

    def refuse_incomplete(self, manifest: Manifest) -> None:
        """Are all files there, as large as they were written? Raises DataError."""
        for part in (part for parts in manifest.parts.values() for part in parts):
            path = self.path(manifest.id, part.path)
            try:
                size = self.fs.info(path)["size"]
            except FileNotFoundError:
                size = None
            if size != part.bytes:
                found = "is gone" if size is None else f"has {size:,} bytes, not {part.bytes:,}"
                raise DataError(
                    f"snapshot {manifest.id} of space {self.space!r} is damaged, or was removed by another run's --keep: {path} {found}. "
                    f"Take a new one: {self._command}"
                )

    def publish(self, manifest: Manifest) -> None:
        """Make it visible, at once. Raises DataError if its files are not all there, or nothing can be written."""
        self.refuse_incomplete(manifest)
        self.finish(manifest.id, manifest.model_dump_json(indent=1).encode())

    def retain(self, keep: int | None) -> list[str]:
        """Remove what crashed runs left, and all published snapshots but the newest `keep`. Returns the ids removed."""
        ids, complete = self.ids(), [manifest.id for manifest in self.published()]
        kept = set(complete[-keep:] if keep else complete)
        removed = [id for id in ids if id not in kept and (id in complete or self.abandoned(id, started(id)))]
        for id in removed:
            self.remove(id)
        return removed

    def _readable(self, id: str) -> Manifest | None:
        try:
            return self.manifest(id)
        except DataError as error:
            log.warning("%s", error)
            return None


def new_id() -> str:
    """The time, UTC, to the microsecond: ids sort as they were taken."""
    return datetime.now(UTC).strftime(_ID)


def started(id: str) -> datetime | None:
    """When a snapshot was begun, from its id; None if it is not one."""
    if not re.fullmatch(r"\d{8}T\d{6}\.\d{6}Z", id):
        return None
    try:
        return datetime.strptime(id, _ID).replace(tzinfo=UTC)
    except ValueError:
        return None
