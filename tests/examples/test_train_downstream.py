"""The example learns beside real workers."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from rich.console import Console

from crossrep import LocalView
from examples import train_downstream
from tests.cluster import Workers, free_port, new_space, prove, ready, settled, wait_for
from tests.streams.small_model import SPEC, inferred, small_dataset, start_infer


def test_it_learns_while_the_stream_runs(bootstrap: str, tmp_path: Path, workers: Workers) -> None:
    space, path = new_space(bootstrap, tmp_path, SPEC, partitions=2)
    ports = free_port(), free_port()
    workers.fold(path, port=ports[0])
    start_infer(workers, path, port=ports[1])
    wait_for(lambda: all(map(ready, ports)), "the workers are ready")
    dataset, said = small_dataset(20_000), io.StringIO()
    found = train_downstream.run(dataset, space.name, bootstrap, Console(file=said, width=120), rate=2_000.0, limit=8_000)
    print(said.getvalue())
    assert set(found) == {"ids", "representations"} and all(0.4 < value < 1 for value in found.values())
    assert "with representations" in said.getvalue() and "5,000" in said.getvalue()
    wait_for(lambda: inferred(space, bootstrap) and settled(space, bootstrap), "all is folded")
    prove(space, bootstrap)
    with LocalView("user", space.name, bootstrap) as users:
        users.wait(60)
        (run,) = dataset.impressions()
        past, later = next(train_downstream.split(dataset))
        assert len(past) + len(later) == len(run) == 20_000
        published = np.concatenate([past.clicked, later.clicked[:8_000]])
        assert users.get(users.ids()).counts.sum() == len(published) + published.sum()
