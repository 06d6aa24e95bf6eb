from __future__ import annotations

from crossrep.errors import BadFrame
from state import dead_letters


def test_a_letter_of_a_huge_value_keeps_its_beginning_and_stays_small() -> None:
    value = bytes(range(256)) * (8 << 12)  # 8 MiB
    letter = dead_letters.encode("frames.s", 3, 17, b"key", value, BadFrame("undecodable", "why"))
    assert len(letter) < 600_000
    decoded = dead_letters.CODEC.decode(letter)
    assert decoded["value"] == value[: dead_letters.MOST]
    assert (decoded["partition"], decoded["offset"]) == (3, 17)


def test_a_letter_of_a_missing_value_says_so() -> None:
    decoded = dead_letters.CODEC.decode(dead_letters.encode("t", 0, 0, None, None, BadFrame("empty", "")))
    assert decoded["value"] is None
    assert decoded["key"] is None
