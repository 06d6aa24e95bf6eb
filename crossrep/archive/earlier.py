"""A cut in the past: of an archive's newest cut, only what was written before a time.

With it `crossrep replay --until` rewinds further than the frames topic and the history reach: a new space is filled with the state of then,
and its inference workers read the events since again.
"""

from __future__ import annotations

from collections import defaultdict
from copy import deepcopy
from datetime import UTC, datetime

import numpy as np

from crossrep.archive.store import Archive
from crossrep.control import lineage
from crossrep.control.cuts import Cut, InFront
from crossrep.errors import DataError

MARGIN = 60.0  # seconds before the time in which a batch may have begun that ends behind it


def earlier(store: Archive, cut: Cut, until: float) -> Cut:
    """The part of a cut that lies before `until`, by the brokers' clock, seconds since 1970.

    Behind it are all frames from a partition's first one appended at `until` or later, every batch that has one of these, and every batch
    whose events do not all lie in front of those: no batch is cut apart, and no event is in front whose partition's earlier ones are not.
    Reads three columns of the files since; a batch from before them that would be cut apart is refused by the replay.

    Raises:
        DataError: nothing was archived before, or a file is damaged.
    """
    files = [file for entity in store.declared().entities for file in store.files(entity)]
    if not any(file.hour.timestamp() < until for file in files):
        hours = [file.hour for file in files]
        begins = f"its first frames are of {min(hours):%Y-%m-%dT%H}:00 UTC" if hours else "it is empty"
        raise DataError(f"{store.root} holds nothing from before {datetime.fromtimestamp(until, UTC):%Y-%m-%dT%H:%M:%S}: {begins}")
    ends, in_front = dict(cut.ends), InFront(cut)
    batches: dict[str, dict[int, int]] = defaultdict(dict)  # header -> partition -> its last frame
    for file in files:
        if file.hour.timestamp() + 3600 < until - MARGIN:
            continue
        with store.opened(file) as opened:
            offsets, times, sources, headers = opened.appended()
        wanted = (offsets >= file.start) & in_front.rows(file.partition, offsets, sources, headers)
        late = offsets[wanted & (times >= until)]
        ends[file.partition] = int(late.min(initial=ends.get(file.partition, 0)))
        last = np.full(len(headers), -1)
        said = wanted & (sources >= 0)
        np.maximum.at(last, sources[said], offsets[said])
        for index in np.flatnonzero(last >= 0).tolist():
            of = batches[headers[index]]
            of[file.partition] = max(of.get(file.partition, -1), int(last[index]))
    made_of, groups = {header: lineage.parse(header) for header in batches}, deepcopy(cut.groups)
    more = {header for header, lasts in batches.items() if any(last >= ends[number] for number, last in lasts.items())}
    behind: set[str] = set()
    while more:
        for source in map(made_of.__getitem__, more):
            for (topic, number), (first, _) in source.spans.items():
                numbers = groups[source.group][topic]
                numbers[number] = min(numbers[number], first)
        behind |= more
        more = {
            header
            for header in batches.keys() - behind
            if any(end > groups[made_of[header].group][topic][number] for (topic, number), end in made_of[header].ends.items())
        }
    return cut.model_copy(update={"groups": groups, "ends": ends})
