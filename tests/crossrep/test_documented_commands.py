"""Every command that docs/snapshots.md, docs/archive.md and the README's part on snapshots show is run, in their order."""

from __future__ import annotations

import re
import shlex
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import streams.cli  # noqa: F401  adds the workers' commands
from crossrep import kafka
from crossrep.cli import cli
from tests.cluster import ROOT, SPEC, Load, new_space
from tests.crossrep.snapshot_world import Changelog


def commands(text: str) -> list[list[str]]:
    """The indented lines that begin with `crossrep` or `export`, as words."""
    return [shlex.split(line, comments=True) for line in text.splitlines() if re.match(r"    (crossrep|export) ", line)]


def test_they_do_what_they_say(bootstrap: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space, _ = new_space(bootstrap, tmp_path, partitions=2)
    log = Changelog(space, bootstrap)
    log.put("user", list(range(30)), 1)
    log.put("item", list(range(30)), 2)
    second = f"{space.name}-2"
    (tmp_path / "spaces").mkdir()
    (tmp_path / "spaces" / f"{second}.toml").write_text(SPEC.format(name=second, partitions=3))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CROSSREP_HOME", str(tmp_path))
    readme = (ROOT / "README.md").read_text().partition("**Analyse**")[2].partition("**Write**")[0]
    shown = commands(readme) + commands((ROOT / "docs" / "snapshots.md").read_text())
    assert len(shown) > 8
    run_all(shown, space.name, bootstrap, monkeypatch)
    assert (tmp_path / "users.csv").read_text().count("\n") == 31


def run_all(shown: list[list[str]], name: str, bootstrap: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for words in shown:
        words = [re.sub(r"kuairand-v([23])", rf"{name}-\1", word).replace("kuairand-v1", name) for word in words]
        words = [re.sub(r"^\d{4}-\d\d-\d\dT[\d:]{8}$", f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S}", word) for word in words]
        if words[0] == "export":
            monkeypatch.setenv(*words[1].split("="))
            continue
        done = CliRunner().invoke(cli, words[1:], env={"KAFKA_BOOTSTRAP": bootstrap})
        assert done.exit_code == 0, (words, done.output, done.exception)


def test_those_of_the_archive(bootstrap: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space, _ = new_space(bootstrap, tmp_path, partitions=2)
    Load(space, bootstrap).send(300)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CROSSREP_HOME", str(tmp_path))
    (tmp_path / "spaces").mkdir()
    for name in (f"{space.name}-2", f"{space.name}-3"):
        text = SPEC.replace('half_life = "1h"', 'half_life = "2h"').format(name=name, partitions=3)
        (tmp_path / "spaces" / f"{name}.toml").write_text(text)
    text = (ROOT / "docs" / "archive.md").read_text()
    shown = commands(text)
    assert len(shown) > 6
    run_all(shown, space.name, bootstrap, monkeypatch)
    for name in (f"{space.name}-2", f"{space.name}-3"):
        assert sum(end for _, end in kafka.bounds(bootstrap, f"frames.{name}").values()) > 0
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    exec(block.replace("kuairand-v1", space.name), names)
    assert names["run"].rows.entity == "user"
