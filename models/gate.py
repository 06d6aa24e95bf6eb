"""The gate: a model becomes the next version only if it is no worse than the newest one, on the newest day.

The candidate is the model of the day before, which has not seen that day, and it is what is registered: exactly what was measured. What was
learnt of the newest day itself enters the next candidate. Both are asked about the same impressions, and the registered one must not have
seen them either.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.table import Table

from crossrep.errors import ModelError
from models import daily, upstream
from models.datasets.base import Dataset, by_day, only
from models.lfm4ads import LFM4Ads
from models.registry import Entry, Registry, digest, resolve
from models.train import evaluate
from models.upstream import read_manifest

TOLERANCE = 0.001  # of AUC


@dataclass(frozen=True)
class Asked:
    """A model and its answers to the newest day's impressions."""

    label: str
    trained_until: str
    scores: Mapping[str, Any]  # auc, logloss, impressions


@dataclass(frozen=True)
class Verdict:
    """What the gate found. `entry` is what it registered, if it did."""

    asked: list[Asked]  # the candidate, and the registered version if there is one
    reason: str
    entry: Entry | None = None


def gate(dataset: Dataset, folder: Path, registry: Registry, name: str, tolerance: float = TOLERANCE, space: str | None = None) -> Verdict:
    """Measure the candidate of a folder of daily training, and register it if it passes.

    Raises:
        ModelError: no day has been tested yet, or the newest one is not in the data set; or the registered version cannot be compared.
    """
    kept = daily.states(folder)
    if len(kept) < 2:
        raise ModelError(f"{folder} has learnt its first days only: a candidate is measured on a day behind them. Train on more days")
    newest = daily.read_state(kept[-1]).days[-1].date
    found = next((impressions for day, impressions in by_day(dataset) if day == newest), None)
    if found is None:
        raise ModelError(f"{dataset.name} has no impressions of {newest}, the newest day that {folder} has learnt: nothing to measure on")
    day, manifest, registered = only(dataset, found), read_manifest(kept[-2]), registry.newest(name)
    candidate = _ask("candidate", kept[-2], day)
    about = {"metrics": dict(candidate.scores), "tested_on": str(newest)}
    if registered is None:
        entry = registry.add(kept[-2], name, space=space, about=about)
        return Verdict([candidate], f"registered as {entry.reference}, the first version", entry)
    if digest(registered.manifest, registered.reference) == digest(manifest, str(kept[-2])):
        return Verdict([candidate], f"it is {registered.reference} already")
    _refuse_seen(registered, float(found.event_time.min()), str(newest))
    copy, _ = resolve(registered.reference, registry.url)
    former = _ask(registered.reference, copy, day)
    asked, (new, old) = [candidate, former], (candidate.scores["auc"], former.scores["auc"])
    if new is None or old is None:
        return Verdict(asked, f"not registered: {newest} has no AUC, all its impressions have one label")
    if new < old - tolerance:
        return Verdict(asked, f"not registered: its AUC is {old - new:.4f} lower, more than the tolerance of {tolerance:g}")
    entry = registry.add(kept[-2], name, space=space, parent=registered.registered.version, about=about)
    by = f"{new - old:.4f} higher" if new >= old else f"{old - new:.4f} lower, within the tolerance of {tolerance:g}"
    return Verdict(asked, f"registered as {entry.reference}: its AUC is {by}", entry)


def table(verdict: Verdict) -> Table:
    """As people read it."""
    rows = Table("model", "trained until", "AUC", "logloss", "impressions", box=None)
    for asked in verdict.asked:
        scores = [_figure(asked.scores[name]) for name in ("auc", "logloss")]
        rows.add_row(asked.label, asked.trained_until, *scores, f"{asked.scores['impressions']:,}")
    return rows


def _ask(label: str, folder: Path, day: Dataset) -> Asked:
    model = upstream.load(folder)
    if not isinstance(model, LFM4Ads):
        raise ModelError(f"{label} is of a kind that gives no probability of a click: it cannot be compared")
    return Asked(label, str(read_manifest(folder).get("trained_until")), evaluate(model.predict, model.fields, day))


def _refuse_seen(registered: Entry, begins: float, day: str) -> None:
    """Raises ModelError unless the version says that all it has learnt was before the day."""
    try:
        until = datetime.fromisoformat(registered.manifest["trained_until"]).astimezone(UTC).timestamp()
    except (KeyError, TypeError, ValueError):
        raise ModelError(f"{registered.reference} does not say until when it was trained: it cannot be compared on {day}") from None
    if until >= begins:
        said = registered.manifest["trained_until"]
        raise ModelError(f"{registered.reference} was trained until {said}, with impressions of {day} itself: compare on a later day")


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
