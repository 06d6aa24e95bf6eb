"""crossrep: streaming, exactly-once aggregation of user, item and cross representations.

LocalView     a space's representations in memory, following the stream
FrameWriter   write rows of your own model into a space
training_samples
              labelled samples with what was known before them, from their topic
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
from crossrep.training.reading import training_samples
from crossrep.training.records import TrainingBatch
from crossrep.views.answers import ColumnValues, Representations
from crossrep.views.changes import Changes
from crossrep.views.view import LocalView
from crossrep.writer import FrameWriter

__all__ = [
    "BadEvent",
    "BadFrame",
    "BadRecord",
    "Changes",
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
    "TrainingBatch",
    "training_samples",
]
