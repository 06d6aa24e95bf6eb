"""Every error crossrep raises on purpose.

    CrossrepError
    ├── SpecError            a space's TOML is wrong; names each key
    ├── SpaceError           the space is unknown, or what runs does not fit what was published
    ├── TopicError           a topic is missing, or does not fit the space
    ├── BadRecord            bytes that are not what their topic promises; costs only itself
    │   ├── BadFrame
    │   └── BadEvent
    ├── StateError           state that must not be used or continued; says how to go on
    ├── DataError            a data set's folder or file is not what it must be
    └── ModelError           an upstream model cannot be loaded, found or compared, or does not fit the space

Messages name the value, the place and the fix.
"""

from __future__ import annotations


class CrossrepError(Exception):
    """Base of all errors raised by crossrep."""


class SpecError(CrossrepError):
    """A space's spec is invalid. `problems` holds one line per wrong key."""

    def __init__(self, source: str, problems: list[str]):
        self.problems = problems
        super().__init__(f"{source} is not a valid space:\n" + "\n".join(f"  {problem}" for problem in problems))


class SpaceError(CrossrepError):
    """A space is unknown, or differs from the one that was published under its name."""


class TopicError(CrossrepError):
    """A topic is missing or its settings do not fit the space."""


class BadRecord(CrossrepError):
    """Bytes that are not what their topic promises. `reason` is a short stable word for metrics and dead letters."""

    def __init__(self, reason: str, detail: str):
        self.reason = reason
        self.detail = detail
        super().__init__(f"{reason}: {detail}")


class BadFrame(BadRecord):
    """A frame that failed validation; none of its rows was folded."""


class BadEvent(BadRecord):
    """An event that failed validation."""


class StateError(CrossrepError):
    """State that must not be used or continued."""


class DataError(CrossrepError):
    """A data set's folder or file is not what it must be."""


class ModelError(CrossrepError):
    """An upstream model cannot be loaded, or does not fit the space."""
