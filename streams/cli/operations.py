"""The operators' commands: prove, examine, erase, rewind, retire."""

from __future__ import annotations

import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from crossrep import kafka
from crossrep.cli import bootstrap_option, cli, console, resolve, space_option
from crossrep.cli.spaces import space_group

if TYPE_CHECKING:
    from streams.proof.crosschecks import Check
    from streams.proof.verify import Verdict


@cli.command()
@click.argument("space")
@click.option("--sample", metavar="SHARE", default="100%", help='Only a share of the keys, chosen by hash: "1%".')
@click.option("--live", metavar="DURATION", help='Take the state now as given, watch for so long ("60s"), and verify what came since.')
@click.option("--as-is", is_flag=True, help="Do not wait until the frames already written are folded.")
@click.option("--events", is_flag=True, help="Compare counts with the source events too. Needs a quiet moment.")
@click.option(
    "--stores",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="Instead: compare a worker's RocksDB (FOLDER/partition-N) with the changelog. The worker may be running.",
)
@bootstrap_option
def verify(space: str, sample: str, live: str | None, as_is: bool, events: bool, stores: Path | None, bootstrap: str | None) -> None:
    """Prove the state: every key against an independent float64 computation over all recorded frames. Exits 1 if anything differs.

    Works while events flow. Where retention has deleted the first frames: --live 60s. Where there are too many keys: --sample 1%.
    """
    from rich.progress import Progress

    from crossrep.spec import parse_duration
    from streams.proof import crosschecks
    from streams.proof import verify as proof

    if sum(map(bool, (stores, live, events))) > 1:
        raise click.UsageError("--live, --events and --stores exclude each other")
    try:
        watched = parse_duration(live) if live else 0.0
    except ValueError as error:
        raise click.UsageError(f"--live {live!r} is {error}") from None
    share = _share(sample)
    address = kafka.bootstrap_servers(bootstrap)
    known = resolve(space, address)
    found: list[Verdict | Check] = []
    if stores:
        with console.status("reading stores and changelog"):
            checks = crosschecks.stores(known, address, stores, share)
        console.print(crosschecks.table(checks))
        found += checks
    else:
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("watching, then recomputing" if live else "recomputing from frames", total=None)

            def progressed(done: int, total: int) -> None:
                progress.update(task, completed=done, total=total)

            verdicts = proof.verify(known, address, progressed, share, watched, as_is)
        console.print(proof.table(verdicts))
        found += verdicts
    if events:
        with console.status("counting events"):
            checks = crosschecks.events(known, address, share)
        console.print(crosschecks.table(checks))
        found += checks
    for difference in found:
        for example in difference.examples:
            click.echo(f"  {example}")
    if any(difference.differences for difference in found):
        raise click.ClickException(f"differences found: {sum(difference.differences for difference in found):,}")


