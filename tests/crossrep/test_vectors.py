"""The test vectors for other languages, and the examples in docs/formats.md, are what this version reads and writes."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from crossrep.columnar import frames
from crossrep.columnar.records import RecordLayout
from crossrep.keys import Keys
from crossrep.spec import Space
from crossrep.training.records import TrainingLayout
from tests.vectors import generate, reference

CONTENT: dict[str, Any] = json.loads(generate.VECTORS.read_text("utf-8"))
SPACE = Space.parse(CONTENT["space"]["toml"])
LAYOUT = RecordLayout(SPACE, "user")
RENEW = "if the format changed on purpose: python -m tests.vectors.generate"


def test_the_vectors_are_up_to_date() -> None:
    assert generate.dumped(generate.vectors()) == generate.VECTORS.read_text("utf-8"), RENEW


def test_the_examples_in_the_documentation_are_up_to_date() -> None:
    text = generate.DOCS.read_text("utf-8")
    assert generate.documented(text, CONTENT) == text, RENEW


def test_the_space_has_the_listed_hash() -> None:
    assert SPACE.hash.hex() == CONTENT["space"]["hash"]


@pytest.mark.parametrize("listed", CONTENT["partitions"], ids=lambda p: p["key"][:20])
def test_keys_lie_in_the_listed_partitions(listed: dict[str, Any]) -> None:
    key = bytes.fromhex(listed["hex"])
    assert key == listed["key"].encode()
    assert Keys.of([key]).partitions(4).tolist() == [listed["partition"]] == [reference.partition(key, 4)]
    assert reference.murmur2(key) == listed["murmur2"]


@pytest.mark.parametrize("schema", ["frame_schema", "record_schema", "training_schema"])
def test_headers_are_fingerprints_of_the_listed_schemas(schema: str) -> None:
    assert CONTENT[schema]["header"] == "c301" + reference.fingerprint(CONTENT[schema]["canonical"]).hex()


@pytest.mark.parametrize("listed", CONTENT["frames"], ids=str)
def test_frames_hold_the_listed_rows(listed: dict[str, Any]) -> None:
    value = bytes.fromhex(listed["hex"])
    rows = frames.decode(SPACE, value)
    assert rows.keys.partitions(4).tolist() == [listed["partition"]] * len(rows)
    assert generate._frame(listed["partition"], value) == listed
    decoded, trace = reference.frame(value, bytes.fromhex(CONTENT["frame_schema"]["header"]))
    assert decoded == {"space_hash": SPACE.hash.hex(), "entity": "user", "rows": listed["rows"]}
    assert [start for start, _, _ in trace] == [0, *(end for _, end, _ in trace[:-1])]
    assert trace[-1][1] == len(value)


@pytest.mark.parametrize("listed", CONTENT["records"], ids=lambda r: r["key"])
def test_records_hold_the_listed_values(listed: dict[str, Any]) -> None:
    value = bytes.fromhex(listed["hex"])
    (record,) = LAYOUT.decode([value])
    plain = reference.record(value, bytes.fromhex(CONTENT["record_schema"]["header"]), CONTENT["record_schema"]["fields"])
    assert set(plain) == set(listed["values"])
    for name, number in listed["values"].items():
        expected = -np.inf if number == "-inf" else number
        assert plain[name] == expected
        assert record[name].tolist() == expected


@pytest.mark.parametrize("listed", CONTENT["training_samples"], ids=lambda s: s["sample"]["user_id"])
def test_training_samples_hold_the_listed_values(listed: dict[str, Any]) -> None:
    value, entities = bytes.fromhex(listed["hex"]), {"user": CONTENT["record_schema"]["fields"]}
    plain, trace = reference.training_sample(value, bytes.fromhex(CONTENT["training_schema"]["header"]), entities)
    expected = {name: -np.inf if number == "-inf" else number for name, number in listed["known"]["user"].items()}
    assert plain == {"known_before": listed["known_before"], "known": {"user": expected}, "sample": listed["sample"]}
    assert [start for start, _, _ in trace] == [0, *(end for _, end, _ in trace[:-1])] and trace[-1][1] == len(value)
    batch = TrainingLayout(SPACE).decode([value], {})
    user, sample = batch.known["user"], listed["sample"]
    assert batch.sample_ids == [sample["sample_id"]] and batch.user_ids == [sample["user_id"]] and batch.labels[0] == sample["label"]
    assert (user.counts[0], user.source_offsets[0], user["ur"].times[0]) == tuple(
        expected[n] for n in ("count", "source_offset", "ur_time")
    )
    assert user["cr"].vectors[0].tolist() == expected["cr"]
    assert user["cr"].weights[0] == (expected["cr_weight"] / 2 if user.found[0] else 0)  # an hour later; half-life 1 h


def test_the_listed_records_follow_from_the_listed_events() -> None:
    """By hand: user 7 has an impression (1, -2) and one (-1, 0.125) at 0 h, and a click of weight 4 at 2 h; half-life 1 h."""
    seven = next(r["values"] for r in CONTENT["records"] if r["key"] == "7")
    assert seven["count"] == 3
    assert seven["cr_weight"] == 4 + 2 / 4
    assert seven["cr"] == pytest.approx([(4 * 3 + 0.25 * 1 - 0.25 * 1) / 4.5, (4 * 4 - 0.25 * 2 + 0.25 * 0.125) / 4.5], rel=1e-6)
    assert (seven["clicks_weight"], seven["clicks_time"]) == (4, generate.START + 7200)
    assert seven["ur"] == [2, 2, 2]
    longer = next(r["values"] for r in CONTENT["records"] if r["key"].startswith("user-with"))
    assert (longer["clicks_weight"], longer["clicks_time"]) == (0, "-inf")
