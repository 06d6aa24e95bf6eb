"""The commands that docs/serve.md and the README's part on it show are run, in their order, on a space with users and items."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

from served import Records, Server

from tests.cluster import ROOT, Workers, new_space


def shown(text: str) -> list[str]:
    """The indented lines that begin with `curl`."""
    return [line.strip() for line in text.splitlines() if re.match(r"    curl ", line)]


def test_they_do_what_they_say(bootstrap: str, tmp_path: Path, workers: Workers) -> None:
    space, _ = new_space(bootstrap, tmp_path)
    for entity in space.entities:
        Records(space, bootstrap, entity).put([f"{entity[0]}{i}" for i in range(60)])
    server = Server(workers, space, tmp_path / "disk")
    server.wait()
    readme = (ROOT / "README.md").read_text().partition("**Serve**")[2].partition("**Analyse**")[0]
    docs = (ROOT / "docs" / "serve.md").read_text().partition("## What it answers")[0]
    assert "crossrep serve kuairand-v1 &" in readme and "crossrep serve kuairand-v1 &" in docs
    commands = shown(readme) + shown(docs)
    assert len(commands) > 7
    for command in commands:
        here = command.replace("localhost:8080", f"127.0.0.1:{server.port}")
        done = subprocess.run(here.replace("curl ", "curl -sf ", 1), shell=True, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        assert json.loads(done.stdout).get("id", "u31") in ("u31", "i23")
    python = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "serve.md").read_text(), re.DOTALL)
    assert python
    names: dict[str, Any] = {}
    exec(python[1].replace("localhost:8080", f"127.0.0.1:{server.port}"), names)
    assert names["users"]["found"].tolist() == [True, False] and names["users"]["cr.vector"].shape == (2, 8)
