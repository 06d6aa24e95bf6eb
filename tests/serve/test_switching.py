"""Readers that follow an alias, under load: every vector says which of two spaces it is of, and every answer is checked."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import CHROMIUM, browser
from served import Server

from crossrep import Changes, CrossrepError, LocalView, kafka
from crossrep.columnar import frames
from crossrep.rollout.promoting import promote
from crossrep.spec import Space
from crossrep.writer import rows_of
from serve.options import Options
from serve.serving import Served
from tests.cluster import SPEC, Workers, free_port, new_space, ready, settled, wait_for

IDS = [f"k{i}" for i in range(300)]
SLOWEST = 2.0  # seconds an answer may take, on a machine that others use too
SWITCHED_WITHIN = 30.0


@dataclass
class World:
    """Two spaces, a fold worker for each, and a thread that writes to both until it is told to stop."""

    spaces: tuple[Space, Space]
    bootstrap: str
    folder: Path
    aliases: Iterator[str] = field(default_factory=lambda: (f"current-{n}" for n in itertools.count()))

    def value(self, space: str) -> float:
        """Of every component of every vector in a space."""
        return 1.0 + [each.name for each in self.spaces].index(space)

    def dim(self, space: str) -> int:
        return next(each for each in self.spaces if each.name == space).entities["user"].columns["cr"].dim

    def alias(self) -> str:
        """A new one, that stands for the first space."""
        name = f"{next(self.aliases)}-{self.spaces[0].name}"
        promote(name, self.spaces[0].name, self.bootstrap)
        return name

    def send(self, producer: Any, ids: list[str], time: float) -> None:
        for space in self.spaces:
            sources = {name: np.full((len(ids), dim), self.value(space.name), "f4") for name, dim in space.sources.items()}
            for entity in space.entities:
                rows = rows_of(space, entity, ids, "impression", np.full(len(ids), time), sources)
                for partition, frame in frames.encode(space, rows):
                    producer.produce(space.frames_topic, frame, partition=partition)
        assert producer.flush(30) == 0


@pytest.fixture(scope="module")
def world(bootstrap: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("switching")
    made = [new_space(bootstrap, folder, spec, partitions) for spec, partitions in ((SPEC, 2), (SPEC.replace("dim = 8", "dim = 12"), 3))]
    world, workers, stop = World((made[0][0], made[1][0]), bootstrap, folder), Workers(folder), threading.Event()
    producer = kafka.producer(bootstrap)
    world.send(producer, IDS, 1.6e9)

    def write() -> None:
        random = np.random.default_rng(0)
        for turn in itertools.count(1):
            if stop.wait(0.05):
                return
            world.send(producer, random.choice(IDS, 20).tolist(), 1.6e9 + turn)

    writer = threading.Thread(target=write)
    try:
        ports = [free_port(), free_port()]
        for number, ((_, path), port) in enumerate(zip(made, ports)):
            workers.fold(path, f"w{number}", port=port)
        wait_for(lambda: all(map(ready, ports)) and all(settled(space, bootstrap) for space in world.spaces), "the first frames are folded")
        writer.start()
        yield world
    finally:
        stop.set()
        if writer.is_alive():
            writer.join()
        workers.kill_all()


class Readers:
    """Threads that ask without pause; each remembers which spaces answered, in order, and how long the slowest answer took."""

    def __init__(self, *asks: Callable[[], str]):
        self.seen: list[list[str]] = [[] for _ in asks]
        self.slowest = [0.0] * len(asks)
        self.answers = [0] * len(asks)
        self.errors: list[BaseException] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number, ask)) for number, ask in enumerate(asks)]

    def _run(self, number: int, ask: Callable[[], str]) -> None:
        try:
            while not self._stop.is_set():
                began = time.monotonic()
                space = ask()
                self.slowest[number] = max(self.slowest[number], time.monotonic() - began)
                self.answers[number] += 1
                if self.seen[number][-1:] != [space]:
                    self.seen[number].append(space)
                time.sleep(0.001)
        except BaseException as error:
            self.errors.append(error)

    def __enter__(self) -> Readers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def all_see(self, space: str) -> None:
        wait_for(lambda: bool(self.errors) or all(seen[-1:] == [space] for seen in self.seen), f"all see {space}", SWITCHED_WITHIN)
        assert not self.errors, self.errors


def back_and_forth(world: World, alias: str, readers: Readers) -> None:
    """Promote, roll back, promote: every reader sees exactly that, and nothing worse than a short wait."""
    first, second = (space.name for space in world.spaces)
    with readers:
        readers.all_see(first)
        for space in (second, first, second):
            promote(alias, space, world.bootstrap)
            readers.all_see(space)
            time.sleep(0.3)
    assert not readers.errors
    assert readers.seen == [[first, second, first, second]] * len(readers.seen)
    assert max(readers.slowest) < SLOWEST and min(readers.answers) > 30, (readers.slowest, readers.answers)


def test_views_answer_from_one_space_at_a_time(world: World, tmp_path: Path) -> None:
    alias = world.alias()
    options: list[dict[str, Any]] = [{}, {"path": tmp_path / "cache"}, {"ids": IDS[:50]}]
    views = [LocalView("user", alias, world.bootstrap, **more) for more in options]
    told: list[Changes] = []
    held: set[str] = set()

    def mirror(changes: Changes) -> None:
        held.difference_update(changes.deleted)
        held.update(changes.updated)
        if changes.switched or not told or told[-1].space != changes.space:
            told.append(changes)

    def asking(view: LocalView, ids: list[str]) -> Callable[[], str]:
        def ask() -> str:
            answer = view.get(ids)
            assert answer.found.all()
            assert answer["cr"].vectors.shape == (len(ids), world.dim(answer.space))
            assert (answer["cr"].vectors == world.value(answer.space)).all() and (answer["ur"].vectors == world.value(answer.space)).all()
            assert len(view.ids()) == len(ids) and len(view.nearest("ur", ids[0], 3)) == 3 and view.lag >= 0
            return answer.space

        return ask

    try:
        for view in views:
            view.wait(60)
        views[0].subscribe(mirror)
        back_and_forth(world, alias, Readers(*(asking(view, IDS[:50] if "ids" in more else IDS) for view, more in zip(views, options))))
        first, second = (space.name for space in world.spaces)
        assert [(changes.space, changes.switched) for changes in told] == [(first, False), (second, True), (first, True), (second, True)]
        assert held == set(IDS) == set(told[-1].updated) and told[-1].deleted == []
        for view in views:
            view.check()
            assert view.alias == alias and view.space == world.spaces[1]
        assert sorted(folder.name for folder in (tmp_path / "cache").iterdir()) == sorted(f"{space.name}.user" for space in world.spaces)
    finally:
        for view in views:
            view.close()


def test_what_cannot_be_loaded_leaves_the_former_answering(world: World, tmp_path: Path) -> None:
    """A filter by partition numbers means other keys in a space with another number of partitions."""
    alias = world.alias()
    first, second = world.spaces
    with LocalView("user", alias, world.bootstrap, partitions=[0]) as view, LocalView("user", alias, world.bootstrap) as other:
        view.wait(60)
        promote(alias, second.name, world.bootstrap)
        wait_for(lambda: other.space == second, "the other one goes along")

        def says_so() -> bool:
            try:
                view.check()
                return False
            except CrossrepError as error:
                return "3 partitions, not 2" in str(error) and f"{first.name!r} is answered still" in str(error)

        wait_for(says_so, "it says why it does not")
        ids = view.ids()
        answer = view.get(ids)
        assert view.space == first and answer.space == first.name and (answer["cr"].vectors == 1.0).all() and 0 < len(ids) < 300
        assert view.staleness < 30
        promote(alias, first.name, world.bootstrap)  # rolled back: all is well again
        wait_for(lambda: not says_so() and other.space == first, "it is content")
        view.check()


def test_a_replica_switches_all_entities_at_once(world: World, tmp_path: Path) -> None:
    alias = world.alias()
    workers = Workers(tmp_path)
    try:
        server = Server(workers, alias, tmp_path / "data")
        server.wait()
        turn = itertools.count()

        def looks_up() -> str:
            entity = ("user", "item")[next(turn) % 2]
            status, answer = server.ask("POST", f"/v1/{entity}/batch", {"ids": IDS})
            assert status == 200 and all(answer["found"]), answer
            assert answer["hash"] == next(space.hash.hex() for space in world.spaces if space.name == answer["space"])
            assert np.unique(answer["columns"]["cr"]["vector"]).tolist() == [world.value(answer["space"])]
            assert np.shape(answer["columns"]["cr"]["vector"]) == (300, world.dim(answer["space"]))
            return str(answer["space"])

        def searches() -> str:
            status, answer = server.ask("GET", "/v1/item/k7/nearest?column=cr&k=5")
            assert status == 200 and len(answer["nearest"]) == 5, answer
            status, said = server.ask("GET", "/ready")
            assert status == 200 and said["alias"]["name"] == alias and said["alias"]["problem"] is None, said
            return str(answer["space"])

        def watches() -> str:
            status, said = server.ask("GET", "/v1/status")
            assert status == 200 and said["alias"]["name"] == alias
            assert said["entities"]["user"]["topic"] == f"representations.user.{said['space']}"
            assert said["entities"]["user"]["columns"]["cr"]["dim"] == world.dim(said["space"])
            assert server.raw("GET", "/metrics")[2].count(b"crossrep_serve_space{") == 1
            return str(said["space"])

        back_and_forth(world, alias, Readers(looks_up, searches, watches))
        assert server.ask("GET", "/openapi.json")[1]["info"]["title"].endswith(world.spaces[1].name)
        server.process.terminate()
        assert server.process.wait(20) == 0
    finally:
        workers.kill_all()


def test_a_request_inside_the_former_is_waited_for(world: World, tmp_path: Path) -> None:
    alias, second = world.alias(), world.spaces[1]
    served = Served(alias, world.bootstrap, Options(folder=tmp_path))
    try:
        wait_for(lambda: served.now.caught_up, "it has caught up")
        inside = served.enter()

        def closed_to_others() -> bool:
            if entered := inside.enter():
                inside.leave()
            return not entered

        def on_disk() -> int:
            return len(inside.replicas["user"].records(b"", 1000)[0])

        promote(alias, second.name, world.bootstrap)
        wait_for(closed_to_others, "it has gone along, and lets nobody in any more", SWITCHED_WITHIN)
        assert served.now.space == second
        for _ in range(20):  # as long as a search may take
            assert on_disk() == len(IDS)
            time.sleep(0.1)
        inside.leave()

        def disk_closed() -> bool:
            try:
                return on_disk() == 0
            except Exception:  # rocksdict's own
                return True

        wait_for(disk_closed, "the last one is out", 10)
    finally:
        served.close()


def test_a_replica_killed_while_it_switches(world: World, tmp_path: Path) -> None:
    alias, second = world.alias(), world.spaces[1].name
    workers = Workers(tmp_path)
    try:
        server = Server(workers, alias, tmp_path / "data")
        server.wait()
        gone = tmp_path / "data" / "retired-long-ago"
        gone.mkdir()
        (gone / "replica-of-an-alias").touch()
        (tmp_path / "data" / "not-ours").mkdir()
        promote(alias, second, world.bootstrap)
        wait_for(lambda: "loading it beside" in server.log, "it begins to load", every=0.001)
        server.process.kill()
        server.process.wait()
        again = Server(workers, alias, tmp_path / "data")
        again.wait()
        status, answer = again.ask("POST", "/v1/item/batch", {"ids": IDS})
        assert status == 200 and answer["space"] == second and all(answer["found"])
        assert np.unique(answer["columns"]["cr"]["vector"]).tolist() == [2.0]
        assert not gone.exists() and (tmp_path / "data" / "not-ours").exists()
    finally:
        workers.kill_all()


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_the_page_goes_along(world: World, tmp_path: Path) -> None:
    alias, (first, second) = world.alias(), world.spaces
    workers = Workers(tmp_path)
    try:
        server = Server(workers, alias, tmp_path / "data")
        server.wait()
        with browser(tmp_path / "profile") as tab:
            tab.open(f"http://127.0.0.1:{server.port}/#/user/k7")
            for space in (first, second):
                promote(alias, space.name, world.bootstrap)
                tab.wait(f"document.getElementById('space').textContent == '{alias} → {space.name}'", SWITCHED_WITHIN)
                tab.wait("document.querySelector('#found h3').textContent == 'user k7' && document.querySelector('#found .near')")
                tab.wait(f"document.getElementById('found').textContent.includes('{world.dim(space.name)} dims')")
                assert tab.run("document.getElementById('entity').options.length") == 2 and not tab.problems
    finally:
        workers.kill_all()
