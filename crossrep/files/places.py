"""Where files lie that outlive a process: a local folder, or any object store that fsspec knows."""

from __future__ import annotations

import os
from typing import Any
from uuid import uuid4

from crossrep.errors import CrossrepError, DataError
from crossrep.extras import extra

with extra("analytics"):
    import fsspec

PART = ".part"  # the end of the name of a file that is being written, or that a killed run has left


def connect(url: str) -> tuple[Any, str]:
    """The file system of an URL, and the path on it.

    Raises:
        CrossrepError: the URL's protocol is unknown, or what it needs is not installed.
    """
    try:
        fs, root = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise CrossrepError(f"{url} cannot be opened: {error}") from None
    return fs, str(root).rstrip("/")


def is_local(fs: Any) -> bool:
    return "file" in fs.protocol


def put(fs: Any, path: str, data: Any) -> None:
    """Write a file that others see whole or not at all. Raises OSError, and whatever an object store raises.

    Object stores show an object when it is whole; of a local file a part can be seen, and lost with the machine, so it is written
    beside, synced and renamed.
    """
    if not is_local(fs):
        fs.pipe_file(path, bytes(data))
        return
    beside = f"{path}.{uuid4().hex}{PART}"  # of this call alone: others may write the same file now, on this machine or another
    os.makedirs(os.path.dirname(path), exist_ok=True)
    try:
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        if os.path.exists(beside):
            os.remove(beside)
        raise


def unusable(url: str, what: str, error: Exception) -> DataError:
    """What to raise where a place cannot be "listed", "read", "written" or "tidied"."""
    return DataError(f"{url} cannot be {what}: {str(error) or type(error).__name__}. Check that it exists, and your rights there")
