"""Where the frames of a space are archived, and what is there: Parquet files in a folder, local or on any object store.

    <url>/<space>/archive.json                                      whose frames these are
    <url>/<space>/<entity>/date=2026-11-23/hour=11/part-00003-<first>-<end>.parquet
    <url>/<space>/_orders/part-00003-<offset>.json                  an order to forget a key
    <url>/<space>/_cuts/<id>.json                                   events up to which the archive is complete

A file holds every frame of one entity and one partition from offset `first` up to, but not including, `end`. So what is there is the
progress: who goes on begins at the greatest `end`. Two runs at once write files that overlap; readers take each offset from one of them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

from crossrep import kafka
from crossrep.archive import columns
from crossrep.archive.columns import Archived
from crossrep.columnar.rows import Rows
from crossrep.control.binding import Model
from crossrep.control.cuts import Cut
from crossrep.errors import DataError
from crossrep.files import places
from crossrep.files.dated import started
from crossrep.spec import Space

ABOUT = "archive.json"
CUTS_KEPT = 10

_FILE = re.compile(r"date=(\d{4}-\d\d-\d\d)/hour=(\d\d)/part-(\d{5})-(\d{20})-(\d{20})\.parquet$")


class About(BaseModel):
    """Whose frames an archive holds. `format` changes when an older reader would misunderstand it."""

    format: Literal[1] = 1
    space: str
    spec_hash: str
    spec: dict[str, Any]
    topic_id: str  # of frames.<space>: offsets mean nothing in another topic of that name
    model: Model | None = None  # that the space was bound to when this was last written; None: nothing says whose vectors these are

    def declared(self) -> Space:
        """The spec. Raises SpecError, DataError if this crossrep reads it differently."""
        space = Space.from_dict(self.spec, source=f"archive of space {self.space!r}")
        if space.hash.hex() != self.spec_hash:
            raise DataError(f"the archive of space {self.space!r} was written by another version of crossrep: use that one")
        return space


class Order(BaseModel):
    """An order to forget: the key's rows in frames of lower offsets are not to be read any more."""

    entity: str
    key: str  # hexadecimal
    partition: int
    offset: int
    append_time: float  # seconds since 1970


# Partition, and by row the offset and the index of the header in a list, or -1 → bool [n]: see crossrep/control/cuts.py.
Wanted = Callable[[int, NDArray[np.int64], NDArray[np.int32], list[str]], NDArray[np.bool_]]


@dataclass(frozen=True)
class File:
    """One file, and which of its frames to take: those from `start` on, the others are in a file before it."""

    path: str
    entity: str
    partition: int
    first: int
    end: int
    start: int
    hour: datetime  # of the frames' append times, UTC


