"""A space: one upstream model version with one aggregation spec, declared in one TOML file.

Vectors of two model versions must never be averaged, so topics, records and tables all carry the space's name, and frames and records
its hash. Everything else (topics, record layout, tables, readers) is derived from the spec; adding an entity or a column is a declaration.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from crossrep.errors import SpecError

MAX_KEY_BYTES = 64  # ids longer than this (UTF-8) are bad records

_SECONDS = {"ms": "0.001", "s": "1", "m": "60", "h": "3600", "d": "86400", "w": "604800"}
_UNITS = {unit: Decimal(seconds) for unit, seconds in _SECONDS.items()}
_RECORD_FIELDS = ("header", "count", "event_time", "source_offset")  # every record has these; columns write others


def parse_duration(value: object) -> float:
    """`"200ms"`, `"90s"`, `"6h"`, `"3d"` in seconds.

    Raises:
        ValueError: not a positive number followed by ms, s, m, h, d or w.
    """
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,12})?)(ms|s|m|h|d|w)", value) if isinstance(value, str) else None
    # In decimals, so that "0.7s" and "700ms" are the same number, and so the same spec.
    seconds = Decimal(match[1]) * _UNITS[match[2]] if match else Decimal(0)
    if not _UNITS["ms"] <= seconds <= 52_000 * _UNITS["w"]:
        raise ValueError('not a duration between 1ms and 52000w; write a number and a unit, such as "200ms", "90s", "6h" or "3d"')
    return float(seconds)


Duration = Annotated[float, BeforeValidator(parse_duration)]
Weight = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False, strict=True)]
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,39}$")]


class _Declared(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Column(_Declared):
    """One aggregate of one entity."""

    source: Name  # the upstream model's output that is aggregated
    dim: int = Field(ge=0, le=4096, strict=True)  # 0: no vector, the decayed weight alone is the feature
    aggregate: Literal["decayed_mean", "latest"]
    half_life: Duration | None = None
    events: tuple[Name, ...] | None = None  # None: all events count

    @model_validator(mode="after")
    def _fits_aggregate(self) -> Column:
        if self.aggregate == "decayed_mean" and self.half_life is None:
            raise ValueError('half_life is missing; a decayed_mean needs one, such as half_life = "3d"')
        if self.aggregate == "latest" and self.half_life is not None:
            raise ValueError("half_life has no meaning for aggregate = 'latest'; remove it")
        if self.aggregate == "latest" and self.dim == 0:
            raise ValueError("dim = 0 has no meaning for aggregate = 'latest'; give the vector's length")
        return self


class Entity(_Declared):
    """What is keyed: users, items, or anything else an event names."""

    columns: dict[Name, Column] = Field(min_length=1)
    key: Name | None = None  # the event's field that holds the id; default "<entity>_id"
    # A key whose newest event is that much older than its partition's stream time is deleted; None: never.
    expire_after: Duration | None = None


class Inputs(_Declared):
    """Topics this space reads. They belong to the platform, not to the space, so they are not part of its hash."""

    impressions: str = "events.impressions"
    clicks: str = "events.clicks"
    user_features: str = "features.user"
    item_features: str = "features.item"


class Space(_Declared):
    """A validated spec. Construct with `Space.load(path)` or `Space.parse(toml_text)`."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,79}$")]
    partitions: int = Field(ge=1, le=1024, strict=True)
    flush: Duration = 0.2
    history: Duration = 3 * 3600.0  # how far back `crossrep rewind` can go
    vectors: Literal["float16", "float32"] = "float16"  # of vectors in frames; records always carry float32
    combine: bool = True  # rows of one key in a batch are merged on the way; if not, an archive can be cut between any two events
    weights: dict[Name, Weight] = Field(default={"impression": 1.0, "click": 1.0}, min_length=1)
    inputs: Inputs = Inputs()
    entities: dict[Name, Entity] = Field(min_length=1)

    @model_validator(mode="after")
    def _hangs_together(self) -> Space:
        problems = [problem for name in self.entities for problem in self._entity_problems(name)]
        dims: dict[str, tuple[int, str]] = {}
        for entity_name, entity in self.entities.items():
            for column_name, column in entity.columns.items():
                place = f"entities.{entity_name}.columns.{column_name}"
                dim, first = dims.setdefault(column.source, (column.dim, place)) if column.dim else (0, "")
                if dim != column.dim:
                    problems.append(f"{place}.dim: source {column.source!r} has dim {dim} at {first}, but {column.dim} here")
        if not 0.01 <= self.flush <= 60:
            problems.append(f"flush: {self.flush:g} s is out of range; write between 10ms and 60s")
        if not 60 <= self.history <= 30 * 86_400:
            problems.append(f"history: {self.history:g} s is out of range; write between 1m and 30d")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _entity_problems(self, name: str) -> list[str]:
        place, columns = f"entities.{name}.columns", self.entities[name].columns
        problems, written = [], set(_RECORD_FIELDS)
        for column_name, column in columns.items():
            fields = column_fields(column_name, column)
            twice = written.intersection(fields)
            if twice:
                problems.append(f"{place}.{column_name}: the record already has a field {min(twice)!r}; rename the column")
            written.update(fields)
        for column_name, column in columns.items():
            for event in column.events or ():
                if event not in self.weights:
                    problems.append(f"{place}.{column_name}.events: {event!r} is not an event; [weights] knows {', '.join(self.weights)}")
            if column.events == ():
                problems.append(f"{place}.{column_name}.events: empty; leave it out to take all events")
        return problems

    @classmethod
    def load(cls, path: Path | str) -> Space:
        """Read and validate a TOML file.

        Raises:
            SpecError: unreadable, not TOML, or invalid; names every wrong key.
        """
        try:
            text = Path(path).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SpecError(str(path), [f"cannot be read: {error}"]) from None
        return cls.parse(text, source=str(path))

    @classmethod
    def parse(cls, text: str, source: str = "spec") -> Space:
        """Validate TOML text. Raises SpecError."""
        try:
            declared = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise SpecError(source, [f"not TOML: {error}"]) from None
        return cls.from_dict(declared, source)

    @classmethod
    def from_dict(cls, declared: dict[str, Any], source: str = "spec") -> Space:
        """Validate a dict of the TOML's shape. Raises SpecError."""
        try:
            return cls.model_validate(declared)
        except ValidationError as error:
            raise SpecError(source, [line for e in error.errors() for line in _problem(e).splitlines()]) from None

    @cached_property
    def toml_dict(self) -> dict[str, Any]:
        """The spec as it would be declared: durations as text, defaults written out."""
        declared = self.model_dump(exclude_none=True)
        declared["flush"], declared["history"] = _text_duration(self.flush), _text_duration(self.history)
        if self.combine:
            del declared["combine"]  # of which older readers know nothing
        for entity in declared["entities"].values():
            if "expire_after" in entity:
                entity["expire_after"] = _text_duration(entity["expire_after"])
            for column in entity["columns"].values():
                if "half_life" in column:
                    column["half_life"] = _text_duration(column["half_life"])
                if "events" in column:
                    column["events"] = list(column["events"])
        return declared

    @cached_property
    def hash(self) -> bytes:
        """8 bytes over everything that gives vectors, weights and records their meaning.

        The order of entities and columns is part of it, since records follow it. Flush, history, combine and inputs may change.
        """
        meaning = self.model_dump(exclude={"flush", "history", "combine", "inputs"})
        meaning["weights"] = sorted(self.weights.items())
        for name, entity in meaning["entities"].items():
            entity["key"] = self.key_field(name)
            if entity["expire_after"] is None:
                del entity["expire_after"]
            for column in entity["columns"].values():
                column["events"] = sorted(set(column["events"])) if column["events"] else None
        return hashlib.sha256(json.dumps(meaning).encode()).digest()[:8]

    @property
    def sources(self) -> dict[str, int]:
        """The upstream outputs this space needs, with their dims."""
        return {c.source: c.dim for e in self.entities.values() for c in e.columns.values() if c.dim}

    def key_field(self, entity: str) -> str:
        """The event's field that holds this entity's id."""
        return self.entities[entity].key or f"{entity}_id"

    @property
    def frames_topic(self) -> str:
        return f"frames.{self.name}"

    @property
    def inference_topic(self) -> str:
        return f"inference.{self.name}"

    @property
    def history_topic(self) -> str:
        return f"history.{self.name}"

    @property
    def samples_topic(self) -> str:
        return f"samples.{self.name}"

    @property
    def training_topic(self) -> str:
        return f"training.{self.name}"

    @property
    def dead_letters_topic(self) -> str:
        return f"dead-letters.{self.name}"

    def representations_topic(self, entity: str) -> str:
        return f"representations.{entity}.{self.name}"


