"""The workers' and the operators' commands. Each imports what it needs when it runs: `--help` is quick, and missing extras hurt only who
needs them."""

from streams.cli import demo, kafka, operations, workers  # noqa: F401  each adds its commands to those of crossrep/cli
