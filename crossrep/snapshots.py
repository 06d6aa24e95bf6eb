"""Where snapshots lie, and which of them are published: a folder each, local or on any object store that fsspec knows.

    <url>/<space>/<id>/<entity>/part-00000.parquet ...      one file a partition
    <url>/<space>/<id>/manifest.json                        written last: its presence is publication

Readers see only snapshots with a manifest. Retention takes the manifest away first, then the files (crossrep/publication.py).
"""

from __future__ import annotations

import logging
import re
from datetime import UTC, datetime
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ValidationError

from crossrep import kafka, publication
from crossrep.errors import DataError
from crossrep.publication import MANIFEST
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


class Kept(BaseModel):
    """What every manifest says. `format` changes when an older reader would misunderstand it."""

    format: Literal[1] = 1
    id: str
    space: str
    spec_hash: str
    spec: dict[str, Any]
    created: datetime
    crossrep: str

    def sizes(self) -> dict[str, int]:
        """Bytes of every file, by its path within the folder."""
        raise NotImplementedError

    def declared(self) -> Space:
        """The spec. Raises SpecError, DataError if this crossrep reads it differently."""
        space = Space.from_dict(self.spec, source=f"{self.id} of space {self.space!r}")
        if space.hash.hex() != self.spec_hash:
            raise DataError(f"{self.id} of space {self.space!r} was written by crossrep {self.crossrep}: use that version")
        return space


class Manifest(Kept):
    """What a snapshot is."""

    stream_times: dict[str, float | None]  # by entity: the newest event of any row, seconds since 1970; None: no rows
    parts: dict[str, list[Part]]  # by entity, in the order of partitions

    def sizes(self) -> dict[str, int]:
        return {part.path: part.bytes for parts in self.parts.values() for part in parts}

    @property
    def rows(self) -> int:
        return sum(part.rows for parts in self.parts.values() for part in parts)

    @property
    def bytes(self) -> int:
        return sum(self.sizes().values())


Described = TypeVar("Described", bound=Kept)


class Folders(publication.Folders, Generic[Described]):
    """The folder of one space's snapshots, or of anything else that is written once and published by its manifest.

    Args:
        url: a local folder, or an URL that fsspec knows, such as s3://bucket/snapshots; default: in CROSSREP_HOME.

    Raises:
        CrossrepError: the URL's protocol is unknown, or what it needs is not installed.
    """

    what: str  # one of them
    command: str  # that makes one
    described: type[Described]

    def __init__(self, url: str | None, space: str):
        super().__init__(url or str(kafka.home() / self.what.replace(" ", "-")) + "s", space)
        self.space = space

    @property
    def _command(self) -> str:
        return f"{self.command} {self.space} --to {self.url}"

    def ids(self) -> list[str]:
        """Of all, finished or not, oldest first; whatever else lies there is left alone."""
        return [name for name in self.names() if started(name) is not None]

    def manifest(self, id: str) -> Described | None:
        """None: not published. Raises DataError if what is there is no manifest."""
        text = self.read(id)
        try:
            return None if text is None else self.described.model_validate_json(text)
        except ValidationError as error:
            raise DataError(f"{self.path(id, MANIFEST)} is no manifest this crossrep can read: {error.errors()[0]['msg']}") from None

    def published(self) -> list[Described]:
        """Complete ones, oldest first; what cannot be read is logged."""
        return [found for id in self.ids() if (found := self._readable(id))]

    def find(self, id: str | None = None) -> Described:
        """A published one: by its id, or the newest.

        Raises:
            DataError: there is none, or its files are not those of its manifest.
        """
        if id is not None:
            found = self.manifest(id) if started(id) else None
        else:
            found = next(filter(None, map(self._readable, reversed(self.ids()))), None)
        if found is None:
            known = ", ".join(manifest.id for manifest in self.published()) or "none yet"
            what = f"{self.what} {id!r}" if id else self.what
            raise DataError(f"no {what} of space {self.space!r} in {self.url} (known: {known}). Take one: {self._command}")
        self.refuse_incomplete(found)
        return found

    def refuse_incomplete(self, manifest: Described) -> None:
        """Are all files there, as large as they were written? Raises DataError."""
        for inside, bytes in manifest.sizes().items():
            path = self.path(manifest.id, inside)
            try:
                size = self.fs.info(path)["size"]
            except FileNotFoundError:
                size = None
            if size != bytes:
                found = "is gone" if size is None else f"has {size:,} bytes, not {bytes:,}"
                raise DataError(
                    f"{self.what} {manifest.id} of space {self.space!r} is damaged, or was removed by another run's --keep: "
                    f"{path} {found}. "
                    f"Take a new one: {self._command}"
                )

    def publish(self, manifest: Described) -> None:
        """Make it visible, at once. Raises DataError if its files are not all there, or nothing can be written."""
        self.refuse_incomplete(manifest)
        self.finish(manifest.id, manifest.model_dump_json(indent=1).encode())

    def retain(self, keep: int | None) -> list[str]:
        """Remove what crashed runs left, and all published ones but the newest `keep`. Returns the ids removed."""
        ids, complete = self.ids(), [manifest.id for manifest in self.published()]
        kept = set(complete[-keep:] if keep else complete)
        removed = [id for id in ids if id not in kept and (id in complete or self.abandoned(id, started(id)))]
        for id in removed:
            self.remove(id)
        return removed

    def _readable(self, id: str) -> Described | None:
        try:
            return self.manifest(id)
        except DataError as error:
            log.warning("%s", error)
            return None


class Store(Folders[Manifest]):
    """Of snapshots."""

    what, command, described = "snapshot", "crossrep snapshot", Manifest


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
