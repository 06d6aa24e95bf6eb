"""Folders that are published whole or not at all, local or on any object store that fsspec knows. There is no rename on object stores, so:

    <root>/<name>/unfinished.json    written first: who writes here
    <root>/<name>/...                the files
    <root>/<name>/manifest.json      written last: its presence is publication

Readers see only folders with a manifest. What is removed loses its manifest first.
"""

from __future__ import annotations

import json
import os
import socket
from datetime import UTC, datetime, timedelta

from crossrep.errors import DataError
from crossrep.files import places

MANIFEST, WRITER = "manifest.json", "unfinished.json"
ABANDONED_AFTER = timedelta(days=1)  # what another machine's writer has not finished may still be written for so long


class Folders:
    """The folders below one root.

    Args:
        url: a local folder, or an URL that fsspec knows, such as s3://bucket/snapshots.
        inside: the root, within the URL; empty: the URL is it.

    Raises:
        CrossrepError: the URL's protocol is unknown, or what it needs is not installed.
    """

    def __init__(self, url: str, inside: str):
        self.url = url
        self.fs, root = places.connect(url)
        self.root = f"{root}/{inside}".rstrip("/")

    def path(self, name: str, *inside: str) -> str:
        return "/".join((self.root, name, *inside))

    def names(self) -> list[str]:
        """Of everything that lies there, published or not. Raises DataError if it cannot be listed."""
        self.fs.invalidate_cache()
        try:
            return sorted(str(path).rstrip("/").rpartition("/")[2] for path in self.fs.ls(self.root, detail=False))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except Exception as error:
            raise self.unusable("listed", error) from error

    def read(self, name: str) -> bytes | None:
        """The manifest; None: not published."""
        try:
            text: bytes = self.fs.cat_file(self.path(name, MANIFEST))
        except (FileNotFoundError, NotADirectoryError):
            return None
        return text

    def begin(self, name: str) -> None:
        """A new folder, and in it who writes. Raises FileExistsError if another one has begun it, DataError if nothing can be written."""
        writer = {"host": socket.gethostname(), "pid": os.getpid(), "began": datetime.now(UTC).isoformat()}
        try:
            self.fs.makedirs(self.path(name), exist_ok=False)  # two at once: one of them fails here, or on object stores below
            self.fs.pipe_file(self.path(name, WRITER), json.dumps(writer).encode(), mode="create")
        except FileExistsError:
            raise
        except Exception as error:
            raise self.unusable("written", error) from error

    def finish(self, name: str, manifest: bytes) -> None:
        """Publish a folder whose files are all there, at once. Raises DataError if nothing can be written."""
        try:
            places.put(self.fs, self.path(name, MANIFEST), manifest)
        except Exception as error:
            raise self.unusable("written", error) from error

    def remove(self, name: str) -> None:
        """The manifest first, so that nobody begins to read what is on its way out. Another run may remove the same."""
        for path in (self.path(name, MANIFEST), self.path(name)):
            try:
                self.fs.rm(path, recursive=path == self.path(name))
            except FileNotFoundError:
                continue
            except OSError as error:
                raise self.unusable("tidied", error) from error

    def abandoned(self, name: str, began: datetime | None = None) -> bool:
        """Is it unfinished, and has its writer died? Of another machine's writer that is known only by its age.

        Args:
            began: when, if the name says so; else its writer's note does.
        """
        if self.fs.exists(self.path(name, MANIFEST)):  # perhaps of a later crossrep
            return False
        try:
            writer = json.loads(self.fs.cat_file(self.path(name, WRITER)))
        except (OSError, ValueError):
            writer = {}
        try:
            if datetime.now(UTC) - (began or datetime.fromisoformat(writer["began"])) > ABANDONED_AFTER:
                return True
            if writer["host"] != socket.gethostname():
                return False
            os.kill(writer["pid"], 0)
        except ProcessLookupError:
            return True
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return False

    def unusable(self, what: str, error: Exception) -> DataError:
        return places.unusable(self.url, what, error)
