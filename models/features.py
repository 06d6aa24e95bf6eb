"""Features as integers: every field has a vocabulary or bins, and all fields share one id space.

A field owns a run of rows in one fused embedding table. Its first row stands for everything unknown: missing, None, NaN, a value of
another type, a value never seen in training, or seen there only once (one impression says little about a value, and it is these that
train the unknown row). The field's offset in the table is added here, so that a model makes one gather for all fields of a batch.

- text is a category;
- numbers are binned by the quantiles of the training data, or each value has its own bin if there are few of them (give codes as text);
- the event time becomes the hour of the day, UTC;
- a statistic is a number that training has counted of each id (`models/rates.py`), binned as numbers are.

No torch here: encoding runs where features are consumed.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from crossrep.errors import ModelError
from models.datasets.base import Dataset, Impressions

BRANCHES = ("content", "ad")
ID_FIELDS = {"user": "user_id", "item": "item_id"}
EVENT_FIELDS = ("scenario", "branch", "event_time")
BINS = 32
OFTEN = 2  # impressions that give a value a row of its own


@dataclass(frozen=True)
class Field:
    """How one feature becomes a row number; rows count from the field's own first row, which is the unknown one."""

    name: str
    type: Literal["category", "number", "hour", "statistic"]
    values: tuple[str, ...] = ()  # category: the known values, in row order from row 1; statistic: the known ids
    edges: tuple[float, ...] = ()  # number, statistic: inner bin edges, ascending; bin i is row 1 + i
    numbers: tuple[float, ...] = ()  # statistic: of each id
    row_of: dict[str | None, int] = field(init=False, repr=False, compare=False)

    @property
    def size(self) -> int:
        return 25 if self.type == "hour" else 1 + (len(self.values) if self.type == "category" else len(self.edges) + 1)

    def __post_init__(self) -> None:
        rows = self.bins(np.array(self.numbers)).tolist() if self.type == "statistic" else range(1, 1 + len(self.values))
        object.__setattr__(self, "row_of", dict(zip(self.values, rows, strict=True)))

    def encode(self, values: Iterable[object]) -> list[int]:
        """The row of each value; never raises on a value. Plain Python: as fast for one row as an array would be for thousands."""
        if self.type in ("category", "statistic"):
            get = self.row_of.get
            return [get(value if value.__class__ is str else category(value), 0) for value in values]
        numbers = map(number, values)
        if self.type == "hour":
            rows: list[int] = hours(np.fromiter(numbers, np.float64)).tolist()
            return rows
        edges = self.edges
        return [1 + bisect_right(edges, x) if math.isfinite(x) else 0 for x in numbers]

    def bins(self, numbers: NDArray[np.float64]) -> NDArray[np.int64]:
        """The row of each number, for many: 0 for NaN."""
        return np.where(np.isnan(numbers), 0, 1 + np.searchsorted(self.edges, numbers, side="right"))


def category(value: object) -> str | None:
    """The text of a categorical value: 1, 1.0 and True are all "1", whichever way a producer wrote them. None: unknown."""
    if isinstance(value, str):
        return str(value)
    if not isinstance(value, int | float | np.number | np.bool_):
        return None
    try:
        x = float(value)
        return str(int(value)) if x == int(x) else repr(x)
    except (TypeError, ValueError, OverflowError):  # complex, NaN, infinite or absurdly long
        return None


