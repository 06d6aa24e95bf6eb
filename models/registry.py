"""A registry of models: versions that never change, in a folder or on any object store that fsspec knows.

    <url>/<name>/<version>/weights.safetensors ...    the model's files, as its folder has them
    <url>/<name>/<version>/manifest.json              the model's own manifest, and under "registered" what the registry knows of it

A version is published whole or not at all (`crossrep/files/publication.py`), has a higher number than those before it, and is referred to
as name@version; name@latest is the newest one. It is an ordinary model folder: a copy of it works wherever a folder that `train` wrote
does.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from crossrep import kafka
from crossrep.errors import CrossrepError, ModelError
from crossrep.files.publication import MANIFEST, Folders
from models.upstream import Identity, read_manifest, write

LATEST = "latest"


class Registered(BaseModel):
    """What the registry knows of a version."""

    name: str
    version: int = Field(ge=1)
    parent: int | None = None  # the version it took the place of
    space: str | None = None  # the one it was made for; None: any that it fits
    at: datetime
    crossrep: str


@dataclass(frozen=True)
class Entry:
    """One version: `manifest` is the whole of its manifest."""

    registered: Registered
    manifest: Mapping[str, Any]

    @property
    def reference(self) -> str:
        return f"{self.registered.name}@{self.registered.version}"


class Registry:
    """All versions below one URL.

    Args:
        url: a local folder, or an URL such as s3://bucket/models; default CROSSREP_HOME/models.

    Raises:
        CrossrepError: the URL's protocol is unknown, or what it needs is not installed.
    """

    def __init__(self, url: str | None = None):
        self.url = url or str(kafka.home() / "models")

    def names(self) -> list[str]:
        """Of all models that have a published version."""
        return [name for name in Folders(self.url, "").names() if re.fullmatch(_NAME, name) and self.versions(name)]

    def versions(self, name: str) -> list[Entry]:
        """Published versions of one model, oldest first."""
        folders = self._folders(name)
        found = ((number, folders.read(str(number))) for number in _numbers(folders))
        return [_entry(folders, number, text) for number, text in found if text is not None]

    def newest(self, name: str) -> Entry | None:
        folders = self._folders(name)
        for number in reversed(_numbers(folders)):
            if (text := folders.read(str(number))) is not None:
                return _entry(folders, number, text)
        return None

    def find(self, reference: str) -> Entry:
        """The version that name@version or name@latest refers to. Raises ModelError: there is none; says which there are."""
        name, _, number = reference.partition("@")
        if not re.fullmatch(r"latest|[1-9]\d{0,8}", number):
            raise ModelError(f"{reference!r} is no reference: write {name}@3 for a version, or {name}@{LATEST} for the newest")
        folders = self._folders(name)
        if number == LATEST:
            found = self.newest(name)
        else:
            text = folders.read(number)
            found = _entry(folders, int(number), text) if text is not None else None
        if found is None:
            known = ", ".join(entry.reference for entry in self.versions(name)) or ", ".join(self.names()) or "nothing yet"
            raise ModelError(f"no model {reference} in {self.url} (known: {known}). Register one: crossrep models add FOLDER {name}")
        return found

    def add(
        self, folder: Path, name: str, *, space: str | None = None, parent: int | None = None, about: Mapping[str, Any] | None = None
    ) -> Entry:
        """Register the model in `folder` as the next version of `name`.

        Args:
            about: entries of the manifest that say more than the folder's own.

        Raises:
            ModelError: the folder is no whole model.
            DataError: nothing can be written there.
        """
        folders, manifest = self._folders(name), {**read_manifest(folder), **(about or {})}
        files = {file: (folder / file).read_bytes() for file in checked(folder, manifest)}
        number = _begin(folders)
        try:
            # Not before: nobody may begin the number that somebody else is about to remove.
            for left in filter(folders.abandoned, map(str, _numbers(folders))):
                folders.remove(left)
            registered = Registered(
                name=name, version=number, parent=parent, space=space, at=datetime.now(UTC), crossrep=version_of("crossrep")
            )
            entry = Entry(registered, {**manifest, "registered": registered.model_dump(mode="json")})
            for file, content in files.items():
                folders.fs.pipe_file(folders.path(str(number), file), content)
            folders.finish(str(number), _json(entry.manifest))
        except BaseException as error:
            with suppress(CrossrepError):
                folders.remove(str(number))
            if isinstance(error, Exception) and not isinstance(error, CrossrepError):
                raise folders.unusable("written", error) from error
            raise
        return entry

    def fetch(self, entry: Entry, folder: Path) -> None:
        """Copy a version into `folder`, its files checked, the manifest last.

        Raises:
            ModelError: a file is gone, or is not the one that was registered.
        """
        folders, name = self._folders(entry.registered.name), str(entry.registered.version)
        files = {}
        for file, digest in file_digests(entry.manifest, entry.reference).items():
            try:
                files[file] = folders.fs.cat_file(folders.path(name, file))
            except FileNotFoundError:
                raise ModelError(f"{folders.path(name, file)} is gone: {entry.reference} cannot be used any more") from None
            except Exception as error:
                raise folders.unusable("read", error) from error
            _check(files[file], digest, folders.path(name, file))
        write(folder, {**files, MANIFEST: _json(entry.manifest)})

    def _folders(self, name: str) -> Folders:
        if not re.fullmatch(_NAME, name):
            raise ModelError(f"{name!r} is no name for a model: write small letters, digits, - and _, such as kuairand")
        return Folders(self.url, name)


def resolve(reference: str, url: str | None) -> tuple[Path, Identity]:
    """A folder with the model of a reference, and which weights these are. What has no @ is a folder already.

    A version is copied to CROSSREP_HOME/fetched once; the copy is checked each time.

    Raises:
        ModelError: there is no such model, or a file is not the one that its manifest names.
    """
    if "@" not in reference or Path(reference).is_dir():
        folder = Path(reference)
        manifest = read_manifest(folder)
        checked(folder, manifest)
        return folder, Identity(reference, digest(manifest, reference))
    registry = Registry(url)
    entry = registry.find(reference)
    found = digest(entry.manifest, entry.reference)
    folder = kafka.home() / "fetched" / found
    try:
        checked(folder, read_manifest(folder))
    except ModelError:  # not there yet, or damaged
        registry.fetch(entry, folder)
    return folder, Identity(entry.reference, found, entry.registered.space)


def digest(manifest: Mapping[str, Any], place: str) -> str:
    """What tells one model's vectors from another's: its kind, and the SHA-256 of every file."""
    named = [manifest.get("kind"), sorted(file_digests(manifest, place).items())]
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()


def file_digests(manifest: Mapping[str, Any], place: str) -> dict[str, str]:
    """File -> SHA-256, as the manifest says. Raises ModelError if it does not."""
    digests = manifest.get("sha256")
    if not isinstance(digests, dict) or not digests or not all(re.fullmatch(r"[\w.-]+", file) for file in digests):
        raise ModelError(f'{place}: the manifest must name every file of the model with its SHA-256, under "sha256"')
    return digests


def checked(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """The names of the model's files, each found to be the one its manifest names. Raises ModelError."""
    digests = file_digests(manifest, str(folder))
    for file, expected in digests.items():
        try:
            content = (folder / file).read_bytes()
        except OSError as error:
            raise ModelError(f"{folder / file} cannot be read: {error}") from error
        _check(content, expected, str(folder / file))
    return list(digests)


def _check(content: bytes, expected: str, path: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise ModelError(f"{path} is not the file its manifest names: its SHA-256 is {found}, not {expected}. Take another copy or version")


def _json(manifest: Mapping[str, Any]) -> bytes:
    return (json.dumps(manifest, indent=2) + "\n").encode()


def _begin(folders: Folders) -> int:
    """Begin the next version; whoever else begins one at the same time gets another number."""
    while True:
        number = max(_numbers(folders), default=0) + 1
        with suppress(FileExistsError):
            folders.begin(str(number))
            return number


def _numbers(folders: Folders) -> list[int]:
    """Of versions, published or not, ascending."""
    return sorted(int(name) for name in folders.names() if re.fullmatch(r"[1-9]\d{0,8}", name))


def _entry(folders: Folders, number: int, text: bytes) -> Entry:
    path = folders.path(str(number), MANIFEST)
    try:
        manifest = json.loads(text)
        return Entry(Registered.model_validate(manifest["registered"]), manifest)
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise ModelError(f"{path} is no manifest of a registered model: {error}") from None


_NAME = r"[a-z0-9][a-z0-9_-]{0,79}"
