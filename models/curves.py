"""What daily training has found: each day's scores of the model that goes on learning, beside those of the one that has stopped."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from crossrep.errors import DataError
from crossrep.extras import extra
from models.daily import Day


def table(days: Sequence[Day]) -> Table:
    """The days that were tested, and their means; each day alike."""
    rows = Table("day", "impressions", "AUC daily", "frozen", "difference", "logloss daily", "frozen", box=None)
    for column in rows.columns[1:]:
        column.justify = "right"
    tested = [day for day in days if day.auc is not None and day.frozen_auc is not None]
    for day in tested:
        rows.add_row(str(day.date), f"{day.impressions:,}", *_figures([day]))
    if len(tested) > 1:
        rows.add_row("mean", "", *_figures(tested), style="bold")
    return rows


def _figures(days: Sequence[Day]) -> list[str]:
    columns = ("auc", "frozen_auc", "logloss", "frozen_logloss")
    auc, frozen, loss, frozen_loss = (sum(getattr(day, name) or 0.0 for day in days) / len(days) for name in columns)
    return [f"{auc:.4f}", f"{frozen:.4f}", f"{auc - frozen:+.4f}", f"{loss:.4f}", f"{frozen_loss:.4f}"]


def plot(days: Sequence[Day], path: str) -> None:
    """Both AUCs by day. The format is the path's ending.

    Raises:
        DataError: no day has been tested, or the file cannot be written.
        CrossrepError: matplotlib is not installed.
    """
    with extra("analytics"):
        import matplotlib
        from matplotlib.figure import Figure
    tested = [day for day in days if day.auc is not None and day.frozen_auc is not None]
    if not tested:
        raise DataError("no day has been tested yet: there is nothing to plot")
    dates = [str(day.date) for day in tested]
    with matplotlib.rc_context({"svg.hashsalt": "crossrep"}):  # drawn again, a figure is the same file
        figure = Figure(figsize=(8, 3.6), layout="constrained")
        panel = figure.subplots()
        panel.plot(dates, [day.auc or 0.0 for day in tested], "o-", color="#0072B2", label="learns every day")
        panel.plot(dates, [day.frozen_auc or 0.0 for day in tested], "o-", color="#D55E00", label=f"frozen before {dates[0]}")
        panel.set(ylabel="AUC on the day, before learning it", title="Test, then train")
        panel.tick_params(axis="x", rotation=0 if len(dates) < 9 else 90)
        panel.grid(axis="y", color="#E5E5E5")
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False)
        try:
            figure.savefig(path, dpi=120, metadata={"Date": None} if path.endswith(".svg") else None)
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be written: {error}") from None
