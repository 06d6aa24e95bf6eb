"""The workers' commands."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from crossrep import kafka
from crossrep.cli import bootstrap_option, cli, console, resolve, space_option
from crossrep.cli.archive import Duration
from models.cli import registry_option

if TYPE_CHECKING:
    from streams.inference.pipeline import Options

Command = TypeVar("Command", bound=Callable[..., Any])


def _worker_options(default_port: int) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for option in (
            click.option("-v", "--verbose", is_flag=True, help="Log everything, Faust and aiokafka too."),
            click.option("--port", default=default_port, show_default=True, help="Of /ready and /metrics."),
            click.option("--name", help="Stable name of this worker, unique in its space. Default: the host's name."),
            bootstrap_option,
        ):
            command = option(command)
        return command

    return decorate


def _logging(verbose: bool) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname).1s %(name)s: %(message)s")
    for name in ("streams", "state", "crossrep", "models"):
        logging.getLogger(name).setLevel(logging.INFO)
    if verbose:
        logging.getLogger().setLevel(logging.INFO)


def _pipeline_options(command: Command) -> Command:
    for option in (
        click.option("--session-timeout", default=10.0, show_default=True, help="Seconds of silence after which partitions move."),
        click.option(
            "--start",
            type=click.Choice(["earliest", "latest"]),
            help="Where to begin without offsets in a space that has frames.",
        ),
        click.option("--combine/--no-combine", default=None, help="Merge rows of one key inside a batch. Default: as the space declares."),
        click.option("--max-delay", default=0.02, show_default=True, help="Seconds a batch waits for more events."),
        click.option("--max-batch", default=4096, show_default=True, help="Events a batch."),
    ):
        command = option(command)
    return command


def _pipeline_settings(**options: Any) -> Options:
    from streams.inference.pipeline import Options

    return Options(**{**options, "name": options["name"] or socket.gethostname()})


@cli.command()
@click.argument("space")
@click.option("--model", "reference", required=True, metavar="MODEL", help="A folder `train` wrote, or a registered version: kuairand@3.")
@registry_option
@_worker_options(6067)
@_pipeline_options
@click.option("--threads", default=1, show_default=True, help="CPU threads of the model.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    show_default=True,
    help="Of the model. auto: bfloat16 where the CPU multiplies it in hardware and the model's vectors stay the same, else float32.",
)
@click.option(
    "--accept-model",
    is_flag=True,
    help="Take the place of the model that has written to SPACE until now. Right if both give the same vectors (it was converted), or if "
    "nothing of the former one is left (after a rewind to before its first frame).",
)
def infer(
    space: str,
    reference: str,
    url: str | None,
    threads: int,
    dtype: str,
    accept_model: bool,
    verbose: bool,
    bootstrap: str | None,
    **options: Any,
) -> None:
    """Run the upstream model over impressions and clicks, and write frames, exactly once.

    SPACE is a published space's name, or its TOML file. Run several, each with its own --name, to share the work. SIGTERM finishes the
    batch under way and stops. A space takes the vectors of one model only: the first worker's. Another one is refused.
    """
    import torch

    from models import registry, upstream
    from streams.inference import infer as worker

    _logging(verbose)
    torch.set_num_threads(threads)
    address = kafka.bootstrap_servers(bootstrap)
    folder, identity = registry.resolve(reference, url)
    found = resolve(space, address)
    model = upstream.load(folder, outputs=tuple(found.sources), dtype=dtype)
    worker.run(found, address, model, identity, _pipeline_settings(**options), accept_model)


@cli.command()
@click.argument("files")
@click.option("--model", "reference", required=True, metavar="MODEL", help="A folder `train` wrote, or a registered version: kuairand@3.")
@registry_option
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="A folder for files of the same names.")
@space_option
@bootstrap_option
def represent(files: str, reference: str, url: str | None, out: Path, space: str, bootstrap: str | None) -> None:
    """Parquet of events → Parquet of samples, for a replay: crossrep represent 'events/*.parquet' --model MODEL --out samples --space NAME.

    The model's outputs are added to the columns user_id, item_id, event, event_time, scenario and branch. Features are those published
    now. Then: crossrep replay 'samples/*.parquet' --into NAME
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from models import registry, upstream
    from streams.inference import represent as representing

    address = kafka.bootstrap_servers(bootstrap)
    folder, identity = registry.resolve(reference, url)
    columns = (TextColumn("events"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)

        def progressed(events: int, total: int) -> None:
            bar.update(task, total=total)
            bar.advance(task, events)

        total = representing.represent(files, resolve(space, address), upstream.load(folder), identity, address, out, progressed)
    console.print(f"{total:,} samples in {out}")


@cli.command()
@click.argument("space")
@_worker_options(6068)
@_pipeline_options
def frame(space: str, verbose: bool, bootstrap: str | None, **options: Any) -> None:
    """Turn one-record-per-sample outputs of other teams' models (topic inference.SPACE) into frames, exactly once."""
    from streams.inference import frame as worker

    _logging(verbose)
    address = kafka.bootstrap_servers(bootstrap)
    worker.run(resolve(space, address), address, _pipeline_settings(**options))


@cli.command()
@click.argument("space")
@_worker_options(6066)
@click.option("--data", type=click.Path(file_okay=False, path_type=Path), help="Data folder. Default: CROSSREP_HOME/fold.")
@click.option(
    "--slots",
    type=click.IntRange(1),
    help="Most keys in memory per entity and partition.  [default: 65,536, doubled as often as half of the memory suffices at the worst]",
)
@click.option("--rocksdb-mb", default=256, show_default=True, help="RocksDB's write buffers, all partitions together.")
@click.option("--min-free-mb", default=256, show_default=True, help="Least free space on the data folder's disk; with less, it waits.")
@click.option("--flush-rows", default=200_000, show_default=True, help="Rows that flush a partition before its interval is over.")
@click.option("--session-timeout", default=10.0, show_default=True, help="Seconds of silence after which partitions move.")
def fold(
    space: str,
    bootstrap: str | None,
    name: str | None,
    port: int,
    verbose: bool,
    data: Path | None,
    slots: int | None,
    rocksdb_mb: int,
    flush_rows: int,
    session_timeout: float,
    min_free_mb: int,
) -> None:
    """Fold frames into representations, exactly once. Run as many as there are partitions, each with its own --name.

    SPACE is a published space's name, or its TOML file. SIGTERM flushes and stops.
    """
    from streams.stateful import fold as worker
    from streams.stateful import memory
    from streams.stateful.fold_options import FoldOptions

    _logging(verbose)
    address = kafka.bootstrap_servers(bootstrap)
    found = resolve(space, address)
    options = FoldOptions(
        name=name or socket.gethostname(),
        folder=data or kafka.home() / "fold",
        port=port,
        flush_rows=flush_rows,
        rocksdb_mb=rocksdb_mb,
        session_timeout=session_timeout,
        min_free_mb=min_free_mb,
    )
    worker.run(found, address, replace(options, slots=slots or memory.slots_within(found, options, memory.installed() // 2)))


@cli.command()
@click.argument("space")
@_worker_options(6069)
@click.option("--window", type=Duration(), default="30m", show_default=True, help="A click labels an impression for so long.")
@click.option("--lateness", type=Duration(), default="30m", show_default=True, help="How late an event may be; costs memory.")
@click.option("--start", type=click.Choice(["earliest", "latest"]), help="Where to begin without offsets in a space that has samples.")
@click.option("--session-timeout", default=10.0, show_default=True, help="Seconds of silence after which partitions move.")
def samples(space: str, verbose: bool, bootstrap: str | None, name: str | None, **options: Any) -> None:
    """Join impressions with their clicks, by event time, to labelled samples on topic samples.SPACE, exactly once.

    SPACE is a published space's name, or its TOML file. A sample is written when the window behind its impression is over, and again, under
    the same sample id, should a late click change its label. Run as many as the impressions have partitions, each with its own --name.
    Then: crossrep training-set SPACE.
    """
    from streams.stateful import samples as worker

    _logging(verbose)
    address = kafka.bootstrap_servers(bootstrap)
    chosen = worker.Options(name=name or socket.gethostname(), folder=kafka.home() / "samples", **options)
    worker.run(resolve(space, address), address, chosen)
