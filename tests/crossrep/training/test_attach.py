"""What was known before a moment, against the sums of the definition: any rows, times, moments, memory and key lives."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from crossrep.archive import columns
from crossrep.archive.columns import Frame
from crossrep.archive.store import About, Archive
from crossrep.columnar.aggregates import combine
from crossrep.columnar.rows import Known, Rows
from crossrep.control.cuts import Cut
from crossrep.keys import Keys
from crossrep.spec import Space
from crossrep.training.sweep import Moments, Used, attach, unknown, weights_at
from crossrep.writer import rows_of
from tests.cluster import SPEC

SPACE = Space.parse(SPEC.format(name="attached", partitions=1))
HALF_LIFE = 3600.0


def archived(folder: Path, space: Space, frames: list[Rows]) -> tuple[Archive, Cut]:
    """An archive of user frames, one an offset, all in front of the cut."""
    archive = Archive(str(folder), space.name)
    archive.begin(About(space=space.name, spec_hash=space.hash.hex(), spec=space.toml_dict, topic_id="x"))
    kept = [
        Frame(rows, {n: c.vectors for n, c in rows.columns.items() if c.vectors.shape[1]}, at, 1.7e9, None)
        for at, rows in enumerate(frames)
    ]
    archive.put(archive.path("user", 0, 0, len(frames), 1.7e9), columns.encoded(space, "user", 0, kept))
    return archive, Cut(id="c", groups={}, ends={0: len(frames)}, skipped={})


def users(space: Space, ids: list[str], events: list[str], times: list[float], seed: int = 0) -> Rows:
    random = np.random.default_rng(seed)
    sources = {name: random.normal(size=(len(ids), dim)).astype(np.float32) for name, dim in space.sources.items()}
    return rows_of(space, "user", ids, np.array(events), times, sources)


def asked(archive: Archive, cut: Cut, keys: list[str], before: list[float], at: list[float], memory: int = 1 << 30) -> tuple[Known, Used]:
    known, used = unknown(archive.declared().entities["user"], len(keys)), Used()
    moments = Moments(Keys.of(keys), np.array(before), np.array(at))
    attach(archive, cut, "user", 0, moments, known, np.arange(len(keys)), used, memory)
    return known, used


def brute(rows: Rows, names: list[str], key: str, before: float, at: float, life: float = np.inf) -> dict[str, Any]:
    """By definition, in float64."""
    past = sorted((i for i, name in enumerate(names) if name == key and rows.times[i] < before), key=lambda i: float(rows.times[i]))
    for n in reversed(range(len(past))):
        if (rows.times[past[n + 1]] if n + 1 < len(past) else at) - rows.times[past[n]] > life:
            past = past[n + 1 :]
            break
    found: dict[str, Any] = {"count": len(past), "newest": max((rows.times[i] for i in past), default=-np.inf)}
    cr, clicks, ur = rows.columns["cr"], rows.columns["clicks"], rows.columns["ur"]
    shares = np.array([cr.weights[i] * 2.0 ** (-(at - rows.times[i]) / HALF_LIFE) for i in past])
    found["cr_weight"] = shares.sum()
    found["cr"] = shares @ cr.vectors[past].astype(float) / shares.sum() if past else np.zeros(8)
    found["clicks"] = sum(clicks.weights[i] * 2.0 ** (-(at - rows.times[i]) / 86_400) for i in past if clicks.present[i])
    found["ur"] = max(((rows.times[i], ur.vectors[i].tobytes()) for i in past), default=(0, np.zeros(4, "f4").tobytes()))[1]
    return found


def refuse_differences(known: Known, at: NDArray[np.float64], i: int, expected: dict[str, Any]) -> None:
    left = {name: weights_at(known.columns[name], half_life, at)[i] for name, half_life in (("cr", HALF_LIFE), ("clicks", 86_400.0))}
    assert known.counts[i] == expected["count"] and known.event_times[i] == expected["newest"]
    assert left["cr"] == pytest.approx(expected["cr_weight"], rel=1e-9)
    np.testing.assert_allclose(known.columns["cr"].vectors[i], expected["cr"], rtol=1e-5, atol=1e-6)
    assert left["clicks"] == pytest.approx(expected["clicks"], rel=1e-9)
    assert known.columns["ur"].vectors[i].tobytes() == expected["ur"]
    assert bool(known.columns["cr"].present[i]) == (expected["count"] > 0)


EVENTS = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["impression", "click"]), st.integers(0, 40)), max_size=25)
MOMENTS = st.lists(st.tuples(st.sampled_from("abcd"), st.integers(-1, 42), st.integers(0, 3)), min_size=1, max_size=12)


@settings(max_examples=40)
@given(EVENTS, MOMENTS, st.sampled_from([0, 1 << 30]), st.sampled_from(["", "10m"]))
def test_it_is_the_definition(events: list[Any], moments: list[Any], memory: int, life: str) -> None:
    """Times are minutes; some moments are those of events, which then do not count."""
    space = Space.parse(SPEC.format(name="attached", partitions=1) + (f'[entities.user]\nexpire_after = "{life}"\n' if life else ""))
    names = [name for name, _, _ in events]
    rows = users(space, names, [event for _, event, _ in events], [1.6e9 + 60.0 * minute for _, _, minute in events])
    frames = [rows.take(part) for part in np.array_split(np.arange(len(events)), 3) if len(part)]
    keys = [key for key, _, _ in moments]
    at = [1.6e9 + 60.0 * minute for _, minute, _ in moments]
    before = [time - delay * 20.0 for time, (_, _, delay) in zip(at, moments)]
    with tempfile.TemporaryDirectory() as folder:
        known, used = asked(*archived(Path(folder), space, frames), keys, before, at, memory)
    for i, key in enumerate(keys):
        refuse_differences(known, np.array(at), i, brute(rows, names, key, before[i], at[i], 600.0 if life else np.inf))
    assert used.combined == used.blurred == 0
    assert used.passes == 1 or not memory


def test_a_combined_row_that_straddles_the_moment_is_left_out_and_counted(tmp_path: Path) -> None:
    rows = users(SPACE, ["a", "a", "a", "b"], ["impression"] * 4, [100.0, 200.0, 300.0, 100.0])
    straddling = combine(SPACE, rows.take(np.array([1, 2])))
    cut = archived(tmp_path, SPACE, [rows.take(np.array([0, 3])), straddling])
    known, used = asked(*cut, ["a", "a", "b"], [250.0, 300.5, 250.0], [250.0, 300.5, 250.0])
    assert known.counts.tolist() == [1, 3, 1]  # the second row's event of 200 is known only together with that of 300
    assert known.event_times.tolist() == [100.0, 300.0, 100.0]
    assert (used.rows, used.combined, used.blurred) == (3, 1, 1)


def test_frames_behind_the_cut_or_left_out_by_a_rewind_do_not_count(tmp_path: Path) -> None:
    frames = [users(SPACE, ["a"], ["impression"], [100.0 + at]) for at in range(5)]
    archive, cut = archived(tmp_path, SPACE, frames)
    known, _ = asked(archive, cut.model_copy(update={"ends": {0: 4}, "skipped": {0: [(1, 3)]}}), ["a"], [200.0], [200.0])
    assert known.counts.tolist() == [2] and known.event_times.tolist() == [103.0]
