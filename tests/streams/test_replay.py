"""Replay and hand-over while events flow and everything of the old space is killed: every event counts once in the new one."""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from click.testing import CliRunner
from confluent_kafka import Message

import streams.cli  # noqa: F401  adds the workers' commands
from crossrep import LocalView, kafka
from crossrep.archive.archiving import archive
from crossrep.archive.store import Archive
from crossrep.cli import cli
from crossrep.columnar.records import RecordLayout
from crossrep.control import binding, groups, spaces
from crossrep.control.cuts import Cut
from crossrep.rollout.replay_archive import of_archive
from crossrep.rollout.replay_tables import fold
from crossrep.snapshots.store import Store
from crossrep.spec import Space
from schemas import codec
from streams import topics
from tests.cluster import Workers, free_port, new_space, prove, ready, settled, wait_for
from tests.crossrep.snapshot_world import rows
from tests.streams.small_model import SPEC, Feed, inferred, small_dataset, small_model, start_infer


def sibling(space: Space, path: Path, name: str, partitions: int) -> tuple[Space, Path]:
    """A space of another name and number of partitions that reads the same events."""
    text = path.read_text().replace(f'name = "{space.name}"', f'name = "{name}"')
    other = path.parent / f"{name}.toml"
    other.write_text(text.replace(f"partitions = {space.partitions}", f"partitions = {partitions}"))
    return Space.load(other), other


@contextmanager
def flowing(feed: Feed) -> Iterator[None]:
    """Events, from a thread of their own."""
    stop = threading.Event()

    def flow() -> None:
        while not stop.is_set():
            feed.send(20)
            time.sleep(0.03)

    thread = threading.Thread(target=flow)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def counts(space: Space, bootstrap: str, entity: str) -> dict[str, int]:
    with LocalView(entity, space.name, bootstrap) as view:
        view.wait(60)
        ids = sorted(view.ids())
        return dict(zip(ids, view.get(ids).counts.tolist()))


def vectors(space: Space, bootstrap: str, entity: str, ids: list[str]) -> np.ndarray:
    with LocalView(entity, space.name, bootstrap) as view:
        view.wait(60)
        return np.hstack([values.vectors for values in view.get(ids).values()])


def test_every_event_counts_once_though_all_is_killed(bootstrap: str, workers: Workers, tmp_path: Path) -> None:
    space, path = new_space(bootstrap, tmp_path, SPEC)
    new, new_path = sibling(space, path, f"{space.name}-new", 3)
    topics.create(new, bootstrap)
    feed, store = Feed(space, small_dataset(), bootstrap), str(tmp_path / "archive")
    starts = {
        "infer": lambda: start_infer(workers, path, "i0"),
        "fold": lambda: workers.fold(path, "f0"),
        "archive": lambda: workers.start("archive", space.name, "--to", store, "--follow", "--every", "100ms"),
    }
    running = {name: start() for name, start in starts.items()}
    with flowing(feed):
        random = np.random.default_rng(1)
        kept = Archive(store, space.name)

        def archived() -> int:
            """Events in front of the newest cut."""
            cut = kept.cut()
            return total(cut.groups.get(f"infer.{space.name}", {})) if cut else 0

        wait_for(lambda: archived() > 200, "the first events are archived")
        for name in ("archive", "infer", "archive", "fold", "infer", "archive"):
            time.sleep(random.random() / 2)
            running[name].kill()
            running[name].wait()
            running[name] = starts[name]()
        at = archived()
        wait_for(lambda: archived() > at + 200, "the next events are archived")
        options = ["--archive", store, "--to", str(tmp_path / "snapshots"), "--bootstrap", bootstrap]
        command = ["replay", space.name, "--into", new.name, *options]
        done = CliRunner().invoke(cli, command)
        assert done.exit_code == 0, (done.output, done.exception)
        assert f"crossrep infer {new.name} begins at {space.inputs.impressions}" in done.output
        again = CliRunner().invoke(cli, command, catch_exceptions=False)
        assert again.exit_code == 0 and "0 rows written" in again.output
        events = total(groups.offsets(bootstrap, f"infer.{new.name}"))
        assert 0 < events < feed.events  # there is something in front of the cut, and behind it
        start_infer(workers, new_path, "n0")
        workers.fold(new_path, "m0")
        time.sleep(1)
    for one in (space, new):
        wait_for(lambda one=one: inferred(one, bootstrap) and settled(one, bootstrap), f"all is folded {workers.logs()}", 60)
    prove(new, bootstrap, feed.counts)
    for entity in space.entities:
        expected = counts(space, bootstrap, entity)
        assert counts(new, bootstrap, entity) == expected
        some = list(expected)[:200]
        np.testing.assert_allclose(vectors(new, bootstrap, entity, some), vectors(space, bootstrap, entity, some), rtol=1e-2, atol=1e-2)
    # The same from files of the events, through the model again.
    inputs = [space.inputs.impressions, space.inputs.clicks]
    published = [message_event(space, message) for topic in inputs for message in all_of(topic, bootstrap)]
    pq.write_table(pa.Table.from_pylist(published), tmp_path / "events.parquet")
    made = ["represent", str(tmp_path / "events.parquet"), "--model", str(small_model()), "--out", str(tmp_path / "samples")]
    fill = ["replay", str(tmp_path / "samples"), "--into", str(new_path), "--only-snapshot", "--to", str(tmp_path / "files")]
    for command_line in ([*made, "--space", space.name, "--bootstrap", bootstrap], [*fill, "--bootstrap", bootstrap]):
        ran = CliRunner().invoke(cli, command_line)
        assert ran.exit_code == 0, (ran.output, ran.exception)
    snapshots = Store(str(tmp_path / "files"), new.name)
    of = snapshots.find().model
    assert of is not None and of == binding.model_of(spaces.find(space.name, bootstrap), bootstrap)
    for entity in space.entities:
        layout = RecordLayout(new, entity)
        kept = {key.decode(): layout.decode([value])[0] for key, value in rows(snapshots, snapshots.find(), entity).items()}
        assert {key: int(record["count"]) for key, record in kept.items()} == counts(space, bootstrap, entity)
        some = list(kept)[:100]
        found = np.array([np.hstack([kept[id][name] for name, column in layout.columns.items() if column.dim]) for id in some])
        np.testing.assert_allclose(found, vectors(space, bootstrap, entity, some), rtol=1e-2, atol=1e-2)
    # Whoever repeats it now is told that the space is in use.
    refused = CliRunner().invoke(cli, command)
    assert "are running" in str(refused.exception)


