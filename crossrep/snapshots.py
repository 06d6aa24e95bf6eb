"""Where snapshots lie, and which of them are published: a folder each, local or on any object store that fsspec knows.

    <url>/<space>/<id>/<entity>/part-00000.parquet ...      one file a partition
    <url>/<space>/<id>/manifest.json                        written last: its presence is publication

Readers see only snapshots with a manifest. Retention takes the manifest away first, then the files.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from crossrep import kafka, places
from crossrep.cuts import Cut
from crossrep.errors import DataError
from crossrep.spec import Space

log = logging.getLogger(__name__)

MANIFEST, WRITER = "manifest.json", "unfinished.json"
ABANDONED_AFTER = timedelta(days=1)  # an unfinished snapshot of another machine's writer may still be written for so long

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


class Replayed(BaseModel):
    """Of a snapshot that was not read from a changelog, but built (crossrep/replay.py): its parts have no offsets."""

    source: str  # an archive's or files' URL
    cut: Cut | None  # the rows are what was made of the events in front of it; None: nobody knows where they end


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
    replayed: Replayed | None = None

    def declared(self) -> Space:
        """The spec. Raises SpecError, DataError if this crossrep reads it differently."""
        space = Space.from_dict(self.spec, source=f"snapshot {self.id} of space {self.space!r}")
        if space.hash.hex() != self.spec_hash:
            raise DataError(f"snapshot {self.id} of space {self.space!r} was written by crossrep {self.crossrep}: use that version")
        return space

    def sizes(self) -> dict[str, int]:
        """Bytes of every file, by its path within the folder."""
        return {part.path: part.bytes for parts in self.parts.values() for part in parts}

    @property
    def rows(self) -> int:
        return sum(part.rows for parts in self.parts.values() for part in parts)

    @property
    def bytes(self) -> int:
        return sum(self.sizes().values())


class Store:
    """The folder of one space's snapshots, or of what else is written once and published by a manifest (crossrep/training_sets.py).

    Args:
        url: a local folder, or an URL that fsspec knows, such as s3://bucket/snapshots; default CROSSREP_HOME/snapshots.

    Raises:
        CrossrepError: the URL's protocol is unknown, or what it needs is not installed.
    """

    what, folder, command = "snapshot", "snapshots", "crossrep snapshot"
    described: type[Manifest] = Manifest

    def __init__(self, url: str | None, space: str):
        self.url = url or str(kafka.home() / self.folder)
        self.space = space
        self.fs, root = places.connect(self.url, f"{self.what}s")
        self.root = f"{root}/{space}"

    @property
    def _command(self) -> str:
        return f"{self.command} {self.space} --to {self.url}"

    def path(self, id: str, *inside: str) -> str:
        return "/".join((self.root, id, *inside))

    def ids(self) -> list[str]:
        """Of all snapshots, finished or not, oldest first; whatever else lies there is left alone."""
        self.fs.invalidate_cache()
        try:
            names = [str(path).rstrip("/").rpartition("/")[2] for path in self.fs.ls(self.root, detail=False)]
        except (FileNotFoundError, NotADirectoryError):
            return []
        except Exception as error:
            raise self.unusable("listed", error) from error
        return sorted(name for name in names if started(name) is not None)

    def manifest(self, id: str) -> Manifest | None:
        """None: not published. Raises DataError if what is there is no manifest."""
        try:
            text = self.fs.cat_file(self.path(id, MANIFEST))
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            return self.described.model_validate_json(text)
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
            what = f"{self.what} {id!r}" if id else self.what
            raise DataError(f"no {what} of space {self.space!r} in {self.url} (known: {known}). Take one: {self._command}")
        self.refuse_incomplete(found)
        return found

    def refuse_incomplete(self, manifest: Manifest) -> None:
        """Are all files there, as large as they were written? Raises DataError."""
        for inside, expected in manifest.sizes().items():
            path = self.path(manifest.id, inside)
            try:
                size = self.fs.info(path)["size"]
            except FileNotFoundError:
                size = None
            if size != expected:
                found = "is gone" if size is None else f"has {size:,} bytes, not {expected:,}"
                raise DataError(
                    f"{self.what} {manifest.id} of space {self.space!r} is damaged, or was removed by another run's --keep: "
                    f"{path} {found}. "
                    f"Take a new one: {self._command}"
                )

    def begin(self, id: str) -> None:
        """A folder for a new snapshot, and in it who writes. Raises DataError if nothing can be written there."""
        writer = {"host": socket.gethostname(), "pid": os.getpid()}
        try:
            self.fs.makedirs(self.path(id), exist_ok=False)
            self.fs.pipe_file(self.path(id, WRITER), json.dumps(writer).encode())
        except Exception as error:
            raise self.unusable("written", error) from error

    def publish(self, manifest: Manifest) -> None:
        """Make it visible, at once. Raises DataError if its files are not all there, or nothing can be written."""
        self.refuse_incomplete(manifest)
        try:
            places.put(self.fs, self.path(manifest.id, MANIFEST), manifest.model_dump_json(indent=1).encode())
        except Exception as error:
            raise self.unusable("written", error) from error

    def retain(self, keep: int | None) -> list[str]:
        """Remove what crashed runs left, and all published snapshots but the newest `keep`. Returns the ids removed."""
        ids, complete = self.ids(), [manifest.id for manifest in self.published()]
        kept = set(complete[-keep:] if keep else complete)
        removed = [id for id in ids if id not in kept and (id in complete or self._abandoned(id))]
        for id in removed:
            self.remove(id)
        return removed

    def remove(self, id: str) -> None:
        """The manifest first, so that nobody begins to read what is on its way out. Another run may remove the same."""
        for path in (self.path(id, MANIFEST), self.path(id)):
            try:
                self.fs.rm(path, recursive=path == self.path(id))
            except FileNotFoundError:
                continue
            except OSError as error:
                raise self.unusable("tidied", error) from error

    def unusable(self, what: str, error: Exception) -> DataError:
        return places.unusable(self.url, what, error)

    def _readable(self, id: str) -> Manifest | None:
        try:
            return self.manifest(id)
        except DataError as error:
            log.warning("%s", error)
            return None

    def _abandoned(self, id: str) -> bool:
        """Is it unfinished, and has its writer died? Of another machine's writer that is known only by its age."""
        if self.fs.exists(self.path(id, MANIFEST)):  # perhaps of a later crossrep
            return False
        began = started(id)
        if began is None or datetime.now(UTC) - began > ABANDONED_AFTER:
            return True
        try:
            writer = json.loads(self.fs.cat_file(self.path(id, WRITER)))
            if writer["host"] != socket.gethostname():
                return False
            os.kill(writer["pid"], 0)
        except ProcessLookupError:
            return True
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return False


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
