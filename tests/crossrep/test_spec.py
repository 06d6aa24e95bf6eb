"""Specs: what is wrong is named, what is right is hashed by its meaning."""

from __future__ import annotations

import copy
import tomllib
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossrep.columnar.records import RecordLayout
from crossrep.errors import SpecError
from crossrep.spec import Space, parse_duration

GOOD: dict[str, Any] = tomllib.loads("""
name = "kuairand-v1"
partitions = 4
flush = "200ms"
[weights]
impression = 1.0
click = 4.0
[entities.user.columns.cr]
source = "cr"
dim = 64
aggregate = "decayed_mean"
half_life = "3d"
[entities.user.columns.ur]
source = "ur"
dim = 32
aggregate = "latest"
[entities.item.columns.cr]
source = "cr"
dim = 64
aggregate = "decayed_mean"
half_life = "7d"
events = ["click"]
[entities.item.columns.clicks]
source = "cr"
dim = 0
aggregate = "decayed_mean"
half_life = "7d"
""")


def changed(*changes: tuple[str, Any]) -> dict[str, Any]:
    """The good spec with dotted keys set, or removed where the value is None."""
    spec = copy.deepcopy(GOOD)
    for path, value in changes:
        *parents, last = path.split(".")
        node = spec
        for parent in parents:
            node = node.setdefault(parent, {})
        if value is None:
            node.pop(last, None)
        else:
            node[last] = value
    return spec


def problems(*changes: tuple[str, Any]) -> list[str]:
    with pytest.raises(SpecError) as caught:
        Space.from_dict(changed(*changes))
    return caught.value.problems


def test_the_good_spec_is_good() -> None:
    space = Space.from_dict(GOOD)
    assert space.entities["user"].columns["cr"].half_life == 3 * 86400
    assert space.flush == 0.2
    assert space.sources == {"cr": 64, "ur": 32}
    assert space.key_field("user") == "user_id"
    assert (space.frames_topic, space.inference_topic, space.dead_letters_topic, space.representations_topic("item")) == (
        "frames.kuairand-v1",
        "inference.kuairand-v1",
        "dead-letters.kuairand-v1",
        "representations.item.kuairand-v1",
    )


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("name", "Bad_Name", "'Bad_Name'"),
        ("name", "-a", "'-a'"),
        ("name", "a" * 81, "a" * 81),
        ("name", "", "''"),
        ("partitions", 0, "0"),
        ("partitions", 1025, "1025"),
        ("partitions", "four", "'four'"),
        ("partitions", 1.5, "1.5"),
        ("flush", "200", "'200'"),
        ("flush", 200, "200"),
        ("flush", "-1s", "'-1s'"),
        ("flush", "0s", "'0s'"),
        ("vectors", "float64", "'float64'"),
        ("weights.click", 0, "0"),
        ("weights.click", -1.0, "-1.0"),
        ("weights.click", float("nan"), "nan"),
        ("weights.click", float("inf"), "inf"),
        ("weights.click", 2e6, "2000000.0"),
        ("entities.user.columns.cr.dim", -1, "-1"),
        ("entities.user.columns.cr.dim", 4097, "4097"),
        ("entities.user.columns.cr.dim", "many", "'many'"),
        ("entities.user.columns.cr.aggregate", "mean", "'mean'"),
        ("entities.user.columns.cr.half_life", "3 days", "'3 days'"),
        ("entities.user.columns.cr.half_life", "3d\n", "'3d\\n'"),
        ("entities.user.columns.cr.half_life", 3, "3"),
        ("entities.user.columns.cr.source", "C R", "'C R'"),
        ("entities.user.columns.cr.events", "click", "'click'"),
        ("entities.user.key", "User-Id", "'User-Id'"),
        ("inputs.clicks", 7, "7"),
    ],
)
def test_a_wrong_value_is_named_with_its_place(path: str, value: Any, said: str) -> None:
    (problem,) = problems((path, value))
    assert problem.startswith(f"{path}: ")
    assert said in problem


