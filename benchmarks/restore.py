"""Records a second that a fold worker restores to an empty disk, beside a bare consumer; and its restart with a full disk."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import click
import numpy as np

from benchmarks.common import cluster, conditions, console, drain, in_process, middle, report, space_of, worker
from benchmarks.fold import BATCH, DIM, declared
from crossrep import kafka
from crossrep.cli import bootstrap_option
from crossrep.columnar.records import RecordLayout
from crossrep.errors import CrossrepError
from crossrep.keys import Keys
from crossrep.spec import Space


def fill(space: Space, bootstrap: str, records: int, seed: int) -> None:
    """Write one record a key to the representation topic, in one transaction a batch, as flushes do."""
    layout, random = RecordLayout(space, "user"), np.random.default_rng(seed)
    topic = space.representations_topic("user")
    pool = random.normal(size=(BATCH, DIM)).astype(np.float32)
    producer = kafka.transactional_producer(bootstrap, f"bench.{space.name}", 60.0)
    producer.init_transactions(kafka.REQUEST_TIMEOUT)
    for first in range(0, records, BATCH):
        n = min(BATCH, records - first)
        keys = Keys.of(range(first, first + n))
        batch = layout.empty(n)
        batch["count"], batch["event_time"], batch["source_offset"] = 1, 1.6e9, -1
        batch["cr_weight"], batch["cr_time"], batch["cr"] = 1, 1.6e9, pool[:n]
        blob, size = batch.tobytes(), layout.size
        producer.begin_transaction()
        for i, (key, partition) in enumerate(zip(keys.tolist(), keys.partitions(space.partitions).tolist())):
            producer.produce(topic, blob[i * size : (i + 1) * size], key, partition)
        producer.commit_transaction()


def start(space: Space, bootstrap: str, folder: str, expected: int) -> dict[str, float]:
    """Start a worker on this folder, wait until it is ready, stop it. All partitions are taken over at once."""
    with worker(Path(folder), "fold", space.name, "--bootstrap", bootstrap, "--name", "bench", "--data", f"{folder}/data") as process:
        process.wait(process.ready, "not ready")
        ready = time.time() - process.started
        metrics = process.metrics()
        cpu = process.cpu()
        process.stop()
    restored = sum(metrics["fold_restored_records"])
    if restored < expected:
        raise CrossrepError(f"{expected} records were written, but {restored:.0f} restored")
    seconds = max(metrics["fold_restore_seconds"])
    return {"seconds": seconds, "records": restored, "ready_seconds": ready, "cpu": cpu}


@click.command()
@click.option("--records", default=500_000, show_default=True, help="Keys with a record each.")
@click.option("--partitions", default=4, show_default=True)
@click.option("--runs", default=3, show_default=True, help="Medians are reported.")
@click.option("--seed", default=0, show_default=True)
@bootstrap_option
def main(records: int, partitions: int, runs: int, seed: int, bootstrap: str | None) -> None:
    """Restore a space of one record a key (64 float32) with one worker, alternating with a bare consumer of the same topic.

    Restoring is timed from the assignment until the last partition's state is on disk and it may flow; all partitions restore at once.
    """
    about = {**conditions(), "records": records, "partitions": partitions, "runs": runs}
    drained, cold, warm = [], [], []
    with cluster(bootstrap) as address, space_of(declared(partitions, "200ms"), address) as space:
        fill(space, address, records, seed)
        for run in range(runs):
            drained.append(in_process(drain, address, [space.representations_topic("user")]))
            with tempfile.TemporaryDirectory() as folder:
                cold.append(start(space, address, folder, records))
                warm.append(start(space, address, folder, 0))
            console.print(
                f"run {run + 1}: {records / cold[-1]['seconds']:,.0f} records/s; bare {records / drained[-1]['seconds']:,.0f}", style="dim"
            )
    bare, empty, full = middle(drained), middle(cold), middle(warm)
    rate, limit = records / empty["seconds"], records / bare["seconds"]
    startup = full["ready_seconds"] - full["seconds"]
    lines = [
        ("bare consumer", f"{limit:,.0f} records/s", f"{bare['bytes'] / bare['seconds'] / 1e6:,.0f} MB/s"),
        ("restore, empty disk", f"{rate:,.0f} records/s", f"{rate / limit:.0%} of the bare consumer"),
        ("  from assignment", f"{empty['seconds']:.2f} s", f"{records:,} records in {partitions} partitions at once"),
        ("  from process start to ready", f"{empty['ready_seconds']:.1f} s", f"{startup:.1f} s are the process and the group"),
        ("restart, full disk", f"{full['seconds']:.2f} s", f"{full['records']:.0f} records read"),
        (
            "  from process start to ready",
            f"{full['ready_seconds']:.1f} s",
            f"{full['ready_seconds'] / empty['ready_seconds']:.0%} of the empty disk's",
        ),
    ]
    report(
        f"restore: {records:,} records, median of {runs}",
        lines,
        {
            **about,
            "records_per_s": rate,
            "bare_records_per_s": limit,
            "ratio_to_bare": rate / limit,
            **{f"empty_disk_{name}": value for name, value in empty.items()},
            **{f"full_disk_{name}": value for name, value in full.items()},
            "every_run_records_per_s": [round(records / run["seconds"]) for run in cold],
        },
    )


if __name__ == "__main__":
    main()
