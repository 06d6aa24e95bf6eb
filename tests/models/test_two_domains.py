"""What the reader of two-domain sequences makes of a folder, and what it says of a wrong one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from crossrep.errors import DataError
from models.datasets.two_domains import load

MAP = {"soap": [7, 1], "rice": [3, 0], "salt": [9, 0], "pan": [4, 1]}


def folder(path: Path, lines: str = "5 3|10 4|10 9|20\n", numbers: object = None) -> Path:
    (path / "sequences.txt").write_text(lines)
    (path / "item_map.json").write_text(json.dumps(MAP if numbers is None else numbers))
    return path


def test_items_are_numbered_by_domain_and_events_keep_their_order(tmp_path: Path) -> None:
    found = load(folder(tmp_path, "5 3|10 4|10 9|20\n\n2 7|1 9|5\n"))
    assert found.sizes == (2, 2)
    assert found.start.tolist() == [0, 3, 5]
    assert found.item.tolist() == [0, 2, 1, 3, 1]  # rice salt | pan soap
    assert found.time.tolist() == [10, 10, 20, 1, 5]
    assert found.domain.tolist() == [0, 1, 0, 1, 0]
    assert found.user.tolist() == [0, 0, 0, 1, 1]


def test_of_a_long_sequence_the_newest_events_are_taken(tmp_path: Path) -> None:
    found = load(folder(tmp_path, "5 3|10 4|10 9|20 7|30\n1 4|1\n"), longest=3)
    assert found.time.tolist() == [10, 20, 30, 1]


def test_another_data_set_has_another_fingerprint(tmp_path: Path) -> None:
    first = load(folder(tmp_path)).fingerprint()
    assert load(folder(tmp_path)).fingerprint() == first
    assert load(folder(tmp_path, "5 3|10 4|10 9|21\n")).fingerprint() != first


def test_files_of_other_names_are_taken_where_there_is_one_of_each(tmp_path: Path) -> None:
    (folder(tmp_path) / "sequences.txt").rename(tmp_path / "afk_50_preprocessed.txt")
    assert len(load(tmp_path).item) == 3
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(DataError, match=r"has 2 \.txt files and no sequences\.txt"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "holds no user"),
        ("5 3|10\n6\n", "line 2: user 6 has no events"),
        ("u 3|10\n", "line 1: the user is no integer: 'u'"),
        ("5 3|10\n5 4|10\n", "line 2: user 5 has had a line before"),
        ("5 3:10\n", "line 1: '3:10' is not item|time"),
        ("5 3|ten\n", r"line 1: the time of '3\|ten' is no integer"),
        ("5 |10\n", r"line 1: the item of '\|10' is no integer"),
        ("5 8|10\n", "line 1: item 8 is not in item_map.json"),
        ("5 3|10 4|9\n", "line 1: time 9 comes after 10"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, lines: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(folder(tmp_path, lines))


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ([1], "one JSON object"),
        ({"rice": [3, 2]}, r"'rice' is mapped to \[3, 2\]"),
        ({"rice": 3}, "'rice' is mapped to 3"),
        ({"rice": [3, 0], "salt": [3, 1]}, "item 3 occurs more than once, at last for 'salt'"),
        ({"rice": [3, 0]}, "no item of domain 1"),
    ],
)
def test_a_wrong_map_is_named(tmp_path: Path, numbers: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(folder(tmp_path, numbers=numbers))


def test_no_folder_no_file_no_json(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a folder"):
        load(tmp_path / "absent")
    with pytest.raises(DataError, match=r"has 0 \.json files and no item_map\.json"):
        load(tmp_path)
    (folder(tmp_path) / "item_map.json").write_text("{")
    with pytest.raises(DataError, match="is not JSON"):
        load(tmp_path)


def test_arrays_are_whole_numbers(tmp_path: Path) -> None:
    found = load(folder(tmp_path))
    assert {array.dtype for array in (found.start, found.item, found.time, found.domain)} == {np.dtype(np.int64)}
