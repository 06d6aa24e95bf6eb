"""RocksDB as a cache: what cannot be trusted is dropped, and what is kept is right."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from state import store as store_module
from state.store import Memory, Meta, Store, open_store

MEMORY = Memory.of(16 << 20)
EXPECTED = Meta("0123456789abcdef", {"frames.s": "f1", "representations.user.s": "u1", "representations.item.s": "i1"})
BOUNDS = {"user": (3, 1000), "item": (5, 1000)}
DAY = 86_400.0


def opened(folder: Path, expected: Meta = EXPECTED, bounds: dict[str, tuple[int, int]] = BOUNDS, kept: float = DAY) -> Store:
    return open_store(folder, expected, bounds, MEMORY, kept)


def further(store: Store, changelog: dict[str, int], folded: dict[str, int]) -> Meta:
    return store.meta.advanced(changelog, folded, store.meta.current)


def filled(folder: Path) -> Path:
    """A closed store of 20 batches: key <batch>-<i> of users holds the batch's number and noise, key "last" the last batch's number."""
    store = opened(folder)
    noise = os.urandom(100)
    for batch in range(20):
        keys = [b"%d-%d" % (batch, i) for i in range(100)]
        values = [b"%d|" % batch + noise] * 100
        store.write(
            {"user": ([*keys, b"last"], [*values, b"%d" % batch]), "item": ([b"last"], [b"%d" % batch])},
            further(store, {"user": 101 * batch // 5}, {"user": batch}),
        )
    store._db.flush()
    store.close()
    return folder


def assert_empty(store: Store) -> None:
    assert store.get("user", [b"0-0", b"last"]) == [None, None]
    assert store.meta.progress == -1
    assert store.meta.changelog == {"user": 3, "item": 5}
    assert (store.meta.space_hash, store.meta.topic_ids) == (EXPECTED.space_hash, EXPECTED.topic_ids)


def assert_whole(store: Store) -> None:
    keys = [b"%d-%d" % (batch, i) for batch in range(20) for i in range(100)]
    assert [value and value.split(b"|")[0] for value in store.get("user", keys)] == [key.split(b"-")[0] for key in keys]
    assert store.meta.progress == 19


def test_a_new_store_is_empty_and_starts_where_the_changelog_does(tmp_path: Path) -> None:
    store = opened(tmp_path / "deep" / "down" / "store")
    assert_empty(store)
    store.close()


def test_what_is_written_is_read_and_deleted(tmp_path: Path) -> None:
    store = opened(tmp_path / "s")
    store.write({"user": ([b"a", b"b"], [b"1", b"2"]), "item": ([b"a"], [b"3"])})
    assert store.get("user", [b"b", b"nobody", b"a", b"a"]) == [b"2", None, b"1", b"1"]
    assert store.get("item", [b"a", b"b"]) == [b"3", None]
    assert store.get("user", []) == []
    store.write({"user": ([b"a", b"never"], [b"", b""])})
    assert store.get("user", [b"a", b"b"]) == [None, b"2"]
    assert store.get("item", [b"a"]) == [b"3"]
    store.close()


def test_entities_with_confusable_keys_are_kept_apart(tmp_path: Path) -> None:
    store = opened(tmp_path / "s")
    records = {"user": ([b"\x01a", b"\xffmeta"], [b"1", b"2"]), "item": ([b"a", b"\xffmeta"], [b"3", b"4"])}
    store.write(records, further(store, {}, {"user": 0, "item": -1}))
    assert store.get("user", [b"\x01a", b"a", b"\xffmeta"]) == [b"1", None, b"2"]
    assert store.get("item", [b"\x01a", b"a", b"\xffmeta"]) == [None, b"3", b"4"]
    store.close()
    again = opened(tmp_path / "s")
    assert again.meta.progress == 0
    again.close()


def test_keys_and_values_of_different_number_write_nothing(tmp_path: Path) -> None:
    store = opened(tmp_path / "s")
    with pytest.raises(ValueError, match="shorter"):
        store.write({"user": ([b"a", b"b"], [b"1"])}, further(store, {"user": 9}, {"user": 9}))
    assert store.get("user", [b"a"]) == [None]
    assert store.meta.progress == -1
    store.close()


def test_a_trusted_store_is_kept(tmp_path: Path) -> None:
    store = opened(filled(tmp_path / "s"))
    assert_whole(store)
    assert store.meta.changelog == {"user": 101 * 19 // 5, "item": 5}
    assert store.get("item", [b"last"]) == [b"19"]
    store.close()


@pytest.mark.parametrize(
    "other",
    [
        {"expected": Meta("fedcba9876543210", EXPECTED.topic_ids)},
        {"expected": Meta(EXPECTED.space_hash, {**EXPECTED.topic_ids, "frames.s": "f2"})},
        {"expected": Meta(EXPECTED.space_hash, {**EXPECTED.topic_ids, "representations.item.s": "i2"})},
        {"bounds": {"user": (3, 382), "item": (5, 1000)}},
    ],
    ids=["spec", "frames topic", "changelog topic", "ahead of the changelog"],
)
def test_what_belongs_to_something_else_is_dropped(tmp_path: Path, other: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    folder = filled(tmp_path / "s")
    store = opened(folder, **other)
    assert store.get("user", [b"0-0", b"last"]) == [None, None]
    assert store.meta.progress == -1
    assert store.meta.space_hash == other.get("expected", EXPECTED).space_hash
    assert "will be rebuilt from the changelog" in caplog.text
    store.close()
    again = opened(folder, **other)  # and stays dropped: the new one is trusted
    assert again.meta.progress == -1
    again.close()


def test_a_store_at_the_very_end_of_the_changelog_is_kept(tmp_path: Path) -> None:
    store = opened(filled(tmp_path / "s"), bounds={"user": (3, 383), "item": (5, 5)})
    assert store.meta.progress == 19
    store.close()


def test_a_store_that_is_behind_is_dropped_when_it_may_have_missed_deletions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the time for which tombstones are kept: the other half is for clocks that are wrong."""
    folder, now = filled(tmp_path / "s"), EXPECTED.current
    for hours, kept in ((11.9, True), (-11.9, True), (12.1, False)):
        monkeypatch.setattr(store_module.time, "time", lambda hours=hours: now + hours * 3600)
        store = opened(folder)
        assert store.meta.progress == (19 if kept else -1), hours
        store.close()