class Archive:
    """The archive of one space.

    Args:
        url: a local folder, or an URL that fsspec knows, such as s3://bucket/archive; default CROSSREP_HOME/archive.

    Raises:
        CrossrepError: the URL's protocol is unknown, or what it needs is not installed.
    """

    def __init__(self, url: str | None, space: str):
        self.url = url or str(kafka.home() / "archive")
        self.space = space
        self.fs, root = places.connect(self.url)
        self.root = f"{root}/{space}"

    # --- what is there ---

    def about(self) -> About | None:
        """None: nothing was ever archived there. Raises DataError if what is there is no archive."""
        text = self._text(f"{self.root}/{ABOUT}")
        try:
            return None if text is None else About.model_validate_json(text)
        except ValidationError as error:
            raise DataError(f"{self.root}/{ABOUT} is not of an archive this crossrep can read: {error.errors()[0]['msg']}") from None

    def described(self) -> About:
        """What `about` says. Raises DataError: there is no archive."""
        about = self.about()
        if about is None:
            raise DataError(f"no archive of space {self.space!r} in {self.url}. Begin one: crossrep archive {self.space} --to {self.url}")
        return about

    def declared(self) -> Space:
        """The spec of the space whose frames these are. Raises DataError: there is no archive."""
        return self.described().declared()

    def listed(self, entity: str) -> list[File]:
        """All files of an entity, by partition and first offset, also those whose frames other files have too."""
        files = []
        for path in self._names(entity):
            found = _FILE.search(path)
            if found:
                date, hour, partition, first, end = found.groups()
                when = datetime.strptime(f"{date} {hour}", "%Y-%m-%d %H").replace(tzinfo=UTC)
                files.append(File(path, entity, int(partition), int(first), int(end), int(first), when))
        return sorted(files, key=lambda file: (file.partition, file.first, -file.end))

    def files(self, entity: str, partition: int | None = None) -> list[File]:
        """What a reader takes, by partition and offset: every archived frame once."""
        taken: list[File] = []
        reached: dict[int, int] = {}
        for file in self.listed(entity):
            start = max(file.first, reached.get(file.partition, 0))
            if file.end > start and partition in (None, file.partition):
                taken.append(File(file.path, entity, file.partition, file.first, file.end, start, file.hour))
                reached[file.partition] = file.end
        return taken

    def progress(self, entity: str) -> dict[int, int]:
        """By partition, the first offset that is not archived; none where nothing is."""
        return {file.partition: file.end for file in self.files(entity)}

    def gaps(self, entity: str) -> list[tuple[int, int, int]]:
        """Partition, first and next offset of frames that were deleted before they were archived."""
        files = self.files(entity)
        return [(b.partition, a.end, b.first) for a, b in pairwise(files) if a.partition == b.partition and b.first > a.end]

    def orders(self) -> list[Order]:
        """Orders to forget that were archived and not yet applied."""
        texts = map(self._text, self._names("_orders"))
        return [Order.model_validate_json(text) for text in texts if text is not None]

    def cut(self) -> Cut | None:
        """The newest."""
        for path in reversed(self._cuts()):
            text = self._text(path)
            if text is not None:
                return Cut.model_validate_json(text)
        return None

    # --- reading ---

    def rows(self, entity: str, partition: int | None = None) -> Iterator[Archived]:
        """Every archived row of an entity once, in runs of up to 65,536, by partition and offset; without what is to be forgotten.

        Raises:
            SpecError, DataError: there is no archive, or a file is damaged.
        """
        space, forgotten = self.declared(), self.forgotten(entity)
        for file in self.files(entity, partition):
            yield from self.read(space, file, forgotten.get(file.partition, {}))

    def of_key(self, entity: str, key: bytes, partition: int, before: int) -> Iterator[tuple[int, float, Rows]]:
        """Offset, append time and rows of every frame below an offset that holds the key, as `key_history.history` takes them."""
        for run in self.rows(entity, partition):
            mine = run.where(np.array([name == key for name in run.rows.keys.tolist()]) & (run.offsets < before))
            for offset in np.unique(mine.offsets).tolist():
                frame = mine.where(mine.offsets == offset)
                yield offset, float(frame.append_times[0]), frame.rows

    def forgotten(self, entity: str) -> dict[int, dict[bytes, int]]:
        """By partition: key -> offset of the last order to forget it."""
        found: dict[int, dict[bytes, int]] = defaultdict(dict)
        for order in self.orders():
            if order.entity == entity:
                keys, key = found[order.partition], bytes.fromhex(order.key)
                keys[key] = max(keys.get(key, -1), order.offset)
        return found

    def read(self, space: Space, file: File, forgotten: dict[bytes, int]) -> Iterator[Archived]:
        """The rows of one file that a reader is to have, a row group at a time."""
        with self.opened(file) as opened:
            for group in range(opened.groups):
                found = opened.read(space, group).without(file.start, forgotten)
                if len(found.rows):
                    yield found

    def times(self, file: File, wanted: Wanted) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Of the rows of a file that are wanted, also of keys to be forgotten: offset and event time."""
        with self.opened(file) as opened:
            offsets, times, sources, headers = opened.times()
        chosen = (offsets >= file.start) & wanted(file.partition, offsets, sources, headers)
        return offsets[chosen], times[chosen]

    def size(self, file: File) -> int:
        """Rows in a file, those that a reader is not to have included."""
        with self.opened(file) as opened:
            return opened.rows

    def opened(self, file: File) -> columns.Opened:
        """Raises DataError: it is gone, or no such file."""
        return columns.Opened(self.fs, file.path, file.entity, file.partition)

    # --- writing ---

    def begin(self, about: About) -> None:
        self.put(f"{self.root}/{ABOUT}", about.model_dump_json(indent=1).encode())

    def path(self, entity: str, partition: int, first: int, end: int, append_time: float) -> str:
        """Of the file of these frames, all appended in the same hour (seconds since 1970)."""
        when = datetime.fromtimestamp(append_time, UTC)
        return f"{self.root}/{entity}/date={when:%Y-%m-%d}/hour={when:%H}/part-{partition:05d}-{first:020d}-{end:020d}.parquet"

    def keep_order(self, order: Order) -> None:
        self.put(self._order_path(order), order.model_dump_json().encode())

    def drop_order(self, order: Order) -> None:
        """Once no row is left that it is about."""
        self.remove(self._order_path(order))

    def _order_path(self, order: Order) -> str:
        return f"{self.root}/_orders/part-{order.partition:05d}-{order.offset:020d}.json"

    def keep_cut(self, cut: Cut) -> None:
        """The newest few are kept."""
        self.put(f"{self.root}/_cuts/{cut.id}.json", cut.model_dump_json().encode())
        for path in self._cuts()[:-CUTS_KEPT]:
            self.remove(path)

    def retain(self, keep: timedelta) -> list[File]:
        """Remove the files whose hour ended longer ago. Returns them."""
        before = datetime.now(UTC) - keep - timedelta(hours=1)
        space = self.declared()
        old = [file for entity in space.entities for file in self.listed(entity) if file.hour < before]
        for file in old:
            self.remove(file.path)
        for order in self.orders():
            if order.append_time < before.timestamp():
                self.drop_order(order)
        return old

    def tidy(self) -> None:
        """Remove what killed runs have left half written."""
        for path in self._names(""):
            if path.endswith(places.PART) and datetime.now(UTC) - self.fs.modified(path) > timedelta(hours=1):
                self.remove(path)

    def put(self, path: str, data: Any) -> None:
        try:
            places.put(self.fs, path, data)
        except Exception as error:
            raise places.unusable(self.url, "written", error) from error

    def remove(self, path: str) -> None:
        try:
            self.fs.rm_file(path)
        except FileNotFoundError:
            return
        except OSError as error:
            raise places.unusable(self.url, "tidied", error) from error

    def _names(self, folder: str) -> list[str]:
        self.fs.invalidate_cache()
        try:
            return sorted(map(str, self.fs.find(f"{self.root}/{folder}".rstrip("/"))))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except Exception as error:
            raise places.unusable(self.url, "listed", error) from error

    def _cuts(self) -> list[str]:
        return [path for path in self._names("_cuts") if started(path.rpartition("/")[2].removesuffix(".json"))]

    def _text(self, path: str) -> bytes | None:
        try:
            return bytes(self.fs.cat_file(path))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except Exception as error:
            raise places.unusable(self.url, "read", error) from error
