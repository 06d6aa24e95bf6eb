"""Looking after an archive: small files made into larger ones, and what is to be forgotten taken out. One process at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from itertools import groupby
from typing import Any

from crossrep.archive.columns import settings
from crossrep.archive.store import Archive, File
from crossrep.extras import extra
from crossrep.files.parquet import ROWS, id_column
from crossrep.spec import Space

with extra("analytics"):
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

MERGED_ROWS = 2_000_000  # of a file made of several

Stepped = Callable[[], None]  # a file further


def compact(store: Archive, stepped: Stepped = lambda: None) -> int:
    """Make one file of those of the same partition and hour, of hours that are over. Returns how many files became fewer.

    The old ones, and what two runs at once have written twice, go at the next run: who was reading them can finish.

    Raises:
        DataError: there is no archive, or nothing can be written there.
    """
    space, this_hour, fewer = store.declared(), datetime.now(UTC).replace(minute=0, second=0, microsecond=0), 0
    store.tidy()
    for entity in space.entities:
        taken = store.files(entity)
        kept = {file.path for file in taken}
        for file in store.listed(entity):
            if file.path not in kept:
                store.remove(file.path)
        over = [file for file in taken if file.hour < this_hour]
        for _, several in groupby(over, lambda file: (file.partition, file.hour)):
            for run in _runs(store, list(several)):
                if len(run) > 1:
                    fewer += _merge(store, run)
                    stepped()
    return fewer


def _runs(store: Archive, files: list[File]) -> Iterator[list[File]]:
    """Files that touch, of MERGED_ROWS together at most."""
    run: list[File] = []
    rows = 0
    for file in files if len(files) > 1 else []:
        size = store.size(file)
        if run and (file.first > run[-1].end or rows + size > MERGED_ROWS):
            yield run
            run, rows = [], 0
        run, rows = [*run, file], rows + size
    yield run


def _merge(store: Archive, files: list[File]) -> int:
    tables = [_table(store, file) for file in files]
    if any(table.schema != tables[0].schema for table in tables):  # float16 and float32: as they are
        return 0
    tables = [table.filter(pc.field("_offset") >= file.start) for table, file in zip(tables, files)]
    first, last = files[0], files[-1]
    path = store.path(first.entity, first.partition, first.start, last.end, first.hour.timestamp())
    _put(store, path, pa.concat_tables(tables))
    return len(files) - 1


def erase(store: Archive, stepped: Stepped = lambda: None) -> int:
    """Take the rows that are to be forgotten out of the files, and then the orders away. Returns the rows taken out.

    Raises:
        DataError: there is no archive, or nothing can be written there.
    """
    space, orders, cut, erased = store.declared(), store.orders(), store.cut(), 0
    for entity in space.entities:
        # An order may be there before the frames in front of it, while an archiver runs: it waits for the next time.
        reached = {**store.progress(entity), **(cut.ends if cut else {})}
        due = [order for order in orders if order.entity == entity and order.offset < reached.get(order.partition, 0)]
        for file in store.listed(entity):
            mine = {bytes.fromhex(order.key): order.offset for order in due if order.partition == file.partition}
            if mine and file.first < max(mine.values()):
                erased += _erase(store, space, file, mine)
            stepped()
        for order in due:
            store.drop_order(order)
    return erased


def _erase(store: Archive, space: Space, file: File, forgotten: dict[bytes, int]) -> int:
    id = id_column(space.entities[file.entity].columns)
    about = _table(store, file, [id, "_key", "_offset"])
    keys = pc.coalesce(about["_key"].cast(pa.binary()), about[id].cast(pa.string()).cast(pa.binary()))
    wanted = pa.chunked_array([pa.array([True] * len(about))])
    for key, offset in forgotten.items():
        wanted = pc.and_(wanted, pc.invert(pc.and_(pc.equal(keys, pa.scalar(key, pa.binary())), pc.less(about["_offset"], offset))))
    gone = len(about) - int(pc.sum(wanted).as_py() or 0)
    if gone:
        _put(store, file.path, _table(store, file).filter(wanted))
    return gone


def _table(store: Archive, file: File, columns: list[str] | None = None) -> Any:
    with store.opened(file) as opened:
        return opened.table(columns)


def _put(store: Archive, path: str, table: Any) -> None:
    out = pa.BufferOutputStream()
    pq.write_table(table, out, row_group_size=ROWS, **settings(table.schema))
    store.put(path, out.getvalue())
