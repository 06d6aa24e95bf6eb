"""A space that an import or a replay fills belongs to the model that made the vectors, from before the first of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
from click.testing import CliRunner

import streams.cli  # noqa: F401  adds the workers' commands
from crossrep import kafka
from crossrep.archive.store import Archive
from crossrep.cli import cli
from crossrep.control import binding, spaces
from crossrep.control.binding import Model
from crossrep.errors import ModelError
from crossrep.spec import Space
from models.registry import resolve
from tests.cluster import Load, Workers, free_port, new_space, ready, wait_for
from tests.crossrep.snapshot_world import Changelog
from tests.streams.small_model import SPEC, small_model

OTHER = Model("other@7", "f" * 64)


@dataclass
class World:
    """A space of the small model with frames and records, archived and taken."""

    space: Space
    folder: Path
    bootstrap: str
    model: Model
    places: list[str] = field(default_factory=list)

    def crossrep(self, *args: str) -> str:
        done = CliRunner().invoke(cli, [*args, "--bootstrap", self.bootstrap], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    def fill(self, kind: str, space: Space) -> str:
        place = ["--from", str(self.folder / "snapshots")]
        if kind == "replay":
            place = ["--archive", str(self.folder / "archive"), "--to", str(self.folder / "replayed"), "--no-hand-over"]
        return self.crossrep(kind, self.space.name, "--into", space.name, *place)

    def new_space(self) -> Space:
        return new_space(self.bootstrap, self.folder, SPEC, partitions=2)[0]

    def bound(self, space: Space) -> Model | None:
        return binding.model_of(spaces.find(space.name, self.bootstrap), self.bootstrap)


@pytest.fixture(scope="module")
def world(bootstrap: str, tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("imports")
    space, _ = new_space(bootstrap, folder, SPEC, partitions=2)
    _, identity = resolve(str(small_model()), None)
    world = World(space, folder, bootstrap, Model(identity.label, identity.digest))
    Load(space, bootstrap).send(200)
    Changelog(space, bootstrap).put("user", list(range(50)))
    Changelog(space, bootstrap).put("item", list(range(20)))
    archived = ["archive", space.name, "--to", str(folder / "archive")]
    world.crossrep(*archived)  # before anybody has told whose vectors these are
    assert Archive(str(folder / "archive"), space.name).described().model is None
    world.crossrep("snapshot", space.name, "--to", str(folder / "of-unknown"))
    binding.bind(spaces.find(space.name, bootstrap), identity, bootstrap)
    world.crossrep(*archived)
    world.crossrep("snapshot", space.name, "--to", str(folder / "snapshots"))
    assert Archive(str(folder / "archive"), space.name).described().model == world.model
    return world


@pytest.mark.parametrize("kind", ["import", "replay"])
def test_what_is_filled_is_the_models(world: World, kind: str) -> None:
    new = world.new_space()
    said = world.fill(kind, new)
    assert f"space {new.name} is that of model {world.model.label} ({world.model.digest[:12]}) now" in said.replace("\n", " ")
    assert world.bound(new) == world.model
    with pytest.raises(ModelError, match=rf"space '{new.name}' is that of model {world.model.label} .* not of {OTHER.label}"):
        binding.bind(spaces.find(new.name, world.bootstrap), OTHER, world.bootstrap)
    assert world.bound(new) == world.model


@pytest.mark.parametrize("kind", ["import", "replay"])
def test_another_models_space_is_refused_and_stays_empty(world: World, kind: str) -> None:
    new = world.new_space()
    binding.bind(spaces.find(new.name, world.bootstrap), OTHER, world.bootstrap)
    with pytest.raises(
        ModelError, match=rf"is that of model {OTHER.label} \(f+\) since .* not of {world.model.label} .* --like {new.name}"
    ):
        world.fill(kind, new)
    assert world.bound(new) == OTHER
    assert not any(end for _, end in kafka.bounds(world.bootstrap, new.frames_topic).values())


def test_the_same_models_worker_goes_on(world: World, workers: Workers) -> None:
    new, port = world.new_space(), free_port()
    world.fill("import", new)
    workers.start("infer", new.name, "--model", str(small_model()), "--port", str(port), "--start", "latest")
    wait_for(lambda: ready(port), f"it goes on behind the import {workers.logs()}")


def test_vectors_of_unknown_origin_bind_nothing(world: World) -> None:
    new = world.new_space()
    said = world.crossrep("import", world.space.name, "--into", new.name, "--from", str(world.folder / "of-unknown"))
    assert "nothing says which model made these vectors" in said and world.bound(new) is None
    listed = CliRunner().invoke(cli, ["snapshots", world.space.name, "--from", str(world.folder / "of-unknown")])
    assert "not known" in listed.output
