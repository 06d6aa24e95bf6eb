"""Events a second from the event topics to committed representations through one infer and one fold worker, and how fresh readers are."""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path

import click
import numpy as np
from confluent_kafka import TopicPartition

from benchmarks.common import Worker, cluster, committed, conditions, console, drain, in_process, report, space_of, worker
from benchmarks.infer import FIELDS, bare, dataset_of, declared, train
from crossrep import kafka
from crossrep.cli import bootstrap_option
from crossrep.errors import CrossrepError
from crossrep.spec import Space, fold_group, infer_group
from crossrep.views.view import LocalView
from models.datasets import Dataset
from streams.demo import freshness
from streams.demo.publish import publish_events, publish_features
from streams.proof.verify import unfolded


def echo(space: Space, bootstrap: str, messages: int = 200) -> list[float]:
    """Milliseconds from produce to consume of single messages on an idle topic of this Kafka: no event can be fresher than that."""
    topic = space.inference_topic  # nothing else uses it here
    client, producer = kafka.consumer(bootstrap), kafka.producer(bootstrap, **{"linger.ms": 1})
    client.assign([TopicPartition(topic, 0, 0)])
    took = []
    for _ in range(messages):
        started = time.perf_counter()
        producer.produce(topic, b"echo", partition=0)
        while (message := client.poll(0.001)) is None or message.error():
            if time.perf_counter() - started > 30:
                raise CrossrepError("Kafka does not echo")
        took.append(1000 * (time.perf_counter() - started))
        time.sleep(0.01)
    client.close()
    return took


def throughput(space: Space, bootstrap: str, infer: Worker, fold: Worker, events: int) -> dict[str, float]:
    """Everything is published: from the infer worker's assignment until it is all folded and committed."""
    started = infer.wait(lambda: infer.logged("assigned .+"), "infer is not assigned")
    cpu = infer.cpu(), fold.cpu()
    inputs = [space.inputs.impressions, space.inputs.clicks]
    infer.wait(committed(bootstrap, infer_group(space), inputs), "not all is inferred", every=0.1)
    inferred = time.time()
    fold.wait(committed(bootstrap, fold_group(space), [space.frames_topic], transactions=True), "not all is folded")
    ended = time.time()
    if unfolded(space, bootstrap):  # too slow to time with, but it looks at every frame
        raise CrossrepError("frames are left that the committed offsets do not show")
    seen = infer.metrics()
    return {
        "events_per_s": events / (ended - started),
        "infer_seconds": inferred - started,
        "seconds": ended - started,
        "infer_cpu_us_per_event": (infer.cpu() - cpu[0]) / events * 1e6,
        "fold_cpu_us_per_event": (fold.cpu() - cpu[1]) / events * 1e6,
        "events_per_batch": events / seen["infer_batches_total"][0],
        "rows_per_frame": seen["infer_rows_total"][0] / seen["infer_frames_total"][0],
        "infer_peak_rss_mb": infer.peak_rss() / 2**20,
        "fold_peak_rss_mb": fold.peak_rss() / 2**20,
    }


def load(dataset: Dataset, space: Space, bootstrap: str, rate: float, limit: int) -> int:
    """Publish at a rate, in a process of its own. Returns the events sent."""
    return publish_events(dataset, space.inputs, bootstrap, rate, limit).events


def fresh(
    dataset: Dataset, space: Space, bootstrap: str, rate: float, seconds: float, per_impression: float
) -> tuple[freshness.Freshness, int]:
    """Freshness under load, and the events the load had."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        limit = int(rate * (seconds + 4) / per_impression)  # the load begins before the probes and ends after them
        loaded = pool.apply_async(load, (dataset, space, bootstrap, rate, limit))
        time.sleep(3)
        measured = freshness.measure(space, bootstrap, seconds=seconds, items=list(dataset.item_ids[:100]))
        return measured, loaded.get(120)


def counted(space: Space, bootstrap: str, events: int) -> None:
    """Every entity's counts must add up to the events sent."""
    for entity in space.entities:
        with LocalView(entity, space.name, bootstrap) as view:
            view.wait(120)
            seen = int(view.get(view.ids()).counts.sum())
        if seen != events:
            raise CrossrepError(f"{events} events were sent, but the {entity}s count {seen}")