def number(value: object) -> float:
    """A float, NaN for whatever is not a number."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return math.nan


class Features:
    """The fields of users, items and events, and their places in the fused table of `rows` rows."""

    def __init__(self, fields: Mapping[str, Sequence[Field]]):
        self.fields = {kind: tuple(fields[kind]) for kind in ("user", "item", "event")}
        sizes = [f.size for of_kind in self.fields.values() for f in of_kind]
        starts = iter(np.cumsum([0, *sizes]).tolist())
        self.offsets = {kind: np.array([next(starts) for _ in of_kind], dtype=np.int32) for kind, of_kind in self.fields.items()}
        self.rows = sum(sizes)

    @property
    def names(self) -> dict[str, tuple[str, ...]]:
        return {kind: tuple(f.name for f in fields) for kind, fields in self.fields.items()}

    def encode(self, kind: str, ids: Sequence[str], rows: Sequence[Mapping[str, object]]) -> NDArray[np.int32]:
        """int32 [n, fields of `kind`] from one mapping per user or item."""
        if len(ids) != len(rows):
            raise ValueError(f"{len(ids)} ids but {len(rows)} rows")
        return self._encode(kind, ids, {f.name: [row.get(f.name) for row in rows] for f in self.fields[kind][1:]})

    def encode_columns(self, kind: str, ids: Sequence[str], columns: Mapping[str, NDArray[np.object_]]) -> NDArray[np.int32]:
        """int32 [n, fields of `kind`] from one column per feature; a missing column is all unknown."""
        return self._encode(kind, ids, {name: column.tolist() for name, column in columns.items()})

    def _encode(self, kind: str, ids: Sequence[str], columns: Mapping[str, Sequence[object]]) -> NDArray[np.int32]:
        out = np.zeros((len(ids), len(self.fields[kind])), dtype=np.int32)
        for j, f in enumerate(self.fields[kind]):
            values = ids if f.name == ID_FIELDS[kind] or f.type == "statistic" else columns.get(f.name)
            if values is not None:
                out[:, j] = f.encode(values)
        return out + self.offsets[kind]

    def encode_events(self, scenario: Sequence[str], branch: Sequence[str], event_time: NDArray[np.float64]) -> NDArray[np.int32]:
        """int32 [n, 3]: scenario, branch, hour of the day (UTC)."""
        out = np.empty((len(scenario), 3), dtype=np.int32)
        out[:, 0] = self.fields["event"][0].encode(scenario)
        out[:, 1] = self.fields["event"][1].encode(branch)
        out[:, 2] = hours(event_time)
        return out + self.offsets["event"]

    def encode_impressions(self, impressions: Impressions, scenarios: Sequence[str]) -> NDArray[np.int32]:
        """int32 [n, 3]: the same rows as `encode_events` gives, from codes instead of text."""
        names, branches = self.fields["event"][:2]
        out = np.empty((len(impressions), 3), dtype=np.int32)
        out[:, 0] = np.array(names.encode(scenarios), dtype=np.int32)[impressions.scenario]
        out[:, 1] = np.array(branches.encode(BRANCHES), dtype=np.int32)[impressions.ad.astype(np.intp)]
        out[:, 2] = hours(impressions.event_time)
        return out + self.offsets["event"]

    def to_json(self) -> dict[str, list[dict[str, Any]]]:
        return {
            kind: [
                {"name": f.name, "type": f.type, "values": list(f.values), "edges": list(f.edges)}
                | ({"numbers": list(f.numbers)} if f.type == "statistic" else {})
                for f in fields
            ]
            for kind, fields in self.fields.items()
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Features:
        try:
            features = cls(
                {
                    kind: [
                        Field(f["name"], f["type"], tuple(f["values"]), tuple(f["edges"]), tuple(f.get("numbers", ()))) for f in data[kind]
                    ]
                    for kind in ("user", "item", "event")
                }
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"the vocabulary is not one that models/features.py wrote: {error!r}") from error
        if features.names["event"] != EVENT_FIELDS:
            raise ModelError(f"the vocabulary's event fields are {features.names['event']}, not {EVENT_FIELDS}")
        return features


def hours(event_time: NDArray[np.float64]) -> NDArray[np.int32]:
    """int32 [n]: 1 + hour of the day, UTC; 0 where the time is not finite."""
    finite = np.isfinite(event_time)
    hour: NDArray[np.float64] = np.where(finite, event_time, 0.0) // 3600.0 % 24.0
    return np.where(finite, 1 + hour, 0).astype(np.int32)


def fit(dataset: Dataset, train: Impressions) -> Features:
    """Vocabularies and bins from the users, items and events of `train` alone."""
    users = np.bincount(train.user, minlength=len(dataset.user_ids))
    items = np.bincount(train.item, minlength=len(dataset.item_ids))
    scenarios = np.bincount(train.scenario, minlength=len(dataset.scenarios))
    return Features(
        {
            "user": _fit_kind("user", dataset.user_ids, dataset.user_features, users),
            "item": _fit_kind("item", dataset.item_ids, dataset.item_features, items),
            "event": [
                fit_category("scenario", dataset.scenarios, scenarios),
                Field("branch", "category", BRANCHES),
                Field("event_time", "hour"),
            ],
        }
    )


Waiting = dict[str, dict[str, int]]  # field -> value -> impressions: what has been seen, but not often enough to have a row


def grow(features: Features, dataset: Dataset, train: Impressions, waiting: Waiting) -> tuple[Features, Waiting]:
    """The fields with a row for every value that has by now been seen twice, behind the rows there were; bins stay as they are.

    Args:
        waiting: what the last growth left; empty after `fit`.
    """
    events = {"scenario": (dataset.scenarios, np.bincount(train.scenario, minlength=len(dataset.scenarios)))}
    grown, left = {}, {}
    for kind, fields in features.fields.items():
        grown[kind] = list(fields)
        for place, f in enumerate(fields):
            if f.type != "category" or f.name == "branch":
                continue
            values, counts = events[f.name] if kind == "event" else _occurrences(kind, f.name, dataset, train)
            total = tally(values, counts)
            total.update(waiting.get(f.name, {}))
            new = {value: count for value, count in total.items() if value not in f.row_of}
            grown[kind][place] = Field(f.name, "category", f.values + often(new))
            left[f.name] = {value: count for value, count in sorted(new.items()) if count < OFTEN}
    return Features(grown), left


def rows_before(before: Features, after: Features) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """For every row of the grown table the row it was, and whether it is new: then the row it was is its field's unknown one."""
    was, new = [], []
    for kind in before.fields:
        for old, f, offset in zip(before.fields[kind], after.fields[kind], before.offsets[kind].tolist()):
            rows = np.arange(f.size)
            was.append(offset + np.where(rows < old.size, rows, 0))
            new.append(rows >= old.size)
    return np.concatenate(was), np.concatenate(new)


