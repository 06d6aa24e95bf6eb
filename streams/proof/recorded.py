"""The recorded frames and orders, decoded by plain fastavro and not by what the workers use."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from io import BytesIO
from typing import Any

import numpy as np
from fastavro import parse_schema, schemaless_reader
from numpy.typing import NDArray

from crossrep import kafka
from crossrep.columnar import forget
from crossrep.columnar.forget import Forget
from crossrep.errors import CrossrepError
from crossrep.keys import Keys
from crossrep.spec import Space
from streams.proof.readout import Bounds, Seen, chosen

Progressed = Callable[[int, int], None]  # frames read, and frames there are
_FRAME, _ORDER = (parse_schema(json.loads((files("crossrep") / "schemas" / f"{name}.1.avsc").read_text())) for name in ("frame", "forget"))


@dataclass(frozen=True)
class Part:
    """One column of a frame: the rows of the sample that touch it."""

    at: NDArray[np.int64]  # which of the frame's keys
    times: NDArray[np.float64]
    weights: NDArray[np.float64]
    vectors: NDArray[np.floating]


@dataclass(frozen=True)
class Frame:
    """The rows of a frame whose keys are of the sample."""

    entity: str
    newest: float  # event time of all its rows, seconds since 1970
    keys: list[bytes]
    times: NDArray[np.float64]
    counts: NDArray[np.int64]
    columns: dict[str, Part]


def walk(
    space: Space, bootstrap: str, seen: Seen, bounds: Bounds, refused: set[tuple[int, int]], share: float, progressed: Progressed
) -> Iterator[tuple[int, int, Forget | Frame]]:
    """Every frame and every order that must be in the state, with partition and offset."""
    total = max(1, sum(max(0, end - first) for first, end in bounds.values()))
    read = dict.fromkeys(bounds, 0)
    for message in kafka.messages(bootstrap, space.frames_topic, bounds):
        number, offset, value = message.partition(), message.offset(), message.value()
        read[number] = offset + 1 - bounds[number][0]
        progressed(sum(read.values()), total)
        if (number, offset) in refused:
            continue
        is_order = forget.is_order(value)
        if not is_order and seen.after[number].skips(offset):  # a rewind leaves frames out, but no orders
            continue
        try:
            work = _order(value) if is_order else _frame(space, value, share)
        except Exception as error:  # fastavro raises whatever its decoding hits
            raise CrossrepError(
                f"{space.frames_topic}[{number}]@{offset} cannot be read ({error!r}), but is not among the dead letters either: either "
                f"{space.dead_letters_topic} has lost its first messages to retention, or a frame was passed in silence"
            ) from None
        yield number, offset, work
    progressed(total, total)


def _order(value: bytes) -> Forget:
    order: Any = schemaless_reader(BytesIO(value[10:]), _ORDER, None)
    return Forget(order["entity"], order["key"])


def _frame(space: Space, value: bytes, share: float) -> Frame:
    frame: Any = schemaless_reader(BytesIO(value[10:]), _FRAME, None)
    n = frame["rows"]
    offsets = np.frombuffer(frame["key_offsets"], "<i4")
    kept = np.flatnonzero(chosen(Keys(np.frombuffer(frame["keys"], np.uint8), offsets), share))
    times = np.frombuffer(frame["times"], "<f8")
    counts = np.frombuffer(frame["counts"], "<i8") if frame["counts"] else np.ones(n, np.int64)
    columns = {}
    for part in frame["columns"]:
        present = np.frombuffer(part["present"], np.uint8) if part["present"] else np.ones(n, np.uint8)
        at = np.flatnonzero(present[kept])
        rows = kept[at]
        own = np.frombuffer(part["times"], "<f8") if part["times"] else times
        weights = np.frombuffer(part["weights"], "<f8") if part["weights"] else np.ones(n)
        vectors = np.zeros((n, 0))
        if space.entities[frame["entity"]].columns[part["name"]].dim:
            block = frame["vectors"][part["vectors"]]
            vectors = np.frombuffer(block["values"], "<f2" if block["dtype"] == "float16" else "<f4").reshape(n, block["dim"])
        columns[part["name"]] = Part(at, own[rows], weights[rows], vectors[rows])
    keys = [frame["keys"][a:b] for a, b in zip(offsets[kept].tolist(), offsets[kept + 1].tolist())]
    return Frame(frame["entity"], float(times.max()), keys, times[kept], counts[kept], columns)
