"""The workers' and the operators' commands. Each imports what it needs when it runs: `--help` is quick, and missing extras hurt only who
needs them."""

# Each adds its commands to those of crossrep/cli, and `--help` lists them in this order.
# isort: off
import models.cli  # noqa: F401
from streams.cli import operations, kafka, workers, demo  # noqa: F401
