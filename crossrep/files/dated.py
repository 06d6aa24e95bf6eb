"""What is taken of a space now and then, each in a folder named by the time, published whole: snapshots, training sets."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ValidationError

from crossrep import kafka
from crossrep.errors import CrossrepError, DataError
from crossrep.files.publication import MANIFEST, Folders
from crossrep.spec import Space

log = logging.getLogger(__name__)

_ID = "%Y%m%dT%H%M%S.%fZ"


class Dated(BaseModel):
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


def header(space: Space, id: str) -> dict[str, Any]:
    """What a manifest that is made now says of its space: the fields of `Dated`."""
    return {
        "id": id,
        "space": space.name,
        "spec_hash": space.hash.hex(),
        "spec": space.toml_dict,
        "created": datetime.now(UTC),
        "crossrep": version("crossrep"),
    }


Described = TypeVar("Described", bound=Dated)


class DatedFolders(Folders, Generic[Described]):
    """All of one kind that were taken of one space.

    Args:
        url: a local folder, or an URL that fsspec knows, such as s3://bucket/snapshots; default: CROSSREP_HOME/<what>s.

    Raises:
        CrossrepError: the URL's protocol is unknown, or what it needs is not installed.
    """

    what: str  # one of them
    command: str  # that makes one
    described: type[Described]

    def __init__(self, url: str | None, space: str):
        super().__init__(url or str(kafka.home() / f"{self.what}s".replace(" ", "-")), space)
        self.space = space

    @property
    def _command(self) -> str:
        return f"{self.command} {self.space} --to {self.url}"

    @contextmanager
    def begun(self) -> Iterator[str]:
        """The id of a new one, to be published within. A failure leaves nothing of it behind; a kill leaves what nobody sees.

        Raises:
            DataError: nothing can be written there.
        """
        self.begin(id := new_id())
        try:
            yield id
        except BaseException:
            with suppress(CrossrepError):
                self.remove(id)
            raise

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
                    f"{self.what} {manifest.id} of space {self.space!r} is damaged, or was removed by another run's --keep: {path} "
                    f"{found}. Take a new one: {self._command}"
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


def new_id() -> str:
    """The time, UTC, to the microsecond: ids sort as they were taken."""
    return datetime.now(UTC).strftime(_ID)


def started(id: str) -> datetime | None:
    """When it was begun, from its id; None if it is no id."""
    if not re.fullmatch(r"\d{8}T\d{6}\.\d{6}Z", id):
        return None
    try:
        return datetime.strptime(id, _ID).replace(tzinfo=UTC)
    except ValueError:
        return None
