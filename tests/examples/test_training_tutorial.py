"""docs/training.md, command by command, on simulated events: the trainer's commands are run, the workers' are parsed (others run them)."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

import streams.cli  # noqa: F401  adds the workers' and the trainers' commands
from crossrep.cli import cli
from crossrep.spec import Space
from models.datasets.simulator import simulate
from tests.cluster import ROOT
from tests.models.test_labelled_samples import rows

WORLD = {"events": 6_000, "users": 300, "items": 150}
SMALL = [word for name, number in WORLD.items() for word in (f"--{name}", str(number))]
DAYS = {"2022-05-02": "2024-01-09", "2022-05-05": "2024-01-12"}
PARSED = ("fold", "infer", "publish")
ELSEWHERE = ("samples", "archive", "training-set")  # shown here, run where they are documented


def test_every_command_does_what_it_says(bootstrap: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stem = f"t{os.getpid()}-tutorial"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CROSSREP_HOME", str(tmp_path / "home"))
    (tmp_path / "spaces").mkdir()
    spec = (ROOT / "spaces" / "kuairand-v1.toml").read_text().replace("kuairand-v1", f"{stem}-v1")
    (tmp_path / "spaces" / f"{stem}-v1.toml").write_text(spec)
    (tmp_path / "training-sets").mkdir()
    pq.write_table(pa.table(rows(simulate(**WORLD))), tmp_path / "training-sets" / "some.parquet")  # type: ignore[arg-type]
    text = (ROOT / "docs" / "training.md").read_text().replace("kuairand-v", f"{stem}-v")
    text = text.replace("train kuairand DIR", f"train simulated {shlex.join(SMALL)}").replace(" DIR ", f" {tmp_path} ")
    shown = [shlex.split(line, comments=True) for line in text.splitlines() if re.match(r"    (crossrep|export) ", line)]
    assert len(shown) > 15
    said: list[str] = []
    for words in shown:
        words = [DAYS.get(word, word) for word in words if word != "&"]
        if words[0] == "export":
            monkeypatch.setenv(*words[1].split("="))
        elif words[1] in PARSED:
            cli.commands[words[1]].make_context(words[1], words[2:])  # raises click.UsageError if there is no such option
        elif words[1] not in ELSEWHERE:
            done = CliRunner().invoke(cli, words[1:], env={"KAFKA_BOOTSTRAP": bootstrap})
            assert done.exit_code == 0, (words, done.output, done.exception)
            said.append(done.output)
    whole = "".join(said)
    assert "gate: registered as kuairand@1, the first version" in whole and whole.count("gate: ") == 3
    assert (tmp_path / "auc.svg").stat().st_size > 1000 and (tmp_path / "model" / "weights.safetensors").exists()
    new = Space.load(tmp_path / "spaces" / f"{stem}-v2.toml")
    assert new.toml_dict == {**Space.load(tmp_path / "spaces" / f"{stem}-v1.toml").toml_dict, "name": f"{stem}-v2"}
