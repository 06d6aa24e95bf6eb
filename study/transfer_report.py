"""Tables (Markdown) and plots (SVG) from the runs of `study.transfer`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from operator import itemgetter
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from study import intervals
from study.arms import ARMS, GOALS, NONE, PAIRS
from study.intervals import Interval
from study.runs import Run
from study.tables import COLOURS, STYLE, difference, save, table
from study.worlds import SPLITS

MEASURES = {"auc": 4, "gauc": 4, "logloss": 4}
SHOWN = ("CR", "UR + IR + CR", "counters", "counters + UR + IR + CR")  # in the tables by scenario and of the cold, against NONE
ENOUGH = 1000  # impressions that a scenario needs for a row of its own
USERS = 100  # with both labels, that any row of GAUC needs

UNKNOWN = Interval(math.nan, math.nan)

Arms = dict[str, list[Run]]  # the runs of an arm, by seed
Splits = dict[str, Arms]


def write(runs: list[Run], scenarios: Sequence[str], folder: Path) -> list[Path]:
    """tables.md, differences.svg and cosines.svg in `folder`."""
    splits: Splits = {split: {} for split in SPLITS}
    for run in sorted(runs, key=lambda run: (list(ARMS).index(run["name"]), run["seed"])):
        splits[run["split"]].setdefault(run["name"], []).append(run)
    lines = [*_goals(splits), ""]
    done = [title for title, one, other in PAIRS if any(one in arms and other in arms for arms in splits.values())]
    lines += [line for title in dict.fromkeys(done) for line in [*_differences(splits, title), ""]]
    for split in SPLITS:
        parts = [_parts(splits, split, scenarios, measure) for measure in MEASURES]
        lines += [line for part in (_quality(splits, split), *parts) for line in [*part, ""]]
    lines += [*_cosines(splits), "", *_tuning(splits), ""]
    tables = folder / "tables.md"
    tables.write_text("\n".join(lines))
    with matplotlib.rc_context(STYLE):
        return [tables, save(_plot_differences(splits), folder / "differences.svg"), save(_plot_cosines(splits), folder / "cosines.svg")]


def paired(arms: Arms, one: str, other: str, measure: Callable[[Run], float | None]) -> Interval | None:
    """One less other, by seed; None: not both were run."""
    if one not in arms or other not in arms:
        return None
    a, b = ({run["seed"]: measure(run) for run in arms[name]} for name in (one, other))
    found = [(a[seed], b[seed]) for seed in sorted(a.keys() & b.keys())]
    return intervals.of_mean([x - y for x, y in found if x is not None and y is not None])


def _goals(splits: Splits) -> list[str]:
    rows = []
    for one, other, least in GOALS:
        found = [paired(arms, one, other, itemgetter("auc")) for arms in splits.values()]
        met = [each is not None and each.mean >= least and each.mean > each.half for each in found]
        cells = [difference(each) if each is not None else "not run" for each in found]
        rows.append([f"{one} over {other} ≥ {least:+.4f}, interval above 0", *cells, "reached" if all(met) else "not reached"])
    return table("Goals: AUC gained, paired by seed", ["goal", *splits, ""], rows)


def _differences(splits: Splits, title: str) -> list[str]:
    rows = []
    for _, one, other in (pair for pair in PAIRS if pair[0] == title):
        for split, arms in splits.items():
            found = [(paired(arms, one, other, itemgetter(name)), digits) for name, digits in MEASURES.items()]
            cells = [difference(each, digits) for each, digits in found if each is not None]
            if cells:
                rows.append([f"{one} over {other}", split, *cells])
    return table(f"Paired differences, {title}; 95 % intervals, bold where zero is outside", ["difference", "split", *MEASURES], rows)


def _quality(splits: Splits, split: str) -> list[str]:
    rows = []
    for name, runs in splits[split].items():
        cells = [intervals.of_mean([run[measure] for run in runs]).text(digits) for measure, digits in MEASURES.items()]
        rows.append([name, *cells, f"{runs[0]['parameters']:,}", f"{np.mean([run['seconds'] for run in runs]):.1f}"])
    first = splits[split][NONE]
    title = f"Split {split!r}: trained on {first[0]['learnt']:,} impressions, tested on {first[0]['impressions']:,}, {len(first)} seeds; "
    title += f"GAUC is of {first[0]['gauc_users']:,} users with clicks and without"
    return table(title, ["arm", *MEASURES, "parameters", "seconds a run"], rows)


def _parts(splits: Splits, split: str, scenarios: Sequence[str], measure: str) -> list[str]:
    """A measure of scenarios and of cold and warm keys: that of NONE, and what others add."""
    arms = splits[split]
    shown = [*((name, NONE) for name in SHOWN), (SHOWN[-1], "counters"), ("whole record", "counters + UR + IR")]
    rows = []
    for part, first in arms[NONE][0]["parts"].items():
        kind, _, code = part.partition(" ")
        if (kind == "scenario" and first["impressions"] < ENOUGH) or (measure == "gauc" and first["gauc_users"] < USERS):
            continue

        def of_part(run: Run, part: str = part) -> float | None:
            value: float | None = run["parts"][part][measure]
            return value

        base = intervals.of_mean([value for run in arms[NONE] if (value := of_part(run)) is not None])
        gains = [paired(arms, *pair, of_part) or UNKNOWN for pair in shown]
        label = f"tab {scenarios[int(code)]}" if kind == "scenario" else part
        rows.append([label, f"{first['impressions']:,}", base.text(4), *map(difference, gains)])
    header = ["impressions of", "n", f"{measure} of {NONE}", *(f"{one} over {other}" for one, other in shown)]
    return table(f"Split {split!r}: {measure} by tab, and of cold and warm users and items", header, rows)


def _cosines(splits: Splits) -> list[str]:
    rows = []
    for split, arms in splits.items():
        for name, runs in arms.items():
            for place in range(len(runs[0]["cosines"])):
                course = np.mean([run["cosines"][place] for run in runs], axis=0)
                rows.append([name, split, str(place), " ".join(f"{value:.3f}" for value in course)])
    return table("Gated cross-attention: mean |cos(X, X')| at ten steps of training", ["arm", "split", "layer", "|cos|"], rows)


def _tuning(splits: Splits) -> list[str]:
    rows: dict[tuple[str, str], list[str]] = {}
    for split, arms in splits.items():
        for name, runs in arms.items():
            rows.setdefault((ARMS[name].kind, split), [ARMS[name].kind, split, f"{runs[0]['rate']:g}"])
    return table("Learning rate chosen for each kind of arm", ["kind", "split", "rate"], [rows[key] for key in sorted(rows)])


def _plot_differences(splits: Splits) -> Figure:
    """A row a pair, AUC on the left and GAUC on the right; filled: the authors' split, hollow: the late one."""
    pairs = [(one, other) for _, one, other in PAIRS if any(one in arms and other in arms for arms in splits.values())]
    figure = Figure((10, 0.21 * len(pairs) + 1), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, measure in zip(panels, ("auc", "gauc")):
        for at, (one, other) in enumerate(pairs):
            for offset, (split, fill) in zip((0.12, -0.12), zip(splits, ("full", "none"))):
                found = paired(splits[split], one, other, itemgetter(measure))
                if found is not None:
                    colour = COLOURS[1] if found.clear else COLOURS[5]
                    style = {"fmt": "o", "markersize": 4, "fillstyle": fill, "color": colour, "capsize": 2, "linewidth": 1}
                    panel.errorbar(found.mean, -at + offset, xerr=found.half, **style)
        panel.axvline(0, color=COLOURS[0], linewidth=0.8)
        panel.set_yticks([-at for at in range(len(pairs))], [f"{one} over {other}" for one, other in pairs], fontsize=7)
        panel.set_ylim(0.4 - len(pairs), 0.6)
        panel.set_title(measure.upper(), fontsize=9, loc="left")
        panel.grid(axis="x", color="#E5E5E5")
        panel.tick_params(axis="x", labelsize=7)
    figure.supxlabel("paired difference, 95 % interval, blue where zero is outside; filled: authors' split, hollow: late split", fontsize=8)
    return figure


def _plot_cosines(splits: Splits) -> Figure:
    """|cos| over training, a line a layer of each arm, mean over seeds; the authors' split."""
    figure = Figure((6, 3), layout="constrained")
    panel = figure.subplots()
    crossed = {name: runs for name, runs in splits["authors"].items() if runs[0]["cosines"]}
    for colour, (name, runs) in zip(COLOURS[1:], crossed.items()):
        for place in range(len(runs[0]["cosines"])):
            course = np.mean([run["cosines"][place] for run in runs], axis=0)
            label = name if place == 0 else None
            panel.plot(np.linspace(0, 1, len(course)), course, color=colour, linestyle=("-", "--", ":")[place % 3], label=label)
    panel.set(xlabel="part of the epoch; lines: layers (solid, dashed, dotted)", ylabel="mean |cos(X, X')|", ylim=(0, None))
    if crossed:
        panel.legend(fontsize=8, frameon=False)
    return figure
