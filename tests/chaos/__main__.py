"""`python -m tests.chaos`, which is `make chaos`."""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import click
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tests.chaos import run as runs
from tests.chaos.faults import FAULTS, SEVERAL
from tests.chaos.world import Stuck, World
from tests.streams.small_model import small_model

FAULT_LIST = "\n".join(
    f"  {name:<18}{(function.__doc__ or '').strip()}{' (--brokers 3)' if name in SEVERAL else ''}" for name, function in FAULTS.items()
)
HELP = f"""Prove under fire that nothing is lost or counted twice.

Starts a Kafka, fold and inference workers and a supervisor of its own in a temporary folder, sends load all the time, injects faults one
after another, and every few faults stops the load, waits until all is folded, and compares: every key's count with what Kafka acknowledged,
every vector with an independent computation, each poison message with the dead letters, a reader that stayed open through everything with
a fresh one; and no reader may ever have seen a key go back. The figures are what this machine allowed; only differences fail.

The last line is `faults=... events=... keys=... differences=...`; the exit code is 0 if differences=0, else 1. A run that failed keeps its
folder. The same seed gives the same sequence of faults, victims and loads.

\b
The faults:
{FAULT_LIST}

\b
Examples:
  make chaos                                               60 faults, about half an hour
  python -m tests.chaos --seed 7 --faults 10
  python -m tests.chaos --only broker-kill --faults 3
  python -m tests.chaos --brokers 3 --faults 20"""


EXPLAINED = (
    "stall: a partition without a new record for readers; kept, moved: of partitions that stayed with their process (goal 1.5 s in a\n"
    "rebalance), or went to another (goal after SIGKILL: session of 3 s + 2 s + restore); well after: all ready, all partitions going on"
)


@click.command(help=HELP)
@click.option("--seed", default=1, show_default=True, help="Of everything random.")
@click.option("--faults", default=60, show_default=True, type=click.IntRange(1), help="How many to inject.")
@click.option(
    "--brokers", default="1", show_default=True, type=click.Choice(["1", "3"]), help="Kafka nodes; faults of single nodes need 3."
)
@click.option("--only", multiple=True, metavar="NAME", type=click.Choice(list(FAULTS)), help="Only this kind of fault; may be repeated.")
@click.option("--rate", default=1000.0, show_default=True, help="Events a second, on average.")
@click.option("--check-every", default=6, show_default=True, type=click.IntRange(1), help="Faults between two proofs.")
@click.option("--keep", is_flag=True, help="Keep the folder with all logs also when nothing is wrong.")
def main(seed: int, faults: int, brokers: str, only: tuple[str, ...], rate: float, check_every: int, keep: bool) -> None:
    kinds = runs.plan(seed, faults, int(brokers), only)
    if not kinds:
        raise click.UsageError(f"--only {' '.join(only)} needs --brokers 3")
    console = Console(highlight=False)
    folder = Path(tempfile.mkdtemp(prefix="crossrep-chaos-"))
    runs.log_to(folder / "chaos.log")
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background job starts with SIGINT ignored
        signal.signal(number, signal.default_int_handler)
    console.print(f"seed {seed}, {len(kinds)} faults; logs in {folder}")
    result = runs.Result()
    world = World(folder, brokers=int(brokers), rate=rate, seed=seed)
    interrupted = False
    try:
        with console.status("training the small model, starting Kafka and the workers"):
            small_model()
            world.__enter__()
        _show(console, world, seed, kinds, check_every, result)
    except Stuck as error:
        result.differences[f"it never started: {error}"] += 1
    except KeyboardInterrupt:
        interrupted = True
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would leave processes behind
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        world.close()
    _report(console, world, result)
    differences = sum(result.differences.values())
    if differences or interrupted:
        for what, times in result.differences.most_common(20):
            console.print(Text(f"  {times} × {what}", "red"), soft_wrap=True)
        again = f"--seed {seed} --faults {len(kinds)} --brokers {brokers}{''.join(f' --only {name}' for name in only)}"
        console.print(f"logs: {folder}\nagain: python -m tests.chaos {again} --rate {rate:g} --check-every {check_every}", soft_wrap=True)
    elif not keep:
        shutil.rmtree(folder, ignore_errors=True)
    events, keys = (max(world.load.counts.values()), world.observer.keys) if world.is_open else (0, 0)
    print(f"faults={result.faults} events={events} keys={keys} differences={differences}", flush=True)
    sys.exit(130 if interrupted else 1 if differences else 0)


def _show(console: Console, world: World, seed: int, kinds: list[str], check_every: int, result: runs.Result) -> None:
    """Run, a line for each fault, and below them where it stands."""
    started = time.monotonic()

    def status() -> Group:
        passed = time.monotonic() - started
        left = passed / max(1, result.faults) * (len(kinds) - result.faults)
        time_left = f"{left / 60:.0f} min left" if result.faults else "..."
        load = f"{max(world.load.counts.values()):,} events, {len(world.load.poison)} poison, {world.restarts} restarts"
        line = f"{result.faults}/{len(kinds)}  {result.under_way}  {passed / 60:.0f} min, {time_left}  {load}, {result.proofs} proofs"
        return Group(Text(line), ProgressBar(len(kinds), result.faults))

    def told(kind: str, figures: runs.Figures) -> None:
        console.print(f"{result.faults:>4}  {kind:<18} readers stood still {figures.stall:.1f} s, all well after {figures.recovery:.1f} s")

    with Live(get_renderable=status, console=console, refresh_per_second=2, transient=True):
        runs.run(world, seed, kinds, check_every=check_every, result=result, told=told)


def _report(console: Console, world: World, result: runs.Result) -> None:
    table = Table("seconds, the longest:", "times", "stall", "kept", "moved", "well after", box=None)
    for kind, f in sorted(result.figures.items()):
        table.add_row(kind, str(f.injected), *("" if s is None else f"{s:.1f}" for s in (f.stall, f.kept, f.moved, f.recovery)))
    console.print(table)
    console.print(EXPLAINED, style="dim", soft_wrap=True)
    if world.is_open:
        load = world.load
        console.print(
            f"{max(load.counts.values()):,} events acknowledged, {load.late:,} of them late, {len(load.poison)} poison messages, "
            f"{world.observer.records:,} records read, {world.restarts} restarts by the supervisor, {result.proofs} proofs",
            soft_wrap=True,
        )


if __name__ == "__main__":
    main()
