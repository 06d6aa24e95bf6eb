"""The `crossrep` command: what readers need is here; the workers' and the replica's commands join in where their code is (`streams/cli.py`, `models/cli.py`,
`serve/cli.py`, `study/cli.py`)."""

from crossrep.cli import archive, snapshots, spaces, training  # noqa: F401  each adds its commands to those of app.py
from crossrep.cli.app import bootstrap_option, cli, console, main, resolve, space_option

__all__ = ["bootstrap_option", "cli", "console", "main", "resolve", "space_option"]
