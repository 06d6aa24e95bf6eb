"""The headline in minutes: our fold, Kafka Streams given records and given our frames, and the limits, on the same rows in one run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from confluent_kafka.admin import NewTopic

from benchmarks import fold
from benchmarks.common import cluster, conditions, drain, in_process, middle, report, space_of
from benchmarks.peers import engines, workload
from benchmarks.peers.workload import PARTITIONS, Load
from crossrep import kafka
from crossrep.cli import bootstrap_option
from crossrep.columnar.records import RecordLayout

FRAMES = ("kafka-streams-frames-best", "kafka-streams-heap-200ms", "kafka-streams-heap-1s")
RECORDS = ("kafka-streams-once", "kafka-streams-once-best")
MOST = {"kafka-streams-once": 1_000_000}  # 130,000 rows/s: more would take minutes and say the same

Figures = dict[str, dict[str, float]]


def compare(bootstrap: str, load: Load, flush: str, peers: bool) -> Figures:
    """Everybody once, on the same frames, and on records of the same rows: name -> figures."""
    found: Figures = {}
    with space_of(fold.declared(PARTITIONS, flush), bootstrap) as space:
        fold.preload(space, bootstrap, load.rows, load.users, load.zipf, load.rows_per_frame, load.seed)
        found["crossrep"] = fold.fold(space, bootstrap, load.rows)
        found["bare consumer"] = _limit(load, in_process(drain, bootstrap, [space.frames_topic]))
        records = int(found["crossrep"]["records_per_million"] * load.rows / 1e6)
        with _scratch(bootstrap) as sink:
            drained = in_process(drain, bootstrap, [space.frames_topic], sink, records, RecordLayout(space, "user").size)
        found["bare consumer, and as many records written"] = _limit(load, drained)
        for name in FRAMES if peers else ():
            found[name] = engines.run(name, bootstrap, load.rows, space.frames_topic)
    if not peers:
        return found
    names = [name for name in RECORDS if load.rows <= MOST.get(name, load.rows)]
    with engines.topic_for(names[0], bootstrap, load) as topic:
        found["bare consumer of records"] = _limit(load, in_process(drain, bootstrap, [topic]))
        for name in names:
            found[name] = engines.run(name, bootstrap, load.rows, topic)
    return found


def _limit(load: Load, drained: dict[str, float]) -> dict[str, float]:
    return {"rows_per_s": load.rows / drained["seconds"], "cpu_seconds_per_million": drained["cpu"] / load.rows * 1e6}


@contextmanager
def _scratch(bootstrap: str) -> Iterator[str]:
    topic, admin = workload.unique("sink"), kafka.admin(bootstrap)
    admin.create_topics([NewTopic(topic, PARTITIONS)])[topic].result(kafka.REQUEST_TIMEOUT)
    try:
        yield topic
    finally:
        workload.delete(bootstrap, [topic])


@click.command()
@click.option("--rows", multiple=True, type=int, default=(1_000_000, 5_000_000), show_default=True, help="May be repeated.")
@click.option("--users", default=100_000, show_default=True)
@click.option("--zipf", default=1.2, show_default=True, help="Exponent of the users' activity; 0: all alike.")
@click.option("--rows-per-frame", default=1024, show_default=True)
@click.option("--flush", default="200ms", show_default=True, help="Our flush interval.")
@click.option("--runs", default=1, show_default=True, help="Medians are reported.")
@click.option("--peers/--no-peers", default=True, show_default=True, help="Kafka Streams too, or the limits alone.")
@click.option("--seed", default=0, show_default=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="A JSON file for all figures; benchmarks.plots draws it.")
@bootstrap_option
def main(
    rows: tuple[int, ...],
    users: int,
    zipf: float,
    rows_per_frame: int,
    flush: str,
    runs: int,
    peers: bool,
    seed: int,
    out: Path | None,
    bootstrap: str | None,
) -> None:
    """Fold the same rows by crossrep and by Kafka Streams, alternating, beside a bare consumer. Under five minutes.

    crossrep and its peers run exactly once, each with an empty disk, from the first row until everything is flushed and committed; every
    run is checked to count every row. How the peers are tuned: benchmarks/peers.
    """
    for name in (*FRAMES, *RECORDS) if peers else ():
        engines.prepare(name)
    about = {**conditions(), "users": users, "zipf": zipf, "rows_per_frame": rows_per_frame, "flush": flush, "runs": runs}
    headline: dict[str, Any] = {}
    figures: dict[str, Any] = {}
    with cluster(bootstrap) as address:
        fold.warm_up(address)
        for n in rows:
            load = Load(n, users, zipf, seed, rows_per_frame)
            every = [compare(address, load, flush, peers) for _ in range(runs)]
            medians = {name: middle([run[name] for run in every]) for name in every[0]}
            ours = medians["crossrep"]
            figures[f"{n}"] = {"engines": medians}
            title = f"{n:,} rows, {users:,} users, Zipf {zipf}: median of {runs}"
            report(title, [_line(name, one, ours) for name, one in medians.items()], None)
            times = {name: round(ours["rows_per_s"] / one["rows_per_s"], 3) for name, one in medians.items() if one is not ours}
            cpu = round(ours["cpu_seconds_per_million"], 2)
            headline[f"{n}"] = {"rows_per_s": round(ours["rows_per_s"]), "cpu_us_per_row": cpu, "times": times}
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({**about, **figures}, indent=1) + "\n")
    click.echo(json.dumps({**about, **headline}))


def _line(name: str, one: dict[str, float], ours: dict[str, float]) -> tuple[str, str, str]:
    records = f", {one['records_per_million']:,.0f} changelog records a million" if "records_per_million" in one else ""
    beside = "" if one is ours else f"crossrep is {ours['rows_per_s'] / one['rows_per_s']:.2f} times as fast; "
    about = f" ({engines.PEERS[name]})" if name in engines.PEERS else ""
    return name, f"{one['rows_per_s']:,.0f} rows/s", f"{beside}{one['cpu_seconds_per_million']:.2f} us CPU a row{records}{about}"


if __name__ == "__main__":
    main()
