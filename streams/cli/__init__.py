"""The workers' and the operators' commands. Each imports what it needs when it runs: `--help` is quick, and missing extras hurt only who
needs them."""

from streams.cli import operations, kafka, workers, demo  # noqa: F401, I001  each adds its commands to those of crossrep, in this order
