"""crossrep: streaming, exactly-once aggregation of user, item and cross representations.

LocalView     a space's representations in memory, following the stream
FrameWriter   write rows of your own model into a space
Space         a validated spec
"""

from crossrep.errors import (
    BadEvent,
    BadFrame,
    BadRecord,
    CrossrepError,
    DataError,
    ModelError,
    SpaceError,
    SpecError,
    StateError,
    TopicError,
)
from crossrep.spec import Column, Entity, Space
from crossrep.view import ColumnValues, LocalView, Representations
from crossrep.writer import FrameWriter

__all__ = [
    "BadEvent",
    "BadFrame",
    "BadRecord",
    "Column",
    "ColumnValues",
    "CrossrepError",
    "DataError",
    "Entity",
    "FrameWriter",
    "LocalView",
    "ModelError",
    "Representations",
    "Space",
    "SpaceError",
    "SpecError",
    "StateError",
    "TopicError",
]
