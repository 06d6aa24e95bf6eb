"""Events a second through one infer worker, beside the same model in a bare loop over prepared batches."""

from __future__ import annotations

import tempfile
import time
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.common import ROOT, cluster, committed, conditions, console, drain, in_process, report, space_of, worker
from crossrep.cli import bootstrap_option
from crossrep.errors import CrossrepError
from crossrep.spec import infer_group
from models import upstream
from models.datasets import Dataset, simulator
from streams.demo.publish import publish_events, publish_features

FIELDS = (30, 11)  # of a user and of an item, as many as KuaiRand has


def widened(dataset: Dataset, user: int, item: int, seed: int) -> Dataset:
    """The same with more features, so many for a user and for an item: 16 random values each."""
    rng = np.random.default_rng(seed)

    def more(columns: Any, ids: Any, wanted: int) -> dict[str, Any]:
        values = np.array([f"v{n}" for n in range(16)], object)
        extra = {f"extra_{n}": values[rng.integers(0, 16, len(ids))] for n in range(wanted - 1 - len(columns))}
        return {**columns, **extra}

    return replace(
        dataset,
        user_features=more(dataset.user_features, dataset.user_ids, user),
        item_features=more(dataset.item_features, dataset.item_ids, item),
    )


def dataset_of(events: int, users: int, items: int, fields: tuple[int, int], seed: int) -> Dataset:
    return widened(simulator.simulate(events=events, users=users, items=items, seed=seed), *fields, seed)


def declared(partitions: int | None) -> dict[str, Any]:
    """The demo's space: users and items, two decayed means and a latest vector each."""
    spec = tomllib.loads((ROOT / "spaces" / "kuairand-v1.toml").read_text())
    return {**spec, "partitions": partitions or spec["partitions"]}


def train(folder: str, *args: Any) -> None:
    """A model of the same users and items, trained on few impressions: how well it predicts is not measured here."""
    from models import train as training

    training.train(dataset_of(20_000, *args), Path(folder), rates=False, baseline=False, progress=False)


def bare(folder: str, dtype: str, batch: int, seconds: float = 4.0) -> float:
    """Events a second of the model alone, one thread, over prepared batches of different rows: what nobody who runs it can pass."""
    import torch

    torch.set_num_threads(1)
    model = upstream.load(folder, dtype=dtype)
    chosen = np.random.default_rng(0).integers(0, 1000, 64 * batch)
    users, items = (model.encode(kind, [str(n) for n in range(1000)], [{}] * 1000)[chosen] for kind in ("user", "item"))
    events = model.encode_events(["feed"] * batch, ["content"] * batch, np.full(batch, 1.6e9))
    model.forward(users[:batch], items[:batch], events)
    done, started = 0, time.monotonic()
    while time.monotonic() < started + seconds:
        start = done % 64 * batch
        model.forward(users[start : start + batch], items[start : start + batch], events)
        done += 1
    return done * batch / (time.monotonic() - started)


@click.command()
@click.option("--events", default=400_000, show_default=True, help="Simulated impressions; clicks come on top.")
@click.option("--users", default=20_000, show_default=True)
@click.option("--items", default=5_000, show_default=True)
@click.option("--fields", type=(int, int), default=FIELDS, show_default=True, help="Of a user and of an item; the default is KuaiRand's.")
@click.option("--dtype", "dtypes", multiple=True, default=("float32", "bfloat16"), show_default=True)
@click.option("--max-batch", default=4096, show_default=True)
@click.option("--seed", default=0, show_default=True)
@bootstrap_option
def main(
    events: int,
    users: int,
    items: int,
    fields: tuple[int, int],
    dtypes: tuple[str, ...],
    max_batch: int,
    seed: int,
    bootstrap: str | None,
) -> None:
    """Published events to committed frames through one infer worker, against the bare model with the same batches."""
    about = {**conditions(), "impressions": events, "fields": fields, "max_batch": max_batch}
    dataset = dataset_of(events, users, items, fields, seed)
    lines, figures = [], {}
    with cluster(bootstrap) as address, tempfile.TemporaryDirectory() as folder:
        console.print("training a small model", style="dim")
        in_process(train, f"{folder}/model", users, items, fields, seed)
        for dtype in dtypes:
            with space_of(declared(None), address) as space:
                publish_features(dataset, space.inputs, address)
                sent = publish_events(dataset, space.inputs, address)
                inputs = [space.inputs.impressions, space.inputs.clicks]
                drained = in_process(drain, address, inputs)
                limit = in_process(bare, f"{folder}/model", dtype, max_batch)
                options = ["--model", f"{folder}/model", "--dtype", dtype, "--max-batch", str(max_batch), "--bootstrap", address]
                with worker(Path(folder), "infer", space.name, *options, "--name", "bench") as infer:
                    started = infer.wait(lambda: infer.logged("assigned .+"), "infer is not assigned")
                    cpu = infer.cpu()
                    infer.wait(committed(address, infer_group(space), inputs), "not all is inferred", every=0.1)
                    seconds, cpu = time.time() - started, infer.cpu() - cpu
                    seen = {name: values[0] for name, values in infer.metrics().items()}
                    infer.stop()
                if seen["infer_messages_total"] != sent.events or seen["infer_dead_letters_total"]:
                    raise CrossrepError(f"{sent.events} events were sent, the worker counts {seen}")
            rate = sent.events / seconds
            stages = {
                stage: seen[f"infer_{stage}_seconds_total"] / sent.events * 1e6 for stage in ("read", "transform", "encode", "commit")
            }
            spent = ", ".join(f"{stage} {took:.1f}" for stage, took in stages.items())
            lines += [
                (f"{dtype}: infer", f"{rate:,.0f} events/s", f"{rate / limit:.2f} of the bare model, {cpu / sent.events * 1e6:.1f} µs CPU"),
                ("  bare model, one thread", f"{limit:,.0f} events/s", f"batches of {max_batch}"),
                ("  bare consumer", f"{sent.events / drained['seconds']:,.0f} events/s", ""),
                ("  µs an event", spent, f"{sent.events / seen['infer_batches_total']:.0f} events a batch"),
            ]
            figures[dtype] = {"events_per_s": rate, "bare_per_s": limit, "ratio": rate / limit, "cpu_us": cpu / sent.events * 1e6, **stages}
    report(f"inference: {events:,} impressions and their clicks", lines, {**about, **figures})


if __name__ == "__main__":
    main()
