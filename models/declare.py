"""A new space for a new model: the old one's declaration with another name and the model's dims."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from crossrep.errors import ModelError
from crossrep.spec import Space, next_name


def declare(like: Space, outputs: Mapping[str, int], model: str, name: str | None = None) -> str:
    """TOML of a space that aggregates a model's outputs as `like` does.

    Args:
        outputs: name of an output -> its dimension.
        model: named in the comment.

    Raises:
        ModelError: a column takes an output that the model does not have.
        SpecError: the name or a dimension is none that a space can have.
    """
    declared = json.loads(json.dumps(like.toml_dict))
    declared["name"] = name or next_name(like.name)
    for entity, column, given in _columns(declared):
        if given["dim"]:
            if given["source"] not in outputs:
                has = ", ".join(f"{output}[{dim}]" for output, dim in outputs.items())
                raise ModelError(f"{entity}.{column} of space {like.name!r} takes {given['source']}, but model {model} gives {has}")
            given["dim"] = outputs[given["source"]]
    text = f"# For model {model}; aggregates as {like.name} does.\n" + "\n".join(_toml(declared, ())) + "\n"
    Space.parse(text, source=f"space {declared['name']!r}")
    return text


def _columns(declared: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for entity, spec in declared["entities"].items():
        for column, given in spec["columns"].items():
            yield entity, column, given


def _toml(table: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    """Its lines. Strings, numbers and lists of strings are written alike in JSON and in TOML."""
    plain = {key: value for key, value in table.items() if not isinstance(value, dict)}
    if path and plain:
        yield f"\n[{'.'.join(path)}]"
    yield from (f"{key} = {json.dumps(value)}" for key, value in plain.items())
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _toml(value, (*path, key))
