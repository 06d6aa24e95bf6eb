"""Tables (Markdown) and a plot (SVG) from the runs of `study.upstreams`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from study import intervals
from study.runs import Run
from study.tables import STYLE, difference, plot_differences, save, table
from study.upstreams import RATED, TOWER, best

MEASURES = ("auc", "gauc", "logloss")
TOWERS = (TOWER, RATED)  # each is set against all others

Models = dict[str, list[Run]]  # the runs of a model by seed
Measure = Callable[[Run], float]


def write(tuned: list[Run], runs: list[Run], folder: Path) -> list[Path]:
    """upstreams.md and upstreams.svg in `folder`."""
    models: Models = {}
    for run in sorted(runs, key=lambda run: int(run["seed"])):
        models.setdefault(run["model"], []).append(run)
    tables = folder / "upstreams.md"
    parts = [_tuning(tuned, models), _quality(models), _differences(models), _parts(models)]
    parts += [_part_differences(models, tower) for tower in TOWERS]
    tables.write_text("\n".join(line for part in parts for line in [*part, ""]))
    with matplotlib.rc_context(STYLE):
        return [tables, save(_plot(models), folder / "upstreams.svg")]


def _tuning(tuned: list[Run], models: Models) -> list[str]:
    rows = []
    for model, runs in models.items():
        trials, chosen = [run for run in tuned if run["model"] == model], best(tuned, model)
        scores: dict[str, list[float]] = {}
        for run in trials:
            (value,) = run["setting"].values()
            scores.setdefault(f"{value:g}", []).append(run["validation"]["auc"])
        ((name, value),) = chosen["setting"].items()
        means = "; ".join(f"{value}: {np.mean(found):.4f}" for value, found in scores.items())
        seconds = [f"{np.mean([run['seconds'] for run in each]):.0f}" for each in (trials, runs)]
        rows.append([model, name, means, f"{value:g}", str(chosen["length"]), *seconds])
    header = ["model", "what is tuned", "mean validation AUC", "chosen", "epochs or trees", "seconds a trial", "seconds a run"]
    return table(f"Tuning, on {len({run['seed'] for run in tuned})} seeds", header, rows)


def _quality(models: Models) -> list[str]:
    rows = [
        [model, *(intervals.of_mean([run["test"][name] for run in runs]).text(4) for name in MEASURES)] for model, runs in models.items()
    ]
    first = next(iter(models.values()))
    size = first[0]["test"]["impressions"]
    return table(f"Test of {size:,} impressions, means over {len(first)} seeds with 95 % intervals", ["model", *MEASURES], rows)


def _differences(models: Models) -> list[str]:
    rows = [
        [f"{tower} − {model}", *(difference(_less(models, tower, model, _of_test(name))) for name in MEASURES)]
        for tower, model in _pairs(models)
    ]
    return table("Paired differences, 95 % intervals; bold where zero is outside; of logloss, less is better", ["", *MEASURES], rows)


def _parts(models: Models) -> list[str]:
    rows = []
    parts = next(iter(models.values()))[0]["parts"]
    for name, part in parts.items():
        found = [intervals.of_mean([run["parts"][name]["auc"] for run in runs]).text(4) for runs in models.values()]
        rows.append([name, f"{part['impressions']:,}", *found])
    return table("AUC of parts of the test; cold: no impression in training", ["part", "impressions", *models], rows)


def _part_differences(models: Models, tower: str) -> list[str]:
    others = [model for model in models if model not in TOWERS]
    parts = next(iter(models.values()))[0]["parts"]
    rows = [[name, *(difference(_less(models, tower, model, _auc_of(name))) for model in others)] for name in parts]
    return table(f"AUC of the {tower} less that of the others, of parts of the test", ["part", *others], rows)


def _of_test(measure: str) -> Measure:
    return lambda run: float(run["test"][measure])


def _auc_of(part: str) -> Measure:
    return lambda run: float(run["parts"][part]["auc"])


def _pairs(models: Models) -> list[tuple[str, str]]:
    return [(RATED, TOWER), *((tower, model) for tower in TOWERS for model in models if model not in TOWERS)]


def _less(models: Models, tower: str, other: str, measure: Measure) -> intervals.Interval:
    """The tower's less the other's, over the seeds both have."""
    a, b = ({run["seed"]: measure(run) for run in models[model]} for model in (tower, other))
    return intervals.of_mean([a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())])


def _plot(models: Models) -> Figure:
    panels = {
        name: {f"{tower} − {model}".replace("triple ", ""): _less(models, tower, model, _of_test(name)) for tower, model in _pairs(models)}
        for name in MEASURES
    }
    below = "test, 95 % interval; blue where zero is outside; of logloss, less is better"
    return plot_differences(Figure((13, 3.2), layout="constrained"), panels, below)