@click.command()
@click.option("--events", default=150_000, show_default=True, help="Simulated impressions; clicks come on top.")
@click.option("--users", default=20_000, show_default=True)
@click.option("--items", default=5_000, show_default=True)
@click.option("--fields", type=(int, int), default=FIELDS, show_default=True, help="Of a user and of an item; the default is KuaiRand's.")
@click.option("--partitions", type=int, help="Default: the demo space's.")
@click.option("--seconds", default=20.0, show_default=True, help="Of the freshness measurement.")
@click.option("--load", "loads", multiple=True, type=float, default=(0.5,), show_default=True, help="Of the throughput; may be repeated.")
@click.option("--max-batch", default=4096, show_default=True, help="Events a batch of the infer worker, at most.")
@click.option("--max-delay", default=0.02, show_default=True, help="Of the infer worker.")
@click.option("--seed", default=0, show_default=True)
@bootstrap_option
def main(
    events: int,
    users: int,
    items: int,
    fields: tuple[int, int],
    partitions: int | None,
    seconds: float,
    loads: tuple[float, ...],
    max_batch: int,
    max_delay: float,
    seed: int,
    bootstrap: str | None,
) -> None:
    """Simulated impressions and clicks through one infer and one fold worker.

    Throughput: everything is published first. Freshness: at shares of that rate, from just before produce() to visible in a LocalView.
    """
    about = {
        **conditions(),
        "impressions": events,
        "users": users,
        "items": items,
        "fields": fields,
        "max_batch": max_batch,
        "max_delay": max_delay,
    }
    dataset = dataset_of(events, users, items, fields, seed)
    with cluster(bootstrap) as address, tempfile.TemporaryDirectory() as folder:
        model = f"{folder}/model"
        console.print("training a small model", style="dim")
        in_process(train, model, users, items, fields, seed)
        forward = in_process(bare, model, "auto", max_batch)
        with space_of(declared(partitions), address) as space:
            idle = echo(space, address)
            publish_features(dataset, space.inputs, address)
            sent = publish_events(dataset, space.inputs, address)
            drained = in_process(drain, address, [space.inputs.impressions, space.inputs.clicks])
            common = ["--bootstrap", address, "--name", "bench"]
            with worker(Path(folder), "fold", space.name, *common, "--data", f"{folder}/fold") as fold:
                fold.wait(fold.ready, "fold is not ready")
                options = ["--max-batch", str(max_batch), "--max-delay", str(max_delay)]
                with worker(Path(folder), "infer", space.name, "--model", model, *common, *options) as infer:
                    through = throughput(space, address, infer, fold, sent.events)
                    rate = through["events_per_s"]
                    at: dict[float, freshness.Freshness] = {}
                    total = sent.events
                    for share in loads:
                        console.print(f"throughput: {rate:,.0f} events/s; now freshness at {share:.0%} of it", style="dim")
                        at[share], more = fresh(dataset, space, address, rate * share, seconds, sent.events / sent.impressions)
                        total += more + at[share].sent
                    infer.wait(
                        committed(address, infer_group(space), [space.inputs.impressions, space.inputs.clicks]), "not all is inferred"
                    )
                    fold.wait(lambda: not unfolded(space, address), "not all is folded")
                    counted(space, address, total)
                    infer.stop()
                fold.stop()
            flush = space.flush
    limit = sent.events / drained["seconds"]
    found = {share: tuple(measured.percentile(p) for p in (50, 90, 99)) for share, measured in at.items()}
    floor = statistics.median(idle)
    waits = 1000 * (max_delay + flush / 2)
    lines = [
        ("bare consumer of the events", f"{limit:,.0f} events/s", f"published at {sent.events / sent.seconds:,.0f} events/s"),
        ("model alone, one thread", f"{forward:,.0f} events/s", f"forward passes of {max_batch}"),
        (
            "events to committed state",
            f"{rate:,.0f} events/s",
            f"{rate / forward:.0%} of the model alone, {rate / limit:.1%} of the consumer",
        ),
        ("  infer's CPU", f"{through['infer_cpu_us_per_event']:.0f} µs an event", f"{through['events_per_batch']:.0f} events a batch"),
        (
            "  fold's CPU",
            f"{through['fold_cpu_us_per_event']:.1f} µs an event",
            f"{through['rows_per_frame']:.0f} rows a frame, before combining",
        ),
        *(
            (
                f"freshness at {share:.0%} load",
                f"p50 {p50:.0f}, p90 {p90:.0f}, p99 {p99:.0f} ms",
                f"{rate * share:,.0f} events/s, {at[share].sent} probes; Kafka alone, idle: {floor:.1f} ms",
            )
            for share, (p50, p90, p99) in found.items()
        ),
        ("  waits declared", f"{1000 * max_delay:.0f} ms a batch", f"{1000 * flush:.0f} ms a flush"),
        ("events counted", f"{total:,}", "exactly, of users and of items"),
    ]
    report(
        f"end to end: {sent.impressions:,} impressions and {sent.clicks:,} clicks",
        lines,
        {
            **about,
            "events": sent.events,
            **through,
            "bare_events_per_s": limit,
            "forward_events_per_s": forward,
            "ratio_to_forward": rate / forward,
            "ratio_to_bare": rate / limit,
            "freshness_ms": {f"{share}": [round(p) for p in percentiles] for share, percentiles in found.items()},
            "kafka_echo_p50_ms": floor,
            "kafka_echo_p99_ms": float(np.percentile(idle, 99)),
            "mean_wait_declared_ms": waits,
            "events_counted": total,
        },
    )


if __name__ == "__main__":
    main()
