"""Runs in processes: what a study leaves behind when it is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

STUDY = """
import sys
import time
from pathlib import Path

from rich.console import Console

from study.runs import in_processes


def work(folder):
    import os
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(600)


if __name__ == "__main__":
    list(in_processes("asleep", work, [sys.argv[1]] * 2, 2, Console(quiet=True)))
"""


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_processes_end_with_the_study(tmp_path: Path, how: signal.Signals) -> None:
    (script := tmp_path / "asleep.py").write_text(STUDY)
    (folder := tmp_path / "pids").mkdir()
    with subprocess.Popen([sys.executable, script, folder], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}) as study:
        until = time.monotonic() + 60
        while len(workers := [int(file.name) for file in folder.iterdir()]) < 2 and time.monotonic() < until:
            time.sleep(0.1)
        assert len(workers) == 2 and all(map(psutil.pid_exists, workers))
        study.send_signal(how)
    while any(map(psutil.pid_exists, workers)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(map(psutil.pid_exists, workers))