def test_a_store_that_is_not_behind_is_kept_however_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, now = filled(tmp_path / "s"), EXPECTED.current
    monkeypatch.setattr(store_module.time, "time", lambda: now + 30 * DAY)
    store = opened(folder, bounds={"user": (3, 384), "item": (5, 5)})  # one more than it knows: the marker of its own last transaction
    assert store.meta.progress == 19
    store.close()


def test_a_restore_that_never_ended_does_not_count_as_current(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, now = filled(tmp_path / "s"), EXPECTED.current
    monkeypatch.setattr(store_module.time, "time", lambda: now + 11 * 3600)
    store = opened(folder)
    store.write({"user": ([b"a"], [b"1"])}, further(store, {"user": 500}, {"user": 20}))
    store.close()
    monkeypatch.setattr(store_module.time, "time", lambda: now + 13 * 3600)
    store = opened(folder)
    assert_empty(store)
    store.write({}, store.meta.advanced({}, {}, now + 13 * 3600))
    store.close()
    monkeypatch.setattr(store_module.time, "time", lambda: now + 24 * 3600)
    store = opened(folder)
    assert store.meta.current == now + 13 * 3600
    store.close()


def test_records_without_a_meta_leave_what_the_store_says_of_itself(tmp_path: Path) -> None:
    """The changelog's tail is read again from there, which does not mind what is newer."""
    store = opened(filled(tmp_path / "s"))
    store.write({"user": ([b"0-0"], [b""])})
    assert store.get("user", [b"0-0"]) == [None]
    store.close()
    again = opened(tmp_path / "s")
    assert again.get("user", [b"0-0", b"last"]) == [None, b"19"]
    assert again.meta == store.meta and again.meta.progress == 19
    again.close()


def test_of_one_batch_the_last_record_of_a_key_counts(tmp_path: Path) -> None:
    store = opened(tmp_path / "s")
    store.write({"user": ([b"a", b"b", b"a", b"c", b"c"], [b"1", b"2", b"3", b"4", b""])})
    assert store.get("user", [b"a", b"b", b"c"]) == [b"3", b"2", None]
    store.close()


def test_a_scan_goes_through_one_entity_in_steps(tmp_path: Path) -> None:
    store = opened(tmp_path / "s")
    keys = [b"%03d" % i for i in range(10)]
    values = [bytes(18) + np.float64(i).tobytes() for i in range(10)]
    store.write({"user": (keys, values), "item": ([b"000"], [bytes(18) + np.float64(99).tobytes()])})
    seen: list[tuple[bytes, float]] = []
    start: bytes | None = b""
    while start is not None:
        found, times, start = store.scan("user", start, 3)
        seen += zip(found, times.tolist())
    assert seen == [(key, float(i)) for i, key in enumerate(keys)]
    assert store.scan("item", b"", 3)[1].tolist() == [99.0]
    assert store.newest_event() == 99.0
    store.close()


def test_shredded_keys_leave_the_files(tmp_path: Path) -> None:
    store = opened(tmp_path / "s")
    secret, other = os.urandom(200), os.urandom(200)
    store.write({"user": ([b"17", b"18"], [secret, other])})
    store._db.flush()
    store.write({"user": ([b"17"], [b""])})
    assert any(secret in path.read_bytes() for path in (tmp_path / "s").glob("*")), "RocksDB keeps it by itself"
    store.shred("user", [b"17"])
    assert not any(secret in path.read_bytes() for path in (tmp_path / "s").glob("*"))
    assert store.get("user", [b"17", b"18"]) == [None, other]
    store.close()


# --- damage ---


def flip(path: Path, start: int, length: int = 64) -> None:
    data = bytearray(path.read_bytes())
    for i in range(start, min(start + length, len(data))):
        data[i] ^= 0x5A
    path.write_bytes(data)


def truncate(path: Path, share: float) -> None:
    os.truncate(path, int(path.stat().st_size * share))


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "CURRENT garbled": lambda f: (f / "CURRENT").write_bytes(b"garbage"),
    "CURRENT empty": lambda f: (f / "CURRENT").write_bytes(b""),
    "CURRENT names a missing manifest": lambda f: (f / "CURRENT").write_bytes(b"MANIFEST-999999\n"),
    "MANIFEST garbled": lambda f: flip(next(f.glob("MANIFEST-*")), 20, 1000),
    "MANIFEST cut": lambda f: truncate(next(f.glob("MANIFEST-*")), 0.3),
    "MANIFEST missing": lambda f: next(f.glob("MANIFEST-*")).unlink(),
    "SST missing": lambda f: next(f.glob("*.sst")).unlink(),
    "SST cut": lambda f: truncate(next(f.glob("*.sst")), 0.5),
    "SST empty": lambda f: truncate(next(f.glob("*.sst")), 0),
    "SST footer garbled": lambda f: flip(next(f.glob("*.sst")), next(f.glob("*.sst")).stat().st_size - 60),
    "SST index or filter garbled": lambda f: flip(next(f.glob("*.sst")), int(next(f.glob("*.sst")).stat().st_size * 0.985), 2000),
    "SST data garbled": lambda f: flip(next(f.glob("*.sst")), next(f.glob("*.sst")).stat().st_size // 3),
    "SST data zeroed": lambda f: next(f.glob("*.sst")).open("r+b").write(bytes(9000)),
    "not a database": lambda f: [p.unlink() for p in f.iterdir() if p.name != "LOCK"] and (f / "CURRENT").write_text("x"),
    "a file in its place": lambda f: (shutil.rmtree(f), f.write_text("x")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_store_is_dropped_at_the_latest_on_the_restart_after_it_failed(tmp_path: Path, damage: str) -> None:
    """A process may die of a checksum once. If it starts again and dies of it again, it never recovers: a crash loop."""
    folder = filled(tmp_path / "s")
    DAMAGE[damage](folder)
    for _start in range(2):
        store = opened(folder)
        try:
            assert_empty(store) if store.meta.progress == -1 else assert_whole(store)
            store.write({"user": ([b"new"], [b"1"])}, further(store, {}, {"user": 30}))
            assert store.get("user", [b"new"]) == [b"1"]
            return
        except AssertionError:
            raise
        except Exception as error:  # what ends the process
            failure = error
        finally:
            store.close()
    pytest.fail(f"dies again after a restart: {failure}")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.33, 0.5, 0.77, 0.95, 0.9999, 1.0])
@pytest.mark.parametrize("damaging", ["cut", "garbled"])
def test_a_torn_write_ahead_log_gives_an_earlier_but_true_state(tmp_path: Path, share: float, damaging: str) -> None:
    """Power lost: batches at the end may be gone, but then progress says so."""
    store = opened(tmp_path / "live")
    for batch in range(30):
        store.write(
            {"user": ([b"a", b"%d" % batch], [b"%d" % batch, b"x" * 500]), "item": ([b"a"], [b"%d" % batch])},
            further(store, {"user": batch}, {"user": batch}),
        )
    shutil.copytree(tmp_path / "live", tmp_path / "s", ignore=shutil.ignore_patterns("LOCK"))
    store.close()
    wal = max((tmp_path / "s").glob("*.log"), key=lambda path: path.stat().st_size)
    if damaging == "cut":
        truncate(wal, share)
    else:
        flip(wal, int(wal.stat().st_size * share))
    torn = opened(tmp_path / "s")
    progress = torn.meta.progress
    expected = None if progress == -1 else b"%d" % progress
    assert torn.get("user", [b"a"]) == torn.get("item", [b"a"]) == [expected]
    assert [value is not None for value in torn.get("user", [b"%d" % i for i in range(30)])] == [i <= progress for i in range(30)]
    assert torn.meta.changelog["user"] == (progress if progress >= 0 else 3)
    if share == 1.0:
        assert progress == 29
    torn.close()


@pytest.mark.parametrize(
    "meta",
    [
        b"not json",
        b"{}",
        b"[]",
        b'{"space_hash": 1, "more": 2}',
        b"\xff",
        json.dumps({**vars(EXPECTED), "changelog": {"user": 3}}).encode(),
    ],
)
def test_garbled_progress_is_dropped(tmp_path: Path, meta: bytes) -> None:
    folder = filled(tmp_path / "s")
    store = opened(folder)
    store._db[store_module._META] = meta
    store.close()
    again = opened(folder)
    assert_empty(again)
    again.close()


def test_a_store_in_use_is_not_dropped_under_its_owner(tmp_path: Path) -> None:
    """A lock held means that the owner lives (a stopped process that wakes up, say): an error, never a reason to delete its files."""
    folder = filled(tmp_path / "s")
    store = opened(folder)
    with pytest.raises(Exception, match=r"(?i)lock"):
        opened(folder).close()
    assert_whole(store)
    store.close()
    again = opened(folder)
    assert_whole(again)
    again.close()
