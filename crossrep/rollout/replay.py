"""A replay from its beginning to the hand-over. Every step can be repeated: a repeated replay goes on with the snapshot it began with."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from crossrep import kafka
from crossrep.archive.earlier import earlier
from crossrep.archive.store import Archive
from crossrep.control.cuts import Cut
from crossrep.control.groups import Offsets
from crossrep.errors import DataError, StateError
from crossrep.rollout import handover, replay_archive, replay_files, replay_tables, seeding
from crossrep.snapshots.store import Manifest, Replayed, Store
from crossrep.spec import Space

FOLD, SEED = "folding", "writing"

Progressed = Callable[[str, int, int], None]  # step, rows further, of so many


@dataclass(frozen=True)
class Done:
    manifest: Manifest
    rows: int  # folded now; 0: the snapshot was there already
    seconds: float  # of folding
    seeded: int  # rows written to the space now
    handed_over: Offsets


def replay(
    source: str,
    space: Space,
    bootstrap: str,
    archive_url: str | None = None,
    snapshots_url: str | None = None,
    threads: int = 2,
    seed: bool = True,
    hand_over: bool = True,
    accept_gap: bool = False,
    until: float | None = None,
    progressed: Progressed = lambda step, rows, total: None,
) -> Done:
    """Build a snapshot of the space, write it into the space, and let the space's inference workers go on behind it.

    Args:
        source: the name of an archived space; or Parquet files of samples, if it holds a "/" or "*" or ends in ".parquet".
        accept_gap: replay an archive that lacks frames.
        until: only frames that were appended before, by the brokers' clock, seconds since 1970.

    Raises:
        SpaceError, DataError, StateError: source and space do not fit, or the space is in use already. Says what to do.
        CrossrepError: the cluster does not answer. Repeating is safe.
    """
    store = Store(snapshots_url, space.name)
    files = "/" in source or "*" in source or source.endswith(".parquet")
    archive = None if files else Archive(archive_url, source)
    if until is not None and archive is None:
        raise DataError(f"files of samples do not say when they were written: {source} cannot be replayed until a time")
    begun = _begun(store, space, bootstrap) if seed else None
    cut = _cut(archive, begun, until) if archive is not None else None
    to: Offsets = {}
    if hand_over and archive is not None:
        if cut is None:
            raise DataError(f"the archive of space {source!r} has no cut yet. Make one: crossrep archive {source}. Or: --no-hand-over")
        to = handover.offsets(cut, archive.declared(), space, bootstrap)
    rows, seconds, manifest = 0, 0.0, begun
    if manifest is None:
        work = replay_archive.of_archive(archive, space, cut, accept_gap) if archive else replay_files.of_files(source, space)
        began = time.monotonic()
        tables = replay_tables.fold(space, work.tasks, threads, lambda rows: progressed(FOLD, rows, work.rows))
        seconds = max(time.monotonic() - began, 1e-9)
        rows = sum(table.folded for table in tables.values())
        manifest = replay_tables.publish(
            store, space, tables, Replayed(source=archive.root if archive else source, cut=cut, until=until), work.model
        )
    total = manifest.rows
    seeded = seeding.seed(store, manifest, space, bootstrap, progressed=lambda rows: progressed(SEED, rows, total)) if seed else 0
    handover.hand_over(space, to, bootstrap)
    return Done(manifest, rows, seconds, seeded, to)


def _cut(archive: Archive, begun: Manifest | None, until: float | None) -> Cut | None:
    """Up to where the archive is replayed: the cut that an earlier run began with, the newest, or the part of that from before a time."""
    if begun is not None and begun.replayed is not None:
        if begun.replayed.until != until:
            raise StateError(
                f"an earlier replay into space {begun.space!r} was until another time. Repeat that one, or replay into a new space"
            )
        return begun.replayed.cut
    newest = archive.cut()
    if until is None:
        return newest
    if newest is None:
        raise DataError(f"the archive of space {archive.space!r} has no cut yet. Make one: crossrep archive {archive.space}")
    return earlier(archive, newest, until)


def _begun(store: Store, space: Space, bootstrap: str) -> Manifest | None:
    """The snapshot that an earlier, perhaps interrupted replay has begun to write into the space."""
    client = kafka.consumer(bootstrap, seeding.import_group(space))
    try:
        marker = seeding.marker(client, space)
    finally:
        client.close()
    found = store.manifest(marker.snapshot) if marker is not None else None
    return found if found is not None and found.replayed is not None else None
