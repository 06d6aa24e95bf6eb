"""The commands of the studies: crossrep study ..."""

from __future__ import annotations

from pathlib import Path

import click

from crossrep.cli import cli, console

workers_option = click.option(
    "--workers", default=2, show_default=True, type=click.IntRange(min=1), help="Runs at a time, one thread each."
)


@cli.group()
def study() -> None:
    """What a method is worth on real data, with intervals. Each study can be cut off and repeated: it goes on where it was."""


@study.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="For runs.jsonl, tables and plots.")
@click.option("--seeds", default=5, show_default=True, type=click.IntRange(min=2), help="Runs of each arm.")
@workers_option
@click.option("--dim", default=32, show_default=True, type=click.IntRange(min=2), help="Of the embeddings; even.")
@click.option("--epochs", default=4, show_default=True, type=click.IntRange(min=1), help="At most.")
def gca(folder: Path, out: Path, seeds: int, workers: int, dim: int, epochs: int) -> None:
    """Gated cross-attention, none, early and stacked, in a two-domain recommender: crossrep study gca DIR --out FOLDER.

    DIR holds sequences.txt (a line a user: its number, then item|time in time order) and item_map.json (name -> [item number, domain]).
    """
    from models.datasets.two_domains import load
    from study import gca as gca_study
    from study import gca_report
    from study.training import Schedule

    if dim % 2:
        raise click.BadParameter(f"{dim} is odd, and the heads are two", param_hint="--dim")
    runs = gca_study.study(load(folder), out, seeds=seeds, workers=workers, schedule=Schedule(epochs=epochs), dim=dim, console=console)
    for path in gca_report.write(runs, out):
        console.print(f"{path} written")


@study.command()
@click.argument("folder", metavar="DIR", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="For upstreams.jsonl, .md and .svg.")
@click.option("--seeds", default=5, show_default=True, type=click.IntRange(min=2), help="Runs of each model on its best setting.")
@workers_option
def upstreams(folder: Path, out: Path, seeds: int, workers: int) -> None:
    """The triple tower against logistic regression, boosted trees and DCNv2: crossrep study upstreams DIR --out docs/study.

    DIR is KuaiRand-Pure's (https://kuairand.com). Every model sees the same features and has nine tuning trials on later days; the best
    setting of each is then run with --seeds seeds and tested on days later still.
    """
    from models.datasets import kuairand
    from study import upstreams as upstreams_study
    from study import upstreams_report

    tuned, runs = upstreams_study.study(kuairand.load(folder), out, seeds=seeds, workers=workers, console=console)
    for path in upstreams_report.write(tuned, runs, out):
        console.print(f"{path} written")


@study.command()
@click.argument("folder", metavar="DIR", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="For retrieval.jsonl, .md and .svg.")
@click.option("--seeds", default=5, show_default=True, type=click.IntRange(min=2), help="Upstreams, each with all ways of scoring.")
@workers_option
def retrieval(folder: Path, out: Path, seeds: int, workers: int) -> None:
    """Recall of the items that users click, by UR, IR and what a stream adds: crossrep study retrieval DIR --out docs/study.

    DIR is KuaiRand-Pure's (https://kuairand.com). Against the most shown and the most clicked items; adapters are trained by InfoNCE, and
    what each may choose is chosen on days between training and test. Exact search, and an index of usearch.
    """
    from models.datasets import kuairand
    from study import retrieval as retrieval_study
    from study import retrieval_report

    settings, runs = retrieval_study.study(kuairand.load(folder), out, seeds=seeds, workers=workers, console=console)
    for path in retrieval_report.write(settings, runs, out):
        console.print(f"{path} written")


@study.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="For runs.jsonl, tables and plots.")
@click.option(
    "--seeds", default=5, show_default=True, type=click.IntRange(min=2), help="Runs of each arm, each with an upstream of its own."
)
@workers_option
@click.option(
    "--scratch", type=click.Path(file_okay=False, path_type=Path), help="For upstreams, 4 GB. Default: CROSSREP_HOME/study. May be deleted."
)
@click.option("--arm", "only", multiple=True, metavar="NAME", help="Only this one, as study/arms.py names it. Repeatable.")
def transfer(folder: Path, out: Path, seeds: int, workers: int, scratch: Path | None, only: tuple[str, ...]) -> None:
    """What transferred representations are worth to a click model: crossrep study transfer DIR --out FOLDER.

    DIR is KuaiRand-Pure's (https://kuairand.com). Upstreams are trained first, then some forty ways of using what they give are compared
    on two splits by days (study/arms.py).
    """
    from crossrep.kafka import home
    from models.datasets import kuairand
    from study import transfer as transfer_study
    from study import transfer_report
    from study.arms import ARMS

    for name in only:
        if name not in ARMS:
            raise click.BadParameter(f"{name!r} is none of: {'; '.join(ARMS)}", param_hint="--arm")
    dataset, scratch = kuairand.load(folder), scratch or home() / "study"
    runs = transfer_study.study(dataset, out, scratch, seeds=seeds, workers=workers, console=console, only=only)
    for path in transfer_report.write(runs, dataset.scenarios, out):
        console.print(f"{path} written")
