"""The `crossrep` command: what readers need is here. The commands of models, workers, replicas and studies join in where their code is
(`models/cli.py`, `streams/cli/`, `serve/cli.py`, `study/cli.py`)."""

from crossrep.cli import snapshots, archive, training, spaces  # noqa: F401, I001  each adds its commands to those of app.py, in this order
from crossrep.cli.app import bootstrap_option, cli, console, main, resolve, space_option

__all__ = ["bootstrap_option", "cli", "console", "main", "resolve", "space_option"]
