"""The folders' contracts, and that every command explains itself."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import serve.cli  # noqa: F401  adds the replica's command
import streams.cli  # noqa: F401  adds the workers' commands
import study.cli  # noqa: F401  adds the studies' commands
from crossrep.cli import cli

ROOT = Path(__file__).parents[1]


def commands(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    if isinstance(command, click.Group):
        for name, child in command.commands.items():
            yield from commands(child, (*path, name))


def test_imports_keep_the_contracts() -> None:
    lint = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = subprocess.run([sys.executable, "-c", lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kept, 0 broken" in done.stdout


@pytest.mark.parametrize("path", list(commands(cli)), ids=" ".join)
def test_every_command_explains_itself(path: tuple[str, ...]) -> None:
    shown = CliRunner().invoke(cli, [*path, "--help"])
    assert shown.exit_code == 0, shown.output
    command: click.Command = cli
    for name in path:
        assert isinstance(command, click.Group)
        command = command.commands[name]
    assert (command.help or "").strip(), "no help text"
    assert "Usage:" in shown.output and len(shown.output.splitlines()) > 4
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.opts[-1] in shown.output


def test_the_help_lists_only_commands_that_exist() -> None:
    names = {path[0] for path in commands(cli) if path}
    for line in (cli.help or "").splitlines():
        words = line.split()
        if words[:1] == ["crossrep"]:
            assert words[1] in names, line