def _share(text: str) -> float:
    """`"1%"` or `"0.01"` as 0.01."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise click.UsageError(f'--sample {text!r} is no share of the keys: write "1%" or "0.01"')
    return share


@cli.command()
@click.argument("space")
@click.option("--strict", is_flag=True, help="Exit 1 on warnings too.")
@click.option("--production", is_flag=True, help="Judge a cluster of one broker as strictly as one of several.")
@click.option(
    "--reassignment",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Also write a file for kafka-reassign-partitions.sh: three replicas of everything.",
)
@bootstrap_option
def doctor(space: str, strict: bool, production: bool, reassignment: Path | None, bootstrap: str | None) -> None:
    """Check the cluster's settings and the workers' lag, and name the commands that mend. Exits 1 on a problem. Changes nothing."""
    import json

    from streams.operations import cluster_facts
    from streams.operations import doctor as examination
    from streams.operations.doctor_findings import Status

    address = kafka.bootstrap_servers(bootstrap)
    facts = cluster_facts.gather(resolve(space, address), address, production)
    findings = examination.examine(facts)
    console.print(examination.table(findings))
    for finding in (finding for finding in findings if finding.fixes):
        console.print(f"\nto mend {finding.check}:", style="bold")
        for fix in finding.fixes:
            click.echo(f"  {fix}")  # as it is, to be copied: neither wrapped nor coloured
    if reassignment is not None:
        reassignment.write_text(json.dumps(examination.reassignment(facts)))
    status = Status
    count = {kind: sum(finding.status is kind for finding in findings) for kind in status}
    click.echo("\n" + "  ".join(f"{kind}: {count[kind]}" for kind in status))
    if count[status.PROBLEM] or (strict and count[status.WARNING]):
        sys.exit(1)


@cli.command()
@click.argument("entity")
@click.argument("id")
@space_option
@bootstrap_option
@click.option("--check", is_flag=True, help="Give no order: only look what is still recorded, if anything. Exits 1 then.")
def forget(entity: str, id: str, space: str, bootstrap: str | None, check: bool) -> None:
    """Erase a key: crossrep forget user 17 --space kuairand-v1.

    The order goes to the frames topic, so it is ordered with the stream: what came before is deleted everywhere, what comes behind begins
    anew. Stop its events at the source first. Waits until the order is folded, then lists what the brokers still hold on disk, and when
    that is gone.
    """
    from crossrep.columnar.forget import Forget
    from streams.operations import erasure

    address = kafka.bootstrap_servers(bootstrap)
    known, key = resolve(space, address), Forget(entity, id.encode())
    if not check:
        order = erasure.order(known, address, key)
        console.print(f"ordered at {known.frames_topic}[{order.partition}]@{order.offset}; waiting until it is folded")
        erasure.wait(known, address, order)
        console.print(f"forgotten: state, disk and readers no longer hold what was known of {entity} {id}")
    with console.status("reading what is still recorded"):
        found = erasure.traces(known, address, key)
    console.print(erasure.table(found))
    if any(trace.records for trace in found):
        console.print(f"what is left goes at the times above; then prove it: crossrep forget {entity} {id} --space {space} --check")
        sys.exit(int(check))
    console.print("nothing of it is left")


@cli.command()
@click.argument("space")
@click.option("--to", type=click.DateTime(), help="UTC, by the brokers' clock: 2026-01-31T12:00:00.")
@click.option("--ago", metavar="DURATION", help='Instead of --to: "90m", "3h".')
@click.option(
    "--keep-frames",
    is_flag=True,
    help="Fold the frames since again. Default: leave them out, and read their events again.",
)
@click.option("--dry-run", is_flag=True, help="Only say what would happen.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@bootstrap_option
def rewind(space: str, bootstrap: str | None, to: datetime | None, ago: str | None, keep_frames: bool, dry_run: bool, yes: bool) -> None:
    """Take the state back to an earlier time, and make what came since again: crossrep rewind kuairand-v1 --ago 3h.

    For when a bad model has written nonsense. Stop all fold and infer workers, rewind, and start them with the good model: the events
    since are read again, the nonsense is left out. How far back that goes, the space's `history` says.
    """
    from rich.progress import Progress

    from crossrep.spec import parse_duration
    from streams.operations import rewind as rewinding

    if (to is None) == (ago is None):
        raise click.UsageError("say when: --to TIME or --ago DURATION")
    try:
        moment = int(to.replace(tzinfo=UTC).timestamp() if to else time.time() - parse_duration(ago))
    except ValueError as error:
        raise click.UsageError(f"--ago {ago!r} is {error}") from None
    address = kafka.bootstrap_servers(bootstrap)
    known = resolve(space, address)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("reading what the frames since were made of", total=None)
        plan = rewinding.plan(
            known, address, moment, not keep_frames, lambda done, total: progress.update(task, completed=done, total=total)
        )
    console.print(rewinding.table(plan))
    for group, places in plan.rereads.items():
        where = ", ".join(f"{topic}[{number}] from {offset:,}" for (topic, number), offset in sorted(places.items()))
        console.print(f"{group} reads again: {where}")
    if plan.foreign:
        console.print(f"[yellow]{plan.foreign:,} frames behind the cut were written by others' models: their writers must send again[/]")
    if dry_run or not (yes or click.confirm("rewind?")):
        return
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("writing former records", total=len(plan.steps))
        rewinding.apply(known, address, plan, lambda: progress.advance(task))
    console.print("rewound. Start the workers again; readers see the former state now")


@space_group.command()
@click.argument("name")
@click.option("--force", is_flag=True, help="Although it has workers or readers: they fail.")
@click.option(
    "--data",
    type=click.Path(file_okay=False, path_type=Path),
    multiple=True,
    help="Another folder of this machine that holds nothing but this space; repeatable.",
)
@click.option("--yes", is_flag=True, help="Do not ask.")
@bootstrap_option
def retire(name: str, force: bool, data: tuple[Path, ...], yes: bool, bootstrap: str | None) -> None:
    """Delete a space: topics, consumer groups, its record, and its disks on this machine. Events and features stay. There is no way back.

    Refused while an alias stands for it; and unless --force is given, while it has workers or readers. Readers say every ten seconds that
    they are there, so this may watch for 25. Disks are CROSSREP_HOME/fold/NAME and CROSSREP_HOME/serve/NAME, and what --data adds.
    """
    from streams.operations import retire as retiring

    address = kafka.bootstrap_servers(bootstrap)
    if not force:
        with console.status(f"watching who works for {name} and reads it"):
            retiring.refuse_used(name, address)
    if not (yes or click.confirm(f"delete space {name}, with all its topics?")):
        return
    done = retiring.retire(name, address, [*retiring.folders(name), *data])
    console.print(f"deleted {len(done.topics)} topics, {len(done.groups)} groups and {len(done.folders)} folders of {name}")
    for line in done.left:
        console.print(f"[yellow]left: {line}[/]")
