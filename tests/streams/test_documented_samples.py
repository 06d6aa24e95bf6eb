"""Every command and Python block of docs/samples.md is run, in their order: from events to training samples that a check finds clean."""

from __future__ import annotations

import re
import shlex
import socket
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import streams.cli  # noqa: F401  adds the workers' commands
from crossrep import kafka
from crossrep.cli import cli
from crossrep.control.workers import standings
from crossrep.training.sets import TrainingSets
from tests.cluster import ROOT, Workers, free_port, new_space, wait_for
from tests.streams.small_model import SPEC, consumed, inferred, small_model
from tests.streams.stateful.test_samples import written

SMALL = ["--events", "3000", "--users", "100", "--items", "50"]  # over two weeks: all but the last half hour's windows are over


def test_they_do_what_they_say(bootstrap: str, workers: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space, path = new_space(bootstrap, tmp_path, SPEC, partitions=2)
    text = (ROOT / "docs" / "samples.md").read_text()
    shown = [shlex.split(line, comments=True) for line in text.splitlines() if re.match("    crossrep ", line)]
    assert len(shown) == 13
    monkeypatch.setenv("CROSSREP_HOME", str(workers.folder / "home"))
    replaced = {"kuairand-v1": space.name, "spaces/kuairand-v1.toml": str(path), "model": str(small_model())}
    for _, *words in shown:
        words = [replaced.get(word, word) for word in words]
        if words[-1] == "&":
            workers.start(*words[:-1], *([] if "--follow" in words else ["--port", str(free_port()), "--session-timeout", "3"]))
            continue
        if words[0] == "archive":
            wait_for(lambda: inferred(space, bootstrap), "all events inferred")
            wait_for(lambda: sum(map(len, written(space, bootstrap).values())) > 2900, "samples")
        done = CliRunner().invoke(cli, [*words, *(SMALL if words[0] == "simulate" else [])], env={"KAFKA_BOOTSTRAP": bootstrap})
        assert done.exit_code == 0, (words, done.output, done.exception, workers.logs())
        if words[0] == "leaks":
            assert "0 know the future, 0 are wrong otherwise" in done.output
    assert not any(end for _, end in kafka.bounds(bootstrap, space.dead_letters_topic).values())  # at full speed nothing comes too late
    day, whole = (manifest.rows for manifest in reversed(TrainingSets(None, space.name).published()))
    assert 0 < day < whole and 2900 < whole <= 3000
    assert not consumed([space.inputs.impressions], f"samples.{space.name}", bootstrap)  # what is needed again counts as lag
    wait_for(lambda: not standings(space, bootstrap)["samples"].lag, "all is joined: that is what space show says")
    listed = CliRunner().invoke(cli, ["space", "show", space.name], env={"KAFKA_BOOTSTRAP": bootstrap}).output
    assert re.search(rf"samples +{socket.gethostname()} +0 *\n", listed), listed

    monkeypatch.setenv("KAFKA_BOOTSTRAP", bootstrap)
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block.replace("kuairand-v1", space.name), "docs/samples.md", "exec"), names)
    assert names["user"]["cr"].vectors.shape[1] == 64 and len(names["last"]) == whole
    wait_for(lambda: workers.logs().count(f"0 samples to {space.training_topic}") == 1, "the one that follows has found all published")
