"""Named points at which a test can kill the process: `CROSSREP_FAULT="commit.begun:3"` kills at the third pass of that point, and
`"commit.begun:3:SIGSTOP"` stops it there.

The points are the steps between which a crash could lose or double something; docs/guarantees.md says what happens at each. With the
variable unset, `point` is an empty function.
"""

from __future__ import annotations

import os
import signal

POINTS = (
    "fold.folded",  # a frame is in memory, nothing else knows
    "flush.copied",  # dirty rows are copied, folding goes on
    "commit.begun",  # the transaction is open
    "commit.produced",  # records are sent
    "commit.offsets",  # progress is in the transaction
    "commit.committed",  # Kafka has it, RocksDB does not
    "store.written",  # RocksDB has it
    "open.fenced",  # the former owner is fenced, nothing is read
    "open.restoring",  # a part of the changelog's tail is in RocksDB
    "open.restored",  # the changelog's tail is read, nothing flows
    "infer.consumed",  # events are read
    "infer.computed",  # the model has run, frames are encoded
    "infer.begun",
    "infer.produced",
    "infer.offsets",
    "infer.committed",
    "samples.joined",  # an event is in memory
    "samples.copied",  # samples are encoded
    "samples.begun",
    "samples.produced",
    "samples.offsets",
    "samples.committed",
    "samples.fenced",  # the former owner is fenced, nothing is read
    "samples.restored",  # what is needed of the log is read again, nothing flows
)


def _off(name: str) -> None:
    return None


def _armed(fault: str):  # type: ignore[no-untyped-def]
    name, after, how, *_ = (*fault.split(":"), "", "")
    if name not in POINTS:
        raise ValueError(f"CROSSREP_FAULT names {name!r}; the points are {', '.join(POINTS)}")
    left, number = int(after or 1), signal.Signals[how or "SIGKILL"]

    def point(passed: str) -> None:
        nonlocal left
        if passed == name:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), number)

    return point


point = _armed(os.environ["CROSSREP_FAULT"]) if "CROSSREP_FAULT" in os.environ else _off