def test_cuts_are_exact_while_some_of_several_workers_are_killed(bootstrap: str, workers: Workers, tmp_path: Path) -> None:
    """One dies with frames sent, one with offsets in an open transaction, one while the cut is taken; their heirs make the rest again."""
    space, path = new_space(bootstrap, tmp_path, SPEC)
    feed, store, cuts = Feed(space, small_dataset(), bootstrap), Archive(str(tmp_path / "archive"), space.name), list[Cut]()

    def take(meanwhile: Callable[[], object] = lambda: None) -> None:
        """`meanwhile`: called between the questions that make the cut."""
        report = archive(space.name, bootstrap, store, progressed=lambda offsets, of: meanwhile())
        assert report.cut is not None
        if report.cut.groups:  # else the workers had just begun, and a replay to this cut may be refused
            cuts.append(report.cut)

    with flowing(feed):
        start_infer(workers, path, "heir")
        victims = [start_infer(workers, path, name, fault=f"infer.{name}:3") for name in ("produced", "offsets")]
        while any(victim.poll() is None for victim in victims):
            take()
        port = free_port()
        third = start_infer(workers, path, "third", port=port)
        wait_for(lambda: ready(port), f"it has its partitions {workers.logs()}")
        take(third.kill)
        for _ in range(3):
            take()
    assert [victim.wait() for victim in (*victims, third)] == [-signal.SIGKILL] * 3, workers.logs()
    wait_for(lambda: inferred(space, bootstrap), f"all is inferred {workers.logs()}")
    take()
    places = [total(cut.groups.get(f"infer.{space.name}", {})) for cut in cuts]
    assert places == sorted(places) and len(set(places)) > 5 and places[-1] == feed.events
    events = [
        (message, message_event(space, message))
        for topic in (space.inputs.impressions, space.inputs.clicks)
        for message in all_of(topic, bootstrap)
    ]
    for cut in cuts:
        tables = fold(space, of_archive(store, space, cut).tasks, 1)
        before = cut.groups.get(f"infer.{space.name}", {})
        for entity, table in tables.items():
            expected = Counter(
                event[f"{entity}_id"]
                for message, event in events
                if message.offset() < before.get(message.topic(), {}).get(message.partition(), 0)
            )
            slots = table.index.slots()
            found = dict(zip((key.decode() for key in table.index.keys(slots).tolist()), table.state.count[slots].tolist()))
            assert found == expected, (cut.id, entity)


def total(offsets: groups.Offsets) -> int:
    return sum(sum(numbers.values()) for numbers in offsets.values())


def all_of(topic: str, bootstrap: str) -> Iterator[Message]:
    return kafka.messages(bootstrap, topic, kafka.bounds(bootstrap, topic))


def message_event(space: Space, message: Message) -> dict[str, Any]:
    kind = "click" if message.topic() == space.inputs.clicks else "impression"
    event = codec(kind).decode(message.value())
    named = {name: event[name] for name in ("user_id", "item_id", "scenario", "branch")}
    return {**named, "event": kind, "event_time": event["event_time"] / 1000}
