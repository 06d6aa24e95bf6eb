"""Tables (Markdown) and plots (SVG) from the runs of `study.gca`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from study import intervals
from study.runs import Run
from study.tables import COLOURS, STYLE, difference, save, table
from study.training import MEASURE, VALIDATED, quality

MEASURES = {"ndcg@1": 4, "ndcg@10": 4, "auc": 4, "sampled ndcg@1": 4, "sampled ndcg@10": 4}
PAIRS = (
    ("early", "none"),
    ("early", "none, as large as stack"),
    ("stack", "none"),
    ("stack", "none, as large as stack"),
    ("stack", "early"),
    ("none, as large as stack", "none"),
)

Arms = dict[str, list[Run]]  # the runs of an arm by seed


def write(runs: list[Run], folder: Path) -> list[Path]:
    """tables.md, differences.svg and cosines.svg in `folder`."""
    arms: Arms = {}
    for run in sorted(runs, key=lambda run: int(run["seed"])):
        arms.setdefault(run["arm"], []).append(run)
    tables = folder / "tables.md"
    tables.write_text("\n".join(line for part in (_arms, _quality, _differences, _cosines, _correlations) for line in [*part(arms), ""]))
    with matplotlib.rc_context(STYLE):
        return [tables, save(_plot_differences(arms), folder / "differences.svg"), save(_plot_cosines(arms), folder / "cosines.svg")]


def _arms(arms: Arms) -> list[str]:
    rows = []
    for arm, runs in arms.items():
        first = runs[0]
        beside = first["parameters"] - first["table"]
        cells = [f"{first['parameters']:,}", f"{beside:,}", str(first["architecture"]["feed_forward"]), f"{first['schedule']['rate']:g}"]
        epochs = " ".join(str(run["best_epoch"]) for run in runs)
        rows.append([arm, *cells, epochs, f"{np.mean([run['seconds'] for run in runs]):.0f}"])
    header = ["arm", "parameters", "beside the item table", "feed-forward width", "rate chosen", "best epochs", "seconds a run"]
    return table("Arms", header, rows)


def _quality(arms: Arms) -> list[str]:
    rows = []
    for arm, runs in arms.items():
        for domain in (0, 1):
            found = [
                intervals.of_mean([run["test"]["domains"][domain][name] for run in runs]).text(digits) for name, digits in MEASURES.items()
            ]
            rows.append([arm, "AB"[domain], *found])
    seeds = len(next(iter(arms.values())))
    return table(f"Test metrics, means over {seeds} seeds with 95 % intervals", ["arm", "domain", *MEASURES], rows)


def _differences(arms: Arms) -> list[str]:
    rows = []
    for one, other in PAIRS:
        for domain in (0, 1):
            cells = []
            for name, digits in MEASURES.items():
                cells.append(difference(_difference(arms, one, other, domain, name), digits))
            rows.append([f"{one} − {other}", "AB"[domain], *cells])
    return table("Paired differences, 95 % intervals; bold where zero is outside", ["difference", "domain", *MEASURES], rows)


def _difference(arms: Arms, one: str, other: str, domain: int, measure: str) -> intervals.Interval:
    sides = ({run["seed"]: run["test"]["domains"][domain][measure] for run in arms[arm]} for arm in (one, other))
    a, b = sides
    return intervals.of_mean([a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())])


def chance(dim: int) -> float:
    """The mean |cos| of two random directions in that many dimensions."""
    return math.exp(math.lgamma(dim / 2) - math.lgamma((dim + 1) / 2)) / math.sqrt(math.pi)


def _cosines(arms: Arms) -> list[str]:
    rows = []
    for arm, runs in arms.items():
        for place, each in enumerate(runs[0]["test"]["cosines"]):
            trained = intervals.of_mean([run["test"]["cosines"][place]["absolute"] for run in runs]).text(3)
            signed = intervals.of_mean([run["test"]["cosines"][place]["signed"] for run in runs]).text(3, sign=True)
            course = [np.mean([run["epochs"][epoch]["cosines"][place]["absolute"] for run in runs]) for epoch in range(_epochs(runs))]
            rows.append([arm, str(each["level"]), "AB"[each["domain"]], " ".join(f"{value:.3f}" for value in course), trained, signed])
    dim = next(iter(arms.values()))[0]["architecture"]["dim"]
    header = ["arm", "level", "domain", "mean |cos| untrained and after each epoch", "|cos|, test", "cos, test"]
    return table(f"cos(X, X'); two random directions in {dim} dims have |cos| = {chance(dim):.3f} on average", header, rows)


def _correlations(arms: Arms) -> list[str]:
    rows = []
    crossed = {arm: runs for arm, runs in arms.items() if runs[0]["test"]["cosines"]}
    for arm, runs in crossed.items():
        within = [_course(run) for run in runs]
        found = [float(np.corrcoef(x, y)[0, 1]) for x, y in within if len(x) >= 3 and np.ptp(x) and np.ptp(y)]
        rows.append([f"{arm}: over the epochs of a run", str(len(found)), intervals.of_mean(found).text(2, sign=True)])
    x, y = [], []
    for runs in crossed.values():
        cosines, reached = [_mean_cosine(run["test"]) for run in runs], [quality(run["test"]) for run in runs]
        x += list(np.array(cosines) - np.mean(cosines))
        y += list(np.array(reached) - np.mean(reached))
    r, low, high = intervals.of_correlation(x, y, lost=len(crossed) - 1)
    rows.append(["over trained runs, each less its arm's mean", str(len(x)), f"{r:+.2f} ({low:+.2f} to {high:+.2f})"])
    return table(f"Correlation of mean |cos(X, X')| with {MEASURE}, mean of the domains", ["", "n", "Pearson's r, 95 % interval"], rows)


def _course(run: Run) -> tuple[list[float], list[float]]:
    """Mean |cos| and quality after each epoch but the untrained one."""
    return [_mean_cosine(epoch) for epoch in run["epochs"][1:]], [quality(epoch) for epoch in run["epochs"][1:]]


def _mean_cosine(found: dict[str, Any]) -> float:
    return float(np.mean([each["absolute"] for each in found["cosines"]]))


def _epochs(runs: list[Run]) -> int:
    return min(len(run["epochs"]) for run in runs)


def _plot_differences(arms: Arms) -> Figure:
    """A panel a measure and domain, a line a pair."""
    shown = ("ndcg@10", MEASURE, "auc")
    figure = Figure((9, 5.5), layout="constrained")
    for row, panels in enumerate(figure.subplots(2, len(shown), sharey=True, squeeze=False)):
        for name, panel in zip(shown, panels):
            for at, (one, other) in enumerate(PAIRS):
                found = _difference(arms, one, other, row, name)
                panel.errorbar(found.mean, -at, xerr=found.half, fmt="o", color=COLOURS[1] if found.clear else COLOURS[5], capsize=3)
            panel.axvline(0, color=COLOURS[0], linewidth=0.8)
            panel.set_yticks([-at for at in range(len(PAIRS))], [f"{one} − {other}" for one, other in PAIRS], fontsize=8)
            panel.set_title(f"{name}, domain {'AB'[row]}", fontsize=9, loc="left")
            panel.locator_params(axis="x", nbins=4)
            panel.tick_params(axis="x", labelsize=7)
    figure.supxlabel("paired difference on test, 95 % interval; blue where zero is outside", fontsize=9)
    return figure


def _plot_cosines(arms: Arms) -> Figure:
    """|cos| by epoch on the left, and against quality, a dot a run and epoch, on the right."""
    figure = Figure((9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    crossed = {arm: runs for arm, runs in arms.items() if runs[0]["test"]["cosines"]}
    for colour, (arm, runs) in zip(COLOURS[1:], crossed.items()):
        for place, each in enumerate(runs[0]["test"]["cosines"]):
            courses = np.array([[epoch["cosines"][place]["absolute"] for epoch in run["epochs"][: _epochs(runs)]] for run in runs])
            label = arm if place == 0 else None
            left.plot(courses.mean(0), color=colour, linestyle=("-", "--", ":", "-.")[each["level"] % 4], label=label, alpha=0.9)
        for run in runs:
            right.plot(*_course(run), ".-", color=colour, alpha=0.5, linewidth=0.6)
    dim = next(iter(arms.values()))[0]["architecture"]["dim"]
    left.axhline(chance(dim), color=COLOURS[5], linewidth=1, label="random directions")
    left.set_xlabel("epoch; lines: levels (0 solid, 1 dashed, 2 dotted) of both domains", fontsize=8)
    left.set_ylabel("mean |cos(X, X')|, validation")
    left.set_ylim(0)
    left.locator_params(axis="x", integer=True)
    left.legend(fontsize=8, frameon=False)
    right.set_xlabel("mean |cos(X, X')|, all levels")
    right.set_ylabel(f"{MEASURE}, validation")
    right.set_title(f"each line a run, each dot an epoch (every {VALIDATED}th user)", fontsize=8, loc="left")
    return figure
