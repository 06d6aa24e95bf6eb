"""Every Python block of docs/trainers.md, docs/spaces.md and the README is run, in their order, on a space with users and items."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import crossrep
from crossrep.rollout.promoting import promote
from tests.cluster import ROOT, new_space
from tests.crossrep.snapshot_world import Changelog


def blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize("document", ["README.md", "docs/trainers.md", "docs/spaces.md"])
def test_it_does_what_it_says(document: str, bootstrap: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space, _ = new_space(bootstrap, tmp_path, partitions=4)
    log = Changelog(space, bootstrap)
    log.put("user", ["17", "4711", *range(100, 200)], 1)
    log.put("item", list(range(30)), 2)
    promote("current", space.name, bootstrap)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KAFKA_BOOTSTRAP", bootstrap)
    shown = blocks((ROOT / document).read_text())
    assert len(shown) > 1
    given = {name: np.ones((2, dim), np.float32) for name, dim in space.sources.items()}
    names: dict[str, Any] = {"torch": torch, "crossrep": crossrep, "ids": ["17", "4711"], "times": [1.7e9, 1.7e9], **given}
    views: list[crossrep.LocalView] = []
    monkeypatch.setattr(crossrep, "LocalView", lambda *args, **options: views.append(_View(*args, **options)) or views[-1])
    try:
        for block in shown:
            other = re.match(r"import (pandas|polars)\n", block)  # nothing here needs them: tried where they are installed
            if other and importlib.util.find_spec(other[1]) is None:
                continue
            exec(compile(block.replace("kuairand-v1", space.name), document, "exec"), names)
    finally:
        for view in views:
            view.close()


_View = crossrep.LocalView