@pytest.mark.parametrize("path", ["name", "partitions", "entities", "entities.user.columns.cr.source", "entities.user.columns.cr.dim"])
def test_a_missing_key_is_named(path: str) -> None:
    assert problems((path, None)) == [f"{path}: missing"]


@pytest.mark.parametrize(
    "path", ["partition", "weight.click", "entities.user.colums.cr", "entities.user.columns.cr.halflife", "inputs.impression"]
)
def test_an_unknown_key_is_named(path: str) -> None:
    value = {"a": 1} if path.count(".") == 1 and path.startswith("weight.") else "x"
    named = path.rpartition(".")[0] if path.startswith(("weight.", "entities.user.colums")) else path
    assert problems((path, value)) == [f"{named}: unknown key; remove it or check its spelling"]


@pytest.mark.parametrize(
    ("path", "value"), [("weights.Click!", 1.0), ("entities.User", {"columns": GOOD["entities"]["user"]["columns"]}), ("weights.9", 1.0)]
)
def test_a_name_that_cannot_be_a_topic_or_field_is_refused(path: str, value: Any) -> None:
    assert any(problem.startswith(path) for problem in problems((path, value)))


def test_empty_tables_are_refused() -> None:
    assert problems(("weights", {}))[0].startswith("weights: ")
    assert problems(("entities", {}))[0].startswith("entities: ")
    assert problems(("entities.user.columns", {}))[0].startswith("entities.user.columns: ")


def test_all_problems_are_reported_at_once() -> None:
    found = problems(
        ("partitions", 0),
        ("flush", "x"),
        ("weights.click", -1),
        ("entities.user.columns.cr.dim", -1),
        ("entities.item.columns.cr.half_life", "z"),
    )
    places = {problem.split(": ")[0] for problem in found}
    assert places == {"partitions", "flush", "weights.click", "entities.user.columns.cr.dim", "entities.item.columns.cr.half_life"}


def test_all_problems_between_keys_are_reported_at_once() -> None:
    """Space.load promises to name every wrong key, also those that are wrong only together with others."""
    found = "\n".join(
        problems(
            ("entities.user.columns.cr.events", ["buy"]),
            ("entities.item.columns.cr.events", ["like"]),
            ("entities.item.columns.clicks.dim", 8),
        )
    )
    for place in ("entities.user.columns.cr.events", "entities.item.columns.cr.events", "entities.item.columns.clicks.dim"):
        assert place in found


def test_half_life_must_fit_the_aggregate() -> None:
    assert "half_life is missing" in problems(("entities.user.columns.cr.half_life", None))[0]
    assert "half_life has no meaning" in problems(("entities.user.columns.ur.half_life", "3d"))[0]
    assert "dim = 0 has no meaning" in problems(("entities.user.columns.ur.dim", 0))[0]
    assert all(p.startswith("entities.user.columns.ur") for p in problems(("entities.user.columns.ur.dim", 0)))


def test_events_must_be_known_and_not_empty() -> None:
    (problem,) = problems(("entities.user.columns.cr.events", ["click", "buy"]))
    assert problem == "entities.user.columns.cr.events: 'buy' is not an event; [weights] knows impression, click"
    (problem,) = problems(("entities.user.columns.cr.events", []))
    assert problem.startswith("entities.user.columns.cr.events: empty")


def test_one_source_has_one_dim() -> None:
    (problem,) = problems(("entities.item.columns.cr.dim", 32))
    assert problem == "entities.item.columns.cr.dim: source 'cr' has dim 64 at entities.user.columns.cr, but 32 here"


def test_flush_has_a_sensible_range() -> None:
    for wrong in ("9ms", "61s"):
        (problem,) = problems(("flush", wrong))
        assert problem.startswith("flush: ")
    assert Space.from_dict(changed(("flush", "10ms"))).flush == pytest.approx(0.01)


COLUMN = {"source": "cr", "dim": 64, "aggregate": "decayed_mean", "half_life": "3d"}


