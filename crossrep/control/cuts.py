"""Cuts: for which events an archive is complete, so that a replay can hand over to the live stream: nothing twice, nothing missed.

`crossrep infer` (and `crossrep frame`) commits a batch's frames and the offsets of its events in one transaction. So an archiver

1. reads the group's committed offsets G, all as of one moment;
2. then asks for the ends E of the frames topic, open transactions included: every frame whose transaction set an offset of G was appended
   before;
3. then archives everything committed below E, once no transaction is open below it.

Every batch that ends at G or before it is then in the archive, whole; and none lies across G, since offsets of G are ends of batches. The
frames of later batches below E are told apart by what each says of its events (crossrep/control/lineage.py). What was aborted is never
read.

A rewind leaves frames out and sets G back. One that was complete before step 1 is part of the cut (`skipped`); one in between is seen by
looking again, and there is no cut then.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from crossrep.control import groups, lineage, spaces
from crossrep.control.groups import Offsets
from crossrep.errors import DataError
from crossrep.spec import Space, frame_group, infer_group

Spans = list[tuple[int, int]]


class Cut(BaseModel):
    """A moment between events: the archive holds all that was made of the events in front of it."""

    id: str  # when it was made, UTC
    groups: dict[str, Offsets]  # consumer group -> input topic -> partition -> the first event behind the cut
    ends: dict[int, int]  # partition of frames -> everything committed below is archived
    skipped: dict[int, Spans]  # partition of frames -> [first, next) offsets that a rewind has left out


@dataclass(frozen=True)
class Moment:
    """What the cluster says at one moment."""

    groups: dict[str, Offsets]
    skipped: dict[int, Spans]


def moment(space: Space, bootstrap: str) -> Moment:
    """Raises CrossrepError: the cluster does not answer."""
    skipped = {number: skipped for number, (_, skipped) in groups.folded(space, bootstrap).items()}
    committed = {group: groups.offsets(bootstrap, group) for group in (infer_group(space), frame_group(space))}
    return Moment({group: offsets for group, offsets in committed.items() if offsets}, skipped)


def cut(space: Space, bootstrap: str, before: Moment, ends: dict[int, int], id: str, last: Cut | None) -> Cut | None:
    """The cut at `before`, once everything below the ends, asked for later, is archived. None: a rewind came in between.

    Args:
        last: the newest cut there was: what was left out once stays so, also when the frames are gone from the topic and nobody else knows.
    """
    after = moment(space, bootstrap)
    went_back = any(
        after.groups.get(group, {}).get(topic, {}).get(number, -1) < offset
        for group, topics in before.groups.items()
        for topic, numbers in topics.items()
        for number, offset in numbers.items()
    )
    if went_back or after.skipped != before.skipped or spaces.find(space.name, bootstrap).rewinding:
        return None
    skipped = {number: sorted({*spans, *(last.skipped.get(number, []) if last else [])}) for number, spans in before.skipped.items()}
    return Cut(id=id, groups=before.groups, ends=ends, skipped=skipped)


@dataclass
class InFront:
    """Which rows of an archive lie in front of a cut; without one, all do."""

    cut: Cut | None
    _known: dict[str, bool] = field(default_factory=dict)

    def rows(self, partition: int, offsets: NDArray[np.int64], sources: NDArray[np.int32], headers: list[str]) -> NDArray[np.bool_]:
        """bool [n]. Frames that do not say of which events they were made count by their offset alone.

        Args:
            sources: by row, an index into `headers`, or -1.

        Raises:
            DataError: a frame is of a group whose offsets the cut does not know, or a batch lies across the cut.
        """
        if self.cut is None:
            return np.ones(len(offsets), np.bool_)
        wanted: NDArray[np.bool_] = offsets < self.cut.ends.get(partition, 0)
        for first, end in self.cut.skipped.get(partition, []):
            wanted &= (offsets < first) | (offsets >= end)
        # Only what is left is asked: a rewind makes other batches of the same events, and those it left out may lie across.
        said = np.ones(len(headers) + 1, np.bool_)  # -1 is the last one
        for index in np.unique(sources[wanted]).tolist():
            said[index] = index < 0 or self._header(self.cut, headers[index])
        wanted &= said[sources]
        return wanted

    def _header(self, cut: Cut, header: str) -> bool:
        if header not in self._known:
            self._known[header] = _in_front(cut, lineage.parse(header))
        return self._known[header]


def _in_front(cut: Cut, source: lineage.Source) -> bool:
    offsets = cut.groups.get(source.group)
    if offsets is None:
        raise DataError(
            f"frames of group {source.group!r} are archived, but cut {cut.id} does not know how far it was: it had just begun, or its "
            "offsets have expired. Archive again when its workers have run, and take the new cut"
        )
    in_front = {end <= offsets.get(topic, {}).get(number, 0) for (topic, number), end in source.ends.items()}
    if len(in_front) != 1:
        raise DataError(f"a batch lies across cut {cut.id}: {source.ends}, offsets {offsets}. Archive again, and take the new cut")
    return in_front.pop()
