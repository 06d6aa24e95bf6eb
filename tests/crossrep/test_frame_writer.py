"""What other teams write with: FrameWriter, on a real broker; and that readers and writers import nothing heavy."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from confluent_kafka import TopicPartition

from crossrep import CrossrepError, FrameWriter, kafka
from crossrep.spec import Space
from tests.cluster import ROOT


def sources(n: int, value: float = 1.0) -> dict[str, np.ndarray[Any, Any]]:
    return {"cr": np.full((n, 8), value, "f4"), "ur": np.full((n, 4), value, "f4"), "ir": np.full((n, 4), value, "f4")}


def frames_seen(space: Space, bootstrap: str) -> int:
    """Committed frames."""
    client = kafka.consumer(bootstrap, config=kafka.ENDS)
    try:
        client.assign([TopicPartition(space.frames_topic, number, 0) for number in range(space.partitions)])
        left, seen = set(range(space.partitions)), 0
        while left:
            for message in client.consume(100, 0.1):
                if kafka.is_end(message):
                    left.discard(message.partition())
                else:
                    assert message.error() is None
                    seen += 1
        return seen
    finally:
        client.close()


def test_nothing_is_visible_before_the_commit(bootstrap: str, space: Space) -> None:
    with FrameWriter(space.name, "w", bootstrap) as writer:
        writer.write("user", ["a"], "click", [1e9], sources(1))
        assert frames_seen(space, bootstrap) == 0
        writer.commit()
        assert frames_seen(space, bootstrap) == 1
        writer.commit()  # nothing more to write
        writer.write("user", ["b"], "click", [1e9], sources(1))
    assert frames_seen(space, bootstrap) == 1  # what was not committed is dropped


def test_bad_arguments_write_nothing(bootstrap: str, space: Space) -> None:
    good: dict[str, Any] = {"entity": "user", "ids": ["a", "b"], "event": "click", "times": [1e9, 1e9], "sources": sources(2)}
    nan, huge = sources(2), sources(2)
    nan["cr"][1, 3], huge["cr"][0, 0] = np.nan, 1e6
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"entity": "advertiser"}, "no entity 'advertiser'"),
        ({"ids": ["a"]}, "1 ids"),
        ({"ids": ["a", ""]}, "1 to 64"),
        ({"ids": ["a", "x" * 65]}, "1 to 64"),
        ({"event": "purchase"}, r"'purchase' is not in the space's \[weights\]"),
        ({"event": ["click", "purchase"]}, "purchase"),
        ({"event": ["click"]}, "shape"),
        ({"times": [1e9]}, "shape"),
        ({"times": [1e9, np.nan]}, "times"),
        ({"times": [1e9, -1]}, "times"),
        ({"times": [1e9, np.inf]}, "times"),
        ({"sources": nan}, "finite"),
        ({"sources": huge}, "finite in float16"),
        ({"sources": {"cr": np.ones((2, 8))}}, "needs source 'ur'"),
        ({"sources": {**sources(2), "cr": np.ones((2, 9))}}, r"needs source 'cr' of shape \(2, 8\)"),
        ({"sources": {**sources(2), "cr": np.ones((3, 8))}}, "needs source 'cr'"),
        *(({"weights": [1.0, w]}, "weights must be") for w in (0.0, -1.0, np.nan, np.inf, 1e60)),
        ({"weights": [1.0]}, "weights must be"),
    ]
    with FrameWriter(space.name, "w", bootstrap) as writer:
        for changed, message in wrong:
            with pytest.raises(ValueError, match=message):
                writer.write(**{**good, **changed})
        writer.commit()
        assert frames_seen(space, bootstrap) == 0
        writer.write(**good)
        writer.commit()
        assert frames_seen(space, bootstrap) > 0


def test_a_second_writer_of_the_same_name_fences_the_first(bootstrap: str, space: Space) -> None:
    first = FrameWriter(space.name, "twin", bootstrap)
    first.write("user", ["a"], "click", [1e9], sources(1))
    second = FrameWriter(space.name, "twin", bootstrap)
    with pytest.raises(CrossrepError, match="nothing was written"):
        first.commit()
    second.write("user", ["b"], "click", [1e9], sources(1))
    second.commit()
    other = FrameWriter(space.name, "another", bootstrap)
    other.write("user", ["c"], "click", [1e9], sources(1))
    other.commit()
    second.write("user", ["d"], "click", [1e9], sources(1))
    second.commit()
    with pytest.raises(CrossrepError):
        first.commit()
    assert frames_seen(space, bootstrap) == 3


def test_readers_import_nothing_heavy() -> None:
    heavy = ("torch", "faust", "mode", "rocksdict", "aiokafka", "pyarrow", "duckdb", "fsspec", "matplotlib", "state", "models", "streams")
    code = f"import sys, crossrep, crossrep.cli; found = [m for m in {heavy} if m in sys.modules]; assert not found, found"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)