def test_columns_that_write_the_same_field_are_refused() -> None:
    (problem,) = problems(("entities.user.columns.cr_time", COLUMN))
    assert "entities.user.columns" in problem
    assert "'cr_time'" in problem
    (problem,) = problems(
        ("entities.user.columns.cr_weight", {**COLUMN, "source": "ur", "dim": 32, "aggregate": "latest", "half_life": None})
    )
    assert "'cr_weight'" in problem


@pytest.mark.parametrize("name", ["count", "event_time", "source_offset", "event", "header"])
def test_a_column_never_clashes_with_the_records_own_fields(name: str) -> None:
    """Either the spec is refused, or its record layout works."""
    try:
        space = Space.from_dict(changed((f"entities.user.columns.{name}", COLUMN)))
    except SpecError as error:
        assert name in str(error)  # noqa: PT017
        return
    layout = RecordLayout(space, "user")
    assert len(layout.empty(1).tobytes()) == layout.size
    assert layout.header


def test_an_entity_never_clashes_with_its_columns() -> None:
    """An Avro record and a fixed type may not share a name: entity "cr_vector" with a column "cr"."""
    try:
        space = Space.from_dict(changed(("entities.cr_vector", {"columns": {"cr": COLUMN}})))
    except SpecError:
        return
    assert RecordLayout(space, "cr_vector").header


def test_unreadable_files_and_bad_toml_say_so(tmp_path: Any) -> None:
    with pytest.raises(SpecError, match="cannot be read") as caught:
        Space.load(tmp_path / "nowhere.toml")
    assert "nowhere.toml" in str(caught.value)
    (tmp_path / "bad.toml").write_bytes(b"name = \xff")
    with pytest.raises(SpecError, match="cannot be read"):
        Space.load(tmp_path / "bad.toml")
    (tmp_path / "bad.toml").write_text("name = \n")
    with pytest.raises(SpecError, match=r"not TOML: .*line 1") as caught:
        Space.load(tmp_path / "bad.toml")
    assert "bad.toml" in str(caught.value)
    (tmp_path / "twice.toml").write_text('name = "a"\nname = "b"\n')
    with pytest.raises(SpecError, match="not TOML"):
        Space.load(tmp_path / "twice.toml")


@given(st.text(max_size=60))
def test_any_text_is_a_space_or_a_spec_error(text: str) -> None:
    with pytest.raises(SpecError):
        Space.parse(text)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda c: st.lists(c, max_size=3) | st.dictionaries(st.text(max_size=5), c, max_size=3),
)
PATHS = [
    "name",
    "partitions",
    "flush",
    "vectors",
    "weights",
    "weights.click",
    "inputs",
    "entities",
    "entities.user",
    "entities.user.columns",
]


@given(
    st.sampled_from([*PATHS, *(f"entities.user.columns.cr{k}" for k in ("", ".source", ".dim", ".aggregate", ".half_life", ".events"))]),
    JSON,
)
def test_any_value_anywhere_is_taken_or_refused_with_a_spec_error(path: str, value: Any) -> None:
    try:
        space = Space.from_dict(changed((path, value)))
    except SpecError as error:
        assert all(problem.strip() for problem in error.problems)  # noqa: PT017
    else:
        assert len(space.hash) == 8


