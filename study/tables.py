"""What the reports of all studies share: Markdown tables, and how plots look."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from study.intervals import Interval

COLOURS = ("#222222", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#A6A6A6")  # Okabe and Ito
STYLE: dict[Any, Any] = {"axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "crossrep"}


def table(title: str, header: list[str], rows: list[list[str]]) -> list[str]:
    """Its lines."""
    lines = [header, ["---"] * len(header), *rows]
    return [f"**{title}**", "", *("| " + " | ".join(cell.replace("|", "&#124;") for cell in cells) + " |" for cells in lines)]


def difference(found: Interval, digits: int = 4) -> str:
    """With its sign, bold where zero is outside."""
    return f"**{found.text(digits, sign=True)}**" if found.clear else found.text(digits, sign=True)


def plot_differences(figure: Figure, panels: dict[str, dict[str, Interval]], below: str) -> Figure:
    """A panel a title, a row a name: the difference and its interval."""
    for title, axes in zip(panels, figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]):
        rows = panels[title]
        for at, found in enumerate(rows.values()):
            axes.errorbar(found.mean, -at, xerr=found.half, fmt="o", color=COLOURS[1] if found.clear else COLOURS[5], capsize=3)
        axes.axvline(0, color=COLOURS[0], linewidth=0.8)
        axes.set_yticks([-at for at in range(len(rows))], list(rows), fontsize=8)
        axes.set_title(title, fontsize=9, loc="left")
        axes.tick_params(axis="x", labelsize=7)
    figure.supxlabel(below, fontsize=9)
    return figure


def save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, metadata={"Date": None})
    return path
