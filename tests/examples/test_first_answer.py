"""README.md's way from nothing to a first answer, command by command, and docs/trainers.md's example, beside the same workers."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

import streams.cli  # noqa: F401  adds the workers' commands
from crossrep.cli import cli
from examples import train_downstream
from streams import broker
from tests.cluster import ROOT, Workers, free_port, ready, wait_for

SMALL = ["--events", "6000", "--users", "300", "--items", "150"]  # so that a test has the time


def test_every_command_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: Workers) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KAFKA_BOOTSTRAP", raising=False)
    monkeypatch.setenv("CROSSREP_HOME", str(workers.folder / "home"))
    (tmp_path / "spaces").symlink_to(ROOT / "spaces")
    shown = (ROOT / "README.md").read_text().partition("first answer in five minutes")[2].partition("**Read**")[0]
    commands = [shlex.split(line, comments=True)[1:] for line in shown.splitlines() if re.match("    crossrep ", line)]
    assert len(commands) > 10
    said, ports = "", []
    try:
        for words in commands:
            if words[-1] == "&":
                ports.append(free_port())
                words = [str(tmp_path / word) if word == "model" else word for word in words[:-1]]
                workers.start(*words, "--port", str(ports[-1]), "--session-timeout", "3")
                continue
            if words[0] == "rewind":
                workers.kill_all()
                wait_for(lambda words=words: CliRunner().invoke(cli, words).exit_code == 0, "their sessions end", every=0.5)  # type: ignore[misc]
            elif words[0] == "simulate" or words[:2] == ["train", "simulated"]:
                words = [*words, *SMALL]
            elif words[0] == "verify":
                learnt = CliRunner().invoke(train_downstream.main, ["--space", "kuairand-v1", *SMALL, "--rate", "2000"])
                assert learnt.exit_code == 0, (learnt.output, learnt.exception)
                auc = re.search(r"AUC over all: ids 0\.\d+, representations 0\.\d+", learnt.output)
                assert auc and "2,000  " in learnt.output and "impressions and" in learnt.output
            elif words[0] == "get":
                wait_for(lambda: all(map(ready, ports)), "the workers are ready")
                wait_for(lambda words=words: CliRunner().invoke(cli, words).exit_code == 0, "the user is there", every=0.5)  # type: ignore[misc]
            done = CliRunner().invoke(cli, words, input="y\n")
            assert done.exit_code == 0, (words, done.output, done.exception)
            said += done.output
        assert "u31" in said and "cosine of cr" in said
    finally:
        broker.down(workers.folder / "home" / "kafka", kill=True)