@pytest.mark.parametrize(
    ("text", "seconds"), [("200ms", 0.2), ("90s", 90), ("1.5h", 5400), ("3d", 259200), ("2w", 1209600), ("10m", 600), ("0.5d", 43200)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds, rel=1e-15)


@pytest.mark.parametrize(
    "wrong", ["", "3", "d", "3 d", "-3d", "+3d", "0d", "0.0s", "1e3s", ".5s", "5.s", "3D", "3days", "nan", "inf", 3, 3.0, None, True, "3d "]
)
def test_what_is_no_duration_is_refused(wrong: object) -> None:
    with pytest.raises(ValueError, match="not a duration"):
        parse_duration(wrong)


def test_a_duration_is_finite_and_not_zero() -> None:
    """An infinite half-life makes NaN of an empty slot's -inf / inf; a zero one divides by zero."""
    for extreme in ("9" * 400 + "d", "0." + "0" * 322 + "9ms"):
        with suppress(ValueError):
            assert 0 < parse_duration(extreme) < float("inf")


def spec_hash(*changes: tuple[str, Any]) -> bytes:
    return Space.from_dict(changed(*changes)).hash


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("name", "kuairand-v2"),
        ("partitions", 8),
        ("vectors", "float32"),
        ("weights.click", 5.0),
        ("weights.buy", 1.0),
        ("entities.user.columns.cr.half_life", "4d"),
        ("entities.user.columns.cr.events", ["click"]),
        ("entities.item.columns.cr.events", None),
        ("entities.item.columns.clicks.dim", 64),
        ("entities.user.columns.ur.dim", 33),
        ("entities.user.columns.ur.source", "ir"),
        ("entities.user.columns.ur", None),
        ("entities.user.key", "visitor_id"),
        ("entities.user.columns.slow", COLUMN),
    ],
)
def test_the_hash_changes_with_the_meaning(path: str, value: Any) -> None:
    assert spec_hash((path, value)) != spec_hash()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("flush", "1s"),
        ("flush", None),
        ("inputs.clicks", "other.clicks"),
        ("entities.user.columns.cr.half_life", "72h"),
        ("entities.user.columns.cr.half_life", "259200000ms"),
        ("vectors", "float16"),
    ],
)
def test_the_hash_stays_where_the_meaning_does(path: str, value: Any) -> None:
    assert spec_hash((path, value)) == spec_hash()


def reordered() -> list[dict[str, Any]]:
    columns, entities = copy.deepcopy(GOOD), copy.deepcopy(GOOD)
    columns["entities"]["user"]["columns"] = dict(reversed(columns["entities"]["user"]["columns"].items()))
    entities["entities"] = dict(reversed(entities["entities"].items()))
    return [columns, entities]


@pytest.mark.parametrize("declared", reordered(), ids=["columns", "entities"])
def test_equal_hashes_mean_equal_records_and_stores(declared: dict[str, Any]) -> None:
    """The order of declarations: either it is part of the hash, or neither the record's bytes nor the store's prefixes depend on it."""
    one, other = Space.from_dict(GOOD), Space.from_dict(declared)
    if one.hash == other.hash:
        assert RecordLayout(one, "user").header == RecordLayout(other, "user").header
        assert list(one.entities) == list(other.entities)  # state/store.py prefixes keys by the entity's place in this order


HALF_LIVES = st.one_of(
    st.sampled_from(["700ms", "0.7s", "1.5h", "90s", "1w", "1000000.5s", "123456.789ms", "36500d"]),
    st.builds("{}{}".format, st.integers(1, 50_000), st.sampled_from(["ms", "s", "m", "h", "d", "w"])),
    st.builds("{}.{}{}".format, st.integers(1, 50_000), st.integers(1, 10**6), st.sampled_from(["ms", "s", "m", "h", "d", "w"])),
)


@given(HALF_LIVES, st.integers(10, 60_000))
def test_what_is_published_parses_to_the_same_space(half_life: str, flush: int) -> None:
    space = Space.from_dict(changed(("entities.user.columns.cr.half_life", half_life), ("flush", f"{flush}ms")))
    again = Space.from_dict(copy.deepcopy(space.toml_dict))
    assert again.hash == space.hash
    assert again.toml_dict == space.toml_dict
    assert again == space


def test_what_is_published_writes_defaults_out() -> None:
    declared = Space.from_dict(changed(("flush", None), ("weights", None), ("entities.item", None))).toml_dict
    assert declared["flush"] == "200ms"
    assert declared["weights"] == {"impression": 1.0, "click": 1.0}
    assert declared["vectors"] == "float16"
    assert declared["inputs"]["impressions"] == "events.impressions"
    assert "key" not in declared["entities"]["user"]
