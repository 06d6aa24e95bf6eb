"""The cut at an earlier time is the latest that there can be: found here by trying all."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from random import Random

import pytest

from crossrep.archive import columns
from crossrep.archive.columns import Frame
from crossrep.archive.earlier import earlier
from crossrep.archive.store import Archive
from crossrep.columnar import frames
from crossrep.control.cuts import Cut, InFront
from crossrep.control.lineage import Source, encode
from crossrep.errors import DataError
from crossrep.spec import Space
from tests.cluster import SPEC
from tests.crossrep.archive_world import HOUR, rows, samples, store_of

SPACE = Space.parse(SPEC.format(name="old", partitions=2))
UNTIL = HOUR + 100

Batch = tuple[dict[int, tuple[int, int]], list[tuple[int, int, float]]]  # span by event partition; partition, offset, append time of frames


def batches(random: Random) -> list[Batch]:
    """Of workers with one or both event partitions each, as they come; the brokers' clocks differ by up to 8 s."""
    at, offsets, made = [0, 0], [0, 0], []
    skew = [random.uniform(-4, 4) for _ in offsets]
    for turn in range(20):
        parts = random.choice([[0], [1], [0, 1]])
        spans = {part: (at[part], at[part] + random.randint(1, 9)) for part in parts}
        for part, (_, end) in spans.items():
            at[part] = end
        found = []
        for number in random.choices([0, 1], k=random.randint(1, 3)):
            found.append((number, offsets[number], UNTIL + 2 * (turn - 10) + skew[number] + random.random()))
            offsets[number] += 1
        made.append((spans, found))
    return made


def archived(folder: Path, made: list[Batch]) -> tuple[Archive, Cut]:
    store = store_of(SPACE, folder)
    ((partition, value),) = frames.encode(SPACE, rows(SPACE, "user", samples(SPACE, 1)))
    row, vectors = frames.decode(SPACE, value, partition=partition), frames.vectors_as_sent(value)
    ends, files = {}, [list[Frame](), list[Frame]()]
    for spans, found in made:
        ((_, said),) = encode(Source("infer.old", {("events", part): span for part, span in spans.items()}))
        for number, offset, time in found:
            files[number].append(Frame(row, vectors, offset, round(time, 3), said.decode()))
    for number, held in enumerate(files):
        ends[number] = len(held)
        store.put(store.path("user", number, 0, len(held), HOUR), columns.encoded(SPACE, "user", number, held))
    last = {part: max(spans[part][1] for spans, _ in made if part in spans) for part in (0, 1)}
    return store, Cut(id="c", groups={"infer.old": {"events": last}}, ends=ends, skipped={})


@pytest.mark.parametrize("seed", range(30))
def test_nothing_is_cut_apart_and_nothing_more_is_left_out(tmp_path: Path, seed: int) -> None:
    made = batches(Random(seed))
    store, cut = archived(tmp_path, made)
    found = earlier(store, cut, UNTIL)
    sent = [frame for _, of in made for frame in of]
    late = [[offset for number, offset, time in sent if number == n and round(time, 3) >= UNTIL] for n in (0, 1)]
    ends = [min(offsets, default=cut.ends[n]) for n, offsets in enumerate(late)]
    assert [found.ends[n] for n in (0, 1)] == ends

    def is_cut(at: tuple[int, ...]) -> bool:
        for spans, of in made:
            sides = {end <= at[part] for part, (_, end) in spans.items()} | {first < at[part] for part, (first, _) in spans.items()}
            if len(sides) > 1 or (True in sides and any(offset >= ends[number] for number, offset, _ in of)):
                return False
        return True

    tried = [sorted({0, *(spans[part][1] for spans, _ in made if part in spans)}) for part in (0, 1)]
    assert found.groups["infer.old"]["events"] == dict(enumerate(max(filter(is_cut, product(*tried)))))
    kept = [
        offset
        for run in store.rows("user")
        for offset in run.offsets[InFront(found).rows(run.partition, run.offsets, run.sources, run.headers)]
    ]
    assert len(kept) == sum(
        len(of) for spans, of in made if all(end <= found.groups["infer.old"]["events"][p] for p, (_, end) in spans.items())
    )


def test_a_time_behind_the_end_or_before_the_beginning(tmp_path: Path) -> None:
    store, cut = archived(tmp_path, batches(Random(0)))
    assert earlier(store, cut, UNTIL + 1000) == cut
    with pytest.raises(DataError, match=r"holds nothing from before 2023-11-14T21:.*: its first frames are of 2023-11-14T22:00 UTC"):
        earlier(store, cut, HOUR - 1)
