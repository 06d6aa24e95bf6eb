"""Tables (Markdown) and a plot (SVG) from the runs of `study.retrieval`."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from study import intervals
from study.intervals import Interval
from study.ranks import KS
from study.retrieval import ARMS, BEST, RECENT, Settings
from study.runs import Run
from study.tables import STYLE, difference, plot_differences, save, table

RECALLS = [f"recall@{k}" for k in KS]
LAST = RECALLS[-1]


def write(settings: Settings, runs: list[Run], folder: Path) -> list[Path]:
    """retrieval.md and retrieval.svg in `folder`."""
    tables = folder / "retrieval.md"
    parts = (_quality(settings, runs), _differences(runs), _index(runs))
    tables.write_text("\n".join(line for part in parts for line in [*part, ""]))
    panels = {f"{LAST}: over seeds": _over_seeds(runs, LAST), f"{LAST}: over users": _over_users(runs)}
    below = f"less that of the {RECENT}, 95 % interval; blue where zero is outside"
    with matplotlib.rc_context(STYLE):
        return [tables, save(plot_differences(Figure((9, 3.6), layout="constrained"), panels, below), folder / "retrieval.svg")]


def _quality(settings: Settings, runs: list[Run]) -> list[str]:
    names = [*RECALLS, "recall@100 of users with clicks", "recall@100 of users without", "auc"]
    rows = []
    for arm in ARMS:
        own = {name for trial in ARMS[arm].trials for name in trial}
        chosen = ", ".join(f"{name} {value:g}" for name, value in settings[arm].items() if name in own)
        rows.append([arm, chosen, *(_text(_of(runs, arm, name)) for name in names)])
    first = runs[0]
    title = f"Test, {first['queries']:,} questions of {first['users']:,} users, means over {len(runs)} seeds with 95 % intervals"
    return table(title, ["scored by", "chosen", *names[:-1], "AUC of what was shown"], rows)


def _differences(runs: list[Run]) -> list[str]:
    seeds, users = {name: _over_seeds(runs, name) for name in RECALLS}, _over_users(runs)
    rows = [[arm, *(difference(seeds[name][arm]) for name in RECALLS), difference(users[arm])] for arm in users]
    header = ["scored by", *(f"{name}, over seeds" for name in RECALLS), f"{LAST}, over users"]
    return table(f"Differences to the {RECENT}, 95 % intervals; bold where zero is outside", header, rows)


def _index(runs: list[Run]) -> list[str]:
    names = ["found by the index", LAST, "recall@100 by the index"]
    found = [_text(_of(runs, BEST, name)) for name in names]
    header = ["scored by", "of the exact 100, the index finds", "recall@100, exact", "by the index"]
    return table("The index of usearch, popularity as one more dimension", header, [[BEST, *found]])


def _of(runs: list[Run], arm: str, name: str) -> Interval:
    return intervals.of_mean([run["arms"][arm][name] for run in runs])


def _text(found: Interval) -> str:
    return f"{found.mean:.4f}" if found.half < 1e-12 else found.text(4)  # popularity knows no seed


def _over_seeds(runs: list[Run], name: str) -> dict[str, Interval]:
    return {arm: intervals.of_mean([run["arms"][arm][name] - run["arms"][RECENT][name] for run in runs]) for arm in ARMS if arm != RECENT}


def _over_users(runs: list[Run]) -> dict[str, Interval]:
    """The mean of the seeds' intervals: what other users would give, by an upstream like these."""
    found = {}
    for arm in ARMS:
        if arm != RECENT:
            each = [run["arms"][arm]["over users"] for run in runs]
            found[arm] = Interval(*(float(np.mean([one[name] for one in each])) for name in ("mean", "half")))
    return found
