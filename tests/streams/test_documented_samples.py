"""Every command of docs/samples.md is run, in their order: from events to a training set that a check finds clean."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

import streams.cli  # noqa: F401  adds the workers' commands
from crossrep import kafka
from crossrep.cli import cli
from crossrep.training_sets import TrainingSets
from tests.cluster import ROOT, Workers, free_port, new_space, wait_for
from tests.streams.small_model import SPEC, consumed, inferred, small_model
from tests.streams.test_samples import written

SMALL = ["--events", "3000", "--users", "100", "--items", "50"]  # over two weeks: all but the last half hour's windows are over


def test_they_do_what_they_say(bootstrap: str, workers: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space, path = new_space(bootstrap, tmp_path, SPEC, partitions=2)
    shown = [
        shlex.split(line, comments=True)
        for line in (ROOT / "docs" / "samples.md").read_text().splitlines()
        if re.match("    crossrep ", line)
    ]
    assert len(shown) == 9
    monkeypatch.setenv("CROSSREP_HOME", str(workers.folder / "home"))
    replaced = {"kuairand-v1": space.name, "spaces/kuairand-v1.toml": str(path), "model": str(small_model())}
    for _, *words in shown:
        words = [replaced.get(word, word) for word in words]
        if words[-1] == "&":
            workers.start(*words[:-1], "--port", str(free_port()), "--session-timeout", "3")
            continue
        if words[0] == "archive":
            wait_for(lambda: inferred(space, bootstrap), "all events inferred")
            wait_for(lambda: sum(map(len, written(space, bootstrap).values())) > 2900, "samples")
        done = CliRunner().invoke(cli, [*words, *(SMALL if words[0] == "simulate" else [])], env={"KAFKA_BOOTSTRAP": bootstrap})
        assert done.exit_code == 0, (words, done.output, done.exception, workers.logs())
    assert "0 know the future, 0 are wrong otherwise" in done.output
    assert not any(end for _, end in kafka.bounds(bootstrap, space.dead_letters_topic).values())  # at full speed nothing comes too late
    day, whole = (manifest.rows for manifest in reversed(TrainingSets(None, space.name).published()))
    assert 0 < day < whole and 2900 < whole <= 3000
    assert not consumed([space.inputs.impressions], f"samples.{space.name}", bootstrap)  # what is needed again counts as lag
