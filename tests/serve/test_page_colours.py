"""The page's colours can be read: WCAG AA in light and dark, of every pair of text and ground that page.css puts together."""

from __future__ import annotations

import re

import pytest

from tests.cluster import ROOT

CSS = (ROOT / "serve" / "page" / "page.css").read_text()
ON_ALL = ("text", "soft", "good", "wait", "bad", "link", "first", "second", "third")
PAIRS = [(text, ground) for text in ON_ALL for ground in ("ground", "card")] + [
    (kind, f"{kind}-ground") for kind in ("good", "wait", "bad")
]


def palette(scheme: str) -> dict[str, str]:
    roots = re.findall(r":root \{(.*?)\}", CSS, re.DOTALL)
    assert len(roots) == 2, "light, and what dark changes"
    light, dark = (dict(re.findall(r"--([\w-]+): (#\w{6});", root)) for root in roots)
    assert light.keys() == dark.keys()
    return light if scheme == "light" else dark


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    lesser, greater = sorted((luminance(one), luminance(other)))
    return (greater + 0.05) / (lesser + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(scheme: str) -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21) and contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)
    colours = palette(scheme)
    poor = {pair: round(found, 2) for pair in PAIRS if (found := contrast(colours[pair[0]], colours[pair[1]])) < 4.5}
    assert not poor


def test_no_colour_is_used_that_is_not_in_the_palette() -> None:
    rest = re.sub(r":root \{.*?\}", "", CSS, flags=re.DOTALL)
    assert not re.findall(r"#[0-9a-fA-F]{3,8}\b(?=[; ])|\brgba?\(|\bopacity:", rest)
