"""`crossrep demo`: the main job end to end, on real Kafka, with its proof.

Kafka up → a space → train the upstream model → workers → publish two weeks of events → freshness at half load → proof → a look around
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from crossrep import kafka
from crossrep.control import spaces
from crossrep.errors import CrossrepError, SpaceError, SpecError
from crossrep.spec import Space
from crossrep.views.view import LocalView
from models.datasets import Dataset
from streams import broker, topics
from streams.demo import freshness, publish
from streams.demo.processes import ROOT, metric, until, workers
from streams.demo.publish import Published
from streams.operations import retire
from streams.proof import verify

SPEC = ROOT / "spaces" / "kuairand-v1.toml"
FRESHNESS_SHARE = 0.1  # of the impressions is held back and published at half load, while freshness is measured
PREFIX = "demo-"


@dataclass
class Figures:
    """What the demo found."""

    auc: float = 0.0
    logistic_auc: float = 0.0
    sent: Published = field(default_factory=Published)
    rate: float = 0.0  # events a second through the whole path, at full speed
    half: float = 0.0  # events a second while freshness was measured
    latencies: list[float] = field(default_factory=list)  # milliseconds
    probes: int = 0
    verdicts: list[verify.Verdict] = field(default_factory=list)

    @property
    def events(self) -> int:
        return self.sent.events + self.probes

    @property
    def proved(self) -> bool:
        return all(v.differences == 0 and v.wrong_counts == 0 and v.events == self.events for v in self.verdicts) and bool(self.verdicts)


def run(dataset: Dataset, bootstrap: str | None, console: Console) -> bool:
    """Run the demo. Returns whether everything was proved.

    Raises:
        CrossrepError: a step failed; says which and why.
    """
    figures = Figures()
    address = _kafka(bootstrap, console)
    space, spec_file = _space(address, console)
    model = kafka.home() / "demo" / "model"
    _train(dataset, model, figures, console)
    with workers(spec_file, model, console) as ports:
        features = publish.publish_features(dataset, space.inputs, address)
        console.print(f"[bold]4[/] published the features of {features.users:,} users and {features.items:,} items")
        held_back = int(dataset.size * FRESHNESS_SHARE)
        _full_speed(dataset, space, address, ports, dataset.size - held_back, figures, console)
        _half_speed(dataset, space, address, held_back, figures, console)
        with console.status("waiting until all is folded"):
            until(lambda: not verify.unfolded(space, address), "all frames are folded", 120)
        _prove(space, address, figures, console)
        busiest = _look_around(space, address, console)
    command = sys.argv[0] if Path(sys.argv[0]).name == "crossrep" else "crossrep"
    console.print(
        f"\nKafka keeps running, so you can go on: [bold]{command} get user {busiest} --space {space.name}[/]; "
        f"stop it with [bold]{command} kafka down[/]"
    )
    _summary(figures, console)
    return figures.proved


def _kafka(bootstrap: str | None, console: Console) -> str:
    if bootstrap or "KAFKA_BOOTSTRAP" in os.environ:
        address = kafka.bootstrap_servers(bootstrap)
        console.print(f"[bold]1[/] using Kafka at {address}")
        return address
    running = broker.up(kafka.home() / "kafka")
    console.print(f"[bold]1[/] Apache Kafka {broker.KAFKA_VERSION} runs at {running.bootstrap}")
    return running.bootstrap


def _space(address: str, console: Console) -> tuple[Space, Path]:
    """A space of this run's own, with inputs of its own, so that a second run starts afresh. Earlier runs' topics are deleted."""
    _delete_earlier(address)
    declared = tomllib.loads(SPEC.read_text("utf-8"))
    name = f"{PREFIX}{int(time.time())}"
    inputs = Space.load(SPEC).inputs.model_dump()
    text = SPEC.read_text("utf-8").replace(f'name = "{declared["name"]}"', f'name = "{name}"', 1)
    text += "\n[inputs]\n" + "".join(f'{key} = "{topic}.{name}"\n' for key, topic in inputs.items())
    path = kafka.home() / "demo" / f"{name}.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")
    space = Space.load(path)
    created = topics.create(space, address)
    columns = sum(len(entity.columns) for entity in space.entities.values())
    console.print(
        f"[bold]2[/] space {name}: {len(space.entities)} entities, {columns} columns, {len(created)} topics, {space.partitions} partitions"
    )
    return space, path


def _delete_earlier(address: str) -> None:
    for name in spaces.read_all(address):
        if name.startswith(PREFIX):
            with contextlib.suppress(SpecError, SpaceError):  # another version's: not ours to read, so not ours to delete
                retire.retire(name, address, retire.folders(name))
                (kafka.home() / "demo" / f"{name}.toml").unlink(missing_ok=True)


def _train(dataset: Dataset, out: Path, figures: Figures, console: Console) -> None:
    from models.train import train  # torch: seconds to import, and only needed here

    metrics = train(dataset, out, progress=console.is_terminal)
    figures.auc, figures.logistic_auc = metrics["auc"], metrics["logistic_auc"]
    console.print(
        f"[bold]3[/] trained the upstream model on {metrics['train_impressions']:,} impressions of the first days: "
        f"test AUC {figures.auc:.4f} (logistic regression {figures.logistic_auc:.4f})"
    )


def _full_speed(
    dataset: Dataset, space: Space, address: str, ports: dict[str, int], impressions: int, figures: Figures, console: Console
) -> None:
    """Publish, infer and fold as fast as it goes; the rate is from the first event sent until the last frame is folded and committed."""
    started = time.monotonic()
    total = impressions
    columns = (TextColumn("{task.description:>10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bars = {name: progress.add_task(name, total=total) for name in ("published", "inferred", "folded")}

        def published(sent: Published) -> None:
            progress.update(bars["published"], completed=sent.events, total=max(total, sent.events))

        sent = publish.publish_events(dataset, space.inputs, address, limit=impressions, progressed=published)
        for name in ("published", "inferred", "folded"):
            progress.update(bars[name], total=sent.events)
        inferred = 0.0
        while inferred < sent.events:
            inferred = metric(ports["infer-0"], "crossrep_infer_messages_total")
            folded = sum(metric(ports[name], "crossrep_fold_rows_total") for name in ("fold-0", "fold-1"))
            progress.update(bars["inferred"], completed=inferred)
            progress.update(bars["folded"], completed=min(folded / len(space.entities), inferred))
            if time.monotonic() - started > 300:
                raise CrossrepError(
                    f"only {inferred:.0f} of {sent.events} events were inferred within five minutes; see {kafka.home() / 'demo'}"
                )
            time.sleep(0.1)
        until(lambda: not verify.unfolded(space, address), "all frames are folded", 120)
    figures.sent = sent
    figures.rate = sent.events / (time.monotonic() - started)
    console.print(
        f"[bold]5[/] {sent.impressions:,} impressions and {sent.clicks:,} clicks, in event-time order: published, inferred and folded at "
        f"[bold]{figures.rate:,.0f} events/s[/]"
    )


def _half_speed(dataset: Dataset, space: Space, address: str, impressions: int, figures: Figures, console: Console) -> None:
    """Publish the rest at half that rate; meanwhile probes measure how long an event takes until a reader sees it."""
    rate, skip = figures.rate / 2, dataset.size - impressions
    seconds = figures.sent.events / max(figures.sent.impressions, 1) * impressions / rate
    with ThreadPoolExecutor(1) as pool, console.status(f"publishing the rest at half that rate for {seconds:.0f} s, measuring freshness"):
        publishing = pool.submit(publish.publish_events, dataset, space.inputs, address, rate, impressions, skip)
        measured = freshness.measure(space, address, seconds=max(2.0, seconds), items=list(dataset.item_ids[:100]))
        rest = publishing.result()
    figures.latencies, figures.probes = measured.milliseconds, measured.sent
    figures.half = rest.events / rest.seconds
    figures.sent.impressions += rest.impressions
    figures.sent.clicks += rest.clicks
    p50, p99 = np.percentile(figures.latencies, [50, 99])
    console.print(
        f"[bold]6[/] freshness at {figures.half:,.0f} events/s, from publish to visible in a LocalView, exactly once: "
        f"[bold]p50 {p50:.0f} ms, p99 {p99:.0f} ms[/] ({figures.probes} probes)"
    )


def _prove(space: Space, address: str, figures: Figures, console: Console) -> None:
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("recomputing everything from the recorded frames", total=None)
        figures.verdicts = verify.verify(space, address, lambda done, total: progress.update(task, completed=done, total=total))
    console.print(
        f"[bold]7[/] the proof: {figures.events:,} events went in ({figures.sent.impressions:,} impressions, "
        f"{figures.sent.clicks:,} clicks, {figures.probes} probes); every count and vector against an independent float64 computation:"
    )
    console.print(verify.table(figures.verdicts))


def _look_around(space: Space, address: str, console: Console) -> str:
    """Show the busiest users and items with their nearest neighbours, and the tables' sizes. Returns the busiest user."""
    busiest = {}
    table = Table("entity", "id", "events", "click share by decayed weight", "nearest by cosine of cr", box=None)
    sizes = []
    for entity in space.entities:
        with LocalView(entity, space.name, address) as view:
            view.wait(60)
            ids = view.ids()
            answer = view.get(ids)
            share = np.divide(answer["clicks"].weights, answer["cr"].weights, out=np.zeros(len(ids)), where=answer["cr"].weights > 0)
            for row in np.argsort(-answer.counts)[:3].tolist():
                nearest = ", ".join(f"{id} ({cosine:.3f})" for id, cosine in view.nearest("cr", ids[row], 3))
                table.add_row(entity, ids[row], f"{answer.counts[row]:,}", f"{share[row]:.2f}", nearest)
            busiest[entity] = ids[int(np.argmax(answer.counts))]
            sizes.append(f"{len(view):,} {entity}s of {view.record_bytes} bytes")
    console.print(f"[bold]8[/] tables: {', '.join(sizes)}; the busiest of each:")
    console.print(table)
    return busiest["user"]


def _summary(figures: Figures, console: Console) -> None:
    p50, p99 = np.percentile(figures.latencies, [50, 99])
    worst = max(v.worst_vector for v in figures.verdicts)
    differences = sum(v.differences for v in figures.verdicts)
    keys = " ".join(f"{v.entity}s={v.keys}" for v in figures.verdicts)
    line = (
        f"demo: events={figures.events} rate={figures.rate:.0f}/s freshness_p50={p50:.0f}ms freshness_p99={p99:.0f}ms {keys} "
        f"auc={figures.auc:.4f} differences={differences} worst_vector={worst:.1e} {'PROVED' if figures.proved else 'FAILED'}"
    )
    console.print(line, soft_wrap=True, highlight=False)
