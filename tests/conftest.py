"""One real Kafka for the whole session; `cluster.py` has what tests do with it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from crossrep.spec import Space
from tests import cluster

settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci")


@pytest.fixture(scope="session")
def bootstrap(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The cluster to test on: KAFKA_BOOTSTRAP, or a broker of the session's own."""
    if "KAFKA_BOOTSTRAP" in os.environ:
        yield os.environ["KAFKA_BOOTSTRAP"]
        return
    from streams import broker

    folder = tmp_path_factory.mktemp("kafka")
    running = broker.up(folder, progress=False)
    os.environ["KAFKA_BOOTSTRAP"] = running.bootstrap  # for the processes that tests start
    yield running.bootstrap
    del os.environ["KAFKA_BOOTSTRAP"]
    broker.down(folder, kill=True)


@pytest.fixture
def space(bootstrap: str, tmp_path: Path) -> Space:
    """A published space of cluster.SPEC, with topics of its own."""
    return cluster.new_space(bootstrap, tmp_path)[0]


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[cluster.Workers]:
    """Starts worker processes; whatever still runs at the test's end is killed."""
    started = cluster.Workers(tmp_path)
    yield started
    started.kill_all()
