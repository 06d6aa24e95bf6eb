"""docs/spaces.md's way from one space to the next and back, command by command, beside running workers and a replica."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import urllib.request
from pathlib import Path

import pytest
from click.testing import CliRunner

import streams.cli  # noqa: F401  adds the workers' commands
from crossrep.cli import cli
from streams import broker
from tests.cluster import ROOT, Workers, free_port, ready, wait_for

SMALL = ["--events", "4000", "--users", "200", "--items", "100"]  # so that a test has the time


def space_of(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/user/u31", timeout=10) as answer:
        return str(json.load(answer)["space"])


def test_every_command_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: Workers) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KAFKA_BOOTSTRAP", raising=False)
    monkeypatch.setenv("CROSSREP_HOME", str(workers.folder / "home"))
    (tmp_path / "spaces").symlink_to(ROOT / "spaces")
    shown = (ROOT / "docs" / "spaces.md").read_text().partition("in ten minutes")[2].partition("## Reading")[0]
    lines = [line for line in shown.splitlines() if re.match("    (crossrep|sed|curl) ", line)]
    assert len(lines) > 20
    ports, said, served, current = [], "", free_port(), ""
    try:
        for line in lines:
            program, *words = shlex.split(line, comments=True)
            if program == "sed":
                subprocess.run(line, shell=True, check=True)
            elif program == "curl":
                wait_for(lambda current=current: space_of(served) == current, f"it answers from {current}")  # type: ignore[misc]
            elif words[-1] == "&":
                words = [str(tmp_path / word) if word.startswith("model") else word for word in words[:-1]]
                port = served if words[0] == "serve" else free_port()
                workers.start(*words, "--port", str(port), *(["--session-timeout", "3"] if words[0] != "serve" else []))
                ports.append(port)
                wait_for(lambda: all(map(ready, ports)), f"{' '.join(words)} is ready")
            else:
                words += SMALL[2 if "--events" in words else 0 :] if words[0] in ("simulate", "train") else []
                if words[:2] == ["space", "retire"]:
                    for process in (workers.running[number] for number in (0, 1)):
                        process.terminate()
                        process.wait(20)
                    wait_for(lambda words=words: CliRunner().invoke(cli, words, input="n\n").exit_code == 0, "their sessions end")  # type: ignore[misc]
                done = CliRunner().invoke(cli, words, input="y\n")
                assert done.exit_code == 0, (words, done.output, done.exception, workers.logs())
                said += done.output
                current = words[2] if words[:2] == ["space", "promote"] else current
        assert "same neighbours" in said and "deleted 8 topics" in said and space_of(served) == current == "kuairand-v2"
    finally:
        broker.down(workers.folder / "home" / "kafka", kill=True)
