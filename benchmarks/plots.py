"""Draws docs/performance/*.svg from the figures beside them, without measuring: python -m benchmarks.plots."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import NullLocator

from benchmarks.common import ROOT

FOLDER = ROOT / "docs" / "performance"
WIDTH = 800 / 96  # inches: 800 pixels
# Okabe and Ito: told apart by the colour-blind, and by their lightness in print.
BLUE, VERMILLION, GREY, INK = "#0072B2", "#D55E00", "#A6A6A6", "#222222"
STYLE: dict[Any, Any] = {
    "font.size": 10.5,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "svg.hashsalt": "crossrep",  # drawn again, a figure is the same file
}
# Axis -> what it is in words, its logarithm's base (0: values side by side), and the figure that tells where a point lies: what was asked
# for, or what came of it.
GROWTH = {
    "keys": ("keys that occur, all alike", 10, "keys"),
    "dims": ("dims", 2, "value"),
    "rows_per_frame": ("rows a frame, on average", 2, "rows_per_frame"),
    "skew": ("Zipf exponent; 0: all users alike", 0, "value"),
    "partitions": ("partitions on one worker", 2, "value"),
}
CONTENDERS = {
    "crossrep": "crossrep, frames",
    "kafka-streams-once": "Kafka Streams, records,\ndefaults",
    "kafka-streams-once-best": "Kafka Streams, records,\n256 MB cache, 10 s commit",
    "kafka-streams-frames-best": "Kafka Streams, our frames,\n256 MB cache, 10 s commit",
    "kafka-streams-heap-200ms": "Kafka Streams, our frames,\nhand-made heap cache, 200 ms commit",
    "kafka-streams-heap-1s": "Kafka Streams, our frames,\nhand-made heap cache, 1 s commit",
}
LIMIT = "bare consumer"  # what such names begin with: no contenders, and too fast to be drawn beside them


def growth(source: Path = FOLDER / "growth.json") -> Path:
    """A row of panels for each axis: CPU a row, and rows a second. Lines join medians; faint dots are single runs."""
    measured = json.loads(source.read_text())
    with matplotlib.rc_context(STYLE):
        figure = Figure((WIDTH, 0.4 + 1.9 * len(measured)), layout=ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.08))
        grid = figure.subplots(len(measured), 2, squeeze=False)
        for (axis, found), (left, right) in zip(measured.items(), grid):
            _panel(left, axis, found["points"], "cpu_us_per_row", 1, VERMILLION)
            _panel(right, axis, found["points"], "rows_per_s", 1000, BLUE)
        grid[0, 0].set_title("µs CPU a row", color=VERMILLION, loc="left")
        grid[0, 1].set_title("thousand rows/s", color=BLUE, loc="left")
        return _save(figure, source.with_suffix(".svg"))


def _panel(panel: Axes, axis: str, points: list[dict[str, Any]], figure: str, unit: float, colour: str) -> None:
    label, base, place = GROWTH[axis]
    asked = [point["value"] for point in points]
    places = [point[place] for point in points] if base else list(range(len(points)))
    most = max(max(point["every_run"][figure]) for point in points) / unit
    for at, point in zip(places, points):
        runs = [run / unit for run in point["every_run"][figure]]
        panel.plot([at] * len(runs), runs, "o", color=colour, alpha=0.3, markersize=5, clip_on=False)
    panel.plot(places, [point[figure] / unit for point in points], "o-", color=colour, clip_on=False)
    if base:
        panel.set_xscale("log", base=base)
    if base != 10:  # else matplotlib's own, powers of ten
        panel.set_xticks(asked if base else places, [f"{value:g}" for value in asked])
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_ylim(0, 1.15 * most)
    panel.set_xlabel(label)
    panel.grid(axis="y", color="#E5E5E5")


def peers(source: Path = FOLDER / "quick.json") -> Path:
    """Bars of rows a second, a panel for each number of rows."""
    measured = {rows: found["engines"] for rows, found in json.loads(source.read_text()).items() if isinstance(found, dict)}
    heights = [len([name for name in engines if not name.startswith(LIMIT)]) for engines in measured.values()]
    with matplotlib.rc_context(STYLE):
        figure = Figure((WIDTH, 1.0 * len(measured) + 0.47 * sum(heights)), layout=ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.08))
        panels = figure.subplots(len(measured), 1, squeeze=False, height_ratios=heights)[:, 0]
        for panel, (rows, engines) in zip(panels, measured.items()):
            _bars(panel, int(rows), engines)
        right = 1.7 * max(panel.get_xlim()[1] for panel in panels)  # room for the notes
        for panel in panels:
            panel.set_xlim(0, right)
        return _save(figure, source.with_name("peers.svg"))


def _bars(panel: Axes, rows: int, engines: dict[str, dict[str, float]]) -> None:
    named = {CONTENDERS.get(name, name): found for name, found in engines.items() if not name.startswith(LIMIT)}
    order = sorted(named, key=lambda name: named[name]["rows_per_s"])
    speeds = [named[name]["rows_per_s"] / 1000 for name in order]
    ours = [name == CONTENDERS["crossrep"] for name in order]
    bars = panel.barh(order, speeds, color=[BLUE if mine else GREY for mine in ours], height=0.7)
    notes = [f"{speed:,.0f}  ({named[name]['cpu_seconds_per_million']:.2f} µs CPU a row)" for name, speed in zip(order, speeds)]
    for mine, tick, note in zip(ours, panel.get_yticklabels(), panel.bar_label(bars, notes, padding=5)):
        for text in (tick, note):
            text.set(fontweight="bold" if mine else "normal", color=BLUE if mine else INK)
    panel.set_title(f"{rows:,} rows", loc="left")
    panel.set_xlabel("thousand rows/s")
    panel.tick_params(left=False, labelsize=10)
    panel.xaxis.set_major_formatter("{x:,.0f}")


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, facecolor="white", metadata={"Date": None})
    return path


@click.command()
@click.option(
    "--folder", default=FOLDER, type=click.Path(file_okay=False, path_type=Path), help="Of figures and plots.  [default: docs/performance]"
)
def main(folder: Path) -> None:
    """Draw growth.svg from growth.json (benchmarks.growth) and peers.svg from quick.json (benchmarks.quick), whichever there is."""
    sources = {folder / "growth.json": growth, folder / "quick.json": peers}
    if not any(source.exists() for source in sources):
        raise click.ClickException(f"neither growth.json nor quick.json is in {folder}; python -m benchmarks.growth measures")
    for source, draw in sources.items():
        if source.exists():
            click.echo(f"{source} -> {draw(source)}")


if __name__ == "__main__":
    main()
