"""What was known before each of many samples, of every entity whose key they have: for training sets as files and as a topic."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from crossrep.archive.store import Archive
from crossrep.columnar.rows import Known
from crossrep.control.cuts import Cut
from crossrep.errors import DataError
from crossrep.extras import extra
from crossrep.files import parquet
from crossrep.keys import Keys
from crossrep.spec import Space, infer_group
from crossrep.training.samples import attached_entities
from crossrep.training.sweep import Moments, Used, attach, unknown

with extra("analytics"):
    import pyarrow as pa

Progressed = Callable[[str, int, int], None]  # what is done, how much further it is, of so much


class Attached(BaseModel):
    """Of one entity, over all samples."""

    found: int  # samples whose key was known before
    rows: int  # archived rows looked at
    combined: int  # of these, rows of several events: `crossrep infer --no-combine` writes none
    blurred: int  # samples whose next row is one of these, which may hold events from before the impression that were left out


def usable_cut(space: Space, archive: Archive) -> Cut:
    """The archive's newest. Raises DataError: there is no archive, or one of another spec, or without a cut."""
    if archive.declared().hash != space.hash:
        raise DataError(f"the archive in {archive.url} is of another spec than the published space {space.name!r}")
    cut = archive.cut()
    if cut is None:
        raise DataError(f"the archive in {archive.url} has no cut: crossrep archive {space.name} --to {archive.url} makes one")
    return cut


def archived(space: Space, cut: Cut, sample_ids: list[str]) -> NDArray[np.bool_]:
    """bool [n]: which samples' impressions `infer` had consumed when the archive was last complete.

    What was consumed later may lie before an impression, and is not in the archive. Where no `infer` works, nobody can tell: all.
    """
    reached = cut.groups.get(infer_group(space), {}).get(space.inputs.impressions)
    if not reached:
        return np.ones(len(sample_ids), np.bool_)
    places = (id.split("-") for id in sample_ids)
    return np.fromiter((int(offset) < reached.get(int(number), 0) for number, offset in places), np.bool_, len(sample_ids))


def attach_all(
    space: Space, table: Any, archive: Archive, cut: Cut, delay: float, memory: int, folder: Path, progressed: Progressed
) -> tuple[dict[str, Known], dict[str, Attached]]:
    """What was known before every sample of a table, by entity, in files of the folder; and what it was made of.

    Args:
        table: of `sample_tables.SCHEMA`, or more.
        delay: seconds before the impression from which on nothing is known.
        memory: bytes of archived rows held at a time.

    Raises:
        DataError: a file of the archive is damaged.
    """
    found: dict[str, Known] = {}
    about: dict[str, Attached] = {}
    for entity in attached_entities(space):
        known, used = _attach(space, entity, table, archive, cut, delay, memory, folder, progressed)
        found[entity] = known
        about[entity] = Attached(found=int((known.counts > 0).sum()), rows=used.rows, combined=used.combined, blurred=used.blurred)
    return found, about


def event_times(table: Any) -> NDArray[np.int64]:
    """Of the samples' impressions, ms since 1970."""
    times: NDArray[np.int64] = table["event_time"].cast(pa.int64()).to_numpy()
    return times


def keys_in(table: Any, field: str) -> tuple[Keys, NDArray[np.int64]]:
    """The keys in a field, and the rows that have one."""
    texts = table[field].combine_chunks()
    rows = np.flatnonzero(texts.to_numpy(zero_copy_only=False) != "")
    if len(rows) < len(texts):
        texts = texts.take(pa.array(rows))
    return parquet.keys_of(texts, pa.nulls(len(texts), pa.binary())), rows


def known_before(milliseconds: NDArray[np.int64], delay: float) -> NDArray[np.float64]:
    """Before which event times, seconds since 1970, something counts: in whole milliseconds, so that seconds come out as events' do."""
    return (milliseconds - round(delay * 1000)) / 1000


def _attach(
    space: Space, entity: str, table: Any, archive: Archive, cut: Cut, delay: float, memory: int, folder: Path, progressed: Progressed
) -> tuple[Known, Used]:
    keys, rows = keys_in(table, space.key_field(entity))
    milliseconds = event_times(table)[rows]
    before, at = known_before(milliseconds, delay), milliseconds / 1000

    def array(name: str, shape: tuple[int, ...], dtype: type) -> NDArray[Any]:
        return np.memmap(folder / f"{entity}-{name}", dtype, "w+", shape=shape) if 0 not in shape else np.zeros(shape, dtype)

    known, used = unknown(space.entities[entity], len(table), array), Used()
    partitions = keys.partitions(space.partitions)
    for number in range(space.partitions):
        here = np.flatnonzero(partitions == number)
        if len(here):
            moments = Moments(keys.take(here), before[here], at[here])
            attach(archive, cut, entity, number, moments, known, rows[here], used, memory)
        progressed(entity, len(here), len(rows))
    return known, used