def _occurrences(kind: str, name: str, dataset: Dataset, train: Impressions) -> tuple[Sequence[object], NDArray[np.intp]]:
    """The values of one feature, and in how many impressions each occurs."""
    ids, columns, seen = (
        (dataset.user_ids, dataset.user_features, train.user) if kind == "user" else (dataset.item_ids, dataset.item_features, train.item)
    )
    counts = np.bincount(seen, minlength=len(ids))
    chosen = np.flatnonzero(counts)
    if name == ID_FIELDS[kind]:
        return [ids[i] for i in chosen.tolist()], counts[chosen]
    return (columns[name][chosen].tolist() if name in columns else [None] * len(chosen)), counts[chosen]


def _fit_kind(kind: str, ids: Sequence[str], columns: Mapping[str, NDArray[np.object_]], counts: NDArray[np.intp]) -> list[Field]:
    """The id's field first, then one per column that is not the same for everyone."""
    seen = np.flatnonzero(counts)
    fields = [fit_category(ID_FIELDS[kind], [ids[i] for i in seen.tolist()], counts[seen])]
    for name, column in columns.items():
        values = column[seen].tolist()
        fitted = fit_number(name, values) if is_numeric(values) else fit_category(name, values, counts[seen])
        if len(set(fitted.encode(values))) > 1:
            fields.append(fitted)
    return fields


def is_numeric(values: Sequence[object]) -> bool:
    """All known values are numbers (bool is not one)."""
    known = [value for value in values if value is not None]
    return bool(known) and all(isinstance(value, int | float | np.number) and not isinstance(value, bool) for value in known)


def fit_category(name: str, values: Sequence[object], counts: NDArray[np.intp]) -> Field:
    return Field(name, "category", values=often(tally(values, counts)))


def tally(values: Sequence[object], counts: NDArray[np.intp]) -> Counter[str]:
    """Impressions of each known value."""
    total: Counter[str] = Counter()
    for value, count in zip(values, counts.tolist(), strict=True):
        text = category(value)
        if text is not None:
            total[text] += count
    return total


def often(total: Mapping[str, int]) -> tuple[str, ...]:
    """Values with at least two impressions, the most frequent first (neighbouring rows of the table then share cache lines)."""
    return tuple(sorted((value for value, count in total.items() if count >= OFTEN), key=lambda value: (-total[value], value)))


def fit_number(name: str, values: Sequence[object], bins: int = BINS) -> Field:
    """Bins of about equal population; one bin per value if there are at most `bins` of them (edges midway between neighbours)."""
    known = np.array([x for x in map(number, values) if math.isfinite(x)], dtype=np.float64)
    distinct = np.unique(known)
    few = len(distinct) <= bins
    edges = (distinct[1:] + distinct[:-1]) / 2 if few else np.unique(np.quantile(known, np.arange(1, bins) / bins))
    return Field(name, "number", edges=tuple(edges.tolist()))