def fold_group(space: Space) -> str:
    """The consumer group of the fold workers; its committed offsets are the space's progress."""
    return f"fold.{space.name}"


def next_name(name: str) -> str:
    """kuairand-v1 -> kuairand-v2; a name without a number gets a 2."""
    stem = name.rstrip("0123456789")
    return f"{stem}{int(name[len(stem) :] or 1) + 1}"


def infer_group(space: Space) -> str:
    """The consumer group of the inference workers."""
    return f"infer.{space.name}"


def frame_group(space: Space) -> str:
    """The consumer group of the `crossrep frame` workers."""
    return f"frame.{space.name}"


def samples_group(space: Space) -> str:
    """The consumer group of the `crossrep samples` workers."""
    return f"samples.{space.name}"


def training_group(space: Space) -> str:
    """The consumer group of `crossrep training-set --topic`."""
    return f"training.{space.name}"


def column_fields(name: str, column: Column) -> list[str]:
    """The record fields a column writes, in order."""
    return ([f"{name}_weight"] if column.aggregate == "decayed_mean" else []) + [f"{name}_time"] + ([name] if column.dim else [])


def _text_duration(seconds: float) -> str:
    exact = Decimal(repr(seconds))
    for unit in ("w", "d", "h", "m", "s"):
        if exact % _UNITS[unit] == 0:
            return f"{int(exact / _UNITS[unit])}{unit}"
    return f"{exact / _UNITS['ms']:f}ms"


def _problem(error: Any) -> str:
    place: str = ".".join(str(part) for part in error["loc"] if part != "[key]")
    message: str = error["msg"].removeprefix("Value error, ")
    match error["type"]:
        case "missing":
            return f"{place}: missing"
        case "extra_forbidden":
            return f"{place}: unknown key; remove it or check its spelling"
    if not place:
        return message
    got = "" if isinstance(error["input"], dict) else f" (got {error['input']!r})"
    return f"{place}: {message}{got}"
