"""Retiring a space: refused while somebody needs it, whole when it is done, and its name is free again."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

import streams.cli  # noqa: F401  adds the workers' commands
from crossrep import CrossrepError, LocalView, SpaceError, kafka
from crossrep.cli import cli
from crossrep.control import readers, spaces
from crossrep.rollout.promoting import promote
from crossrep.spec import Space
from streams import topics
from streams.operations import retire
from tests.cluster import Load, new_space, wait_for


def topics_of(space: Space, bootstrap: str) -> set[str]:
    return {name for name in kafka.admin(bootstrap).list_topics(timeout=30).topics if name.endswith(f".{space.name}")}


def groups_of(space: Space, bootstrap: str) -> list[str]:
    return retire._groups(kafka.admin(bootstrap), space.name)


def refused(space: Space, bootstrap: str, watch: float = readers.WATCH) -> str:
    with pytest.raises(SpaceError) as told:
        retire.refuse_used(space.name, bootstrap, watch)
    return str(told.value)


def test_not_while_somebody_needs_it(bootstrap: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "EVERY", 1.0)  # of this process's readers
    space, other = new_space(bootstrap, tmp_path)[0], new_space(bootstrap, tmp_path)[0]
    alias = f"current-{space.name}"
    promote(alias, space.name, bootstrap)
    for attempt in (lambda: retire.refuse_used(space.name, bootstrap), lambda: retire.retire(space.name, bootstrap, [])):  # even by force
        with pytest.raises(SpaceError, match=f"{alias} stands for"):
            attempt()
    promote(alias, other.name, bootstrap)

    with closing(kafka.consumer(bootstrap, f"fold.{space.name}", {"client.id": "w7"})) as worker:
        worker.subscribe([space.frames_topic])
        wait_for(lambda: worker.poll(0.1) is None and bool(worker.assignment()), "a worker is a member")
        assert "w7" in refused(space, bootstrap)

    with LocalView("user", space.name, bootstrap) as view:
        view.wait(60)
        wait_for(lambda: bool(readers.readers(bootstrap, space.name)), "the reader has said that it is there")
        (reader,) = readers.readers(bootstrap, space.name)
        assert (reader.space, reader.entity, reader.kind, reader.lag) == (space.name, "user", "LocalView", 0) and reader.recent
        assert "LocalView of user" in refused(space, bootstrap)
        assert topics_of(space, bootstrap)
    assert not readers.readers(bootstrap, space.name)  # it has taken its leave
    began = time.monotonic()
    retire.refuse_used(space.name, bootstrap)  # nobody is left: it need not watch
    assert time.monotonic() - began < 5

    program = f"import crossrep, time\nview = crossrep.LocalView('item', {space.name!r}, {bootstrap!r})\ntime.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", program], env={**os.environ}) as killed:
        wait_for(lambda: bool(readers.readers(bootstrap, space.name)), "the reader has said that it is there")
        killed.send_signal(signal.SIGKILL)
    assert len(readers.readers(bootstrap, space.name)) == 1  # its group outlives it
    retire.refuse_used(space.name, bootstrap, 3.0)  # but it is silent
    assert groups_of(space, bootstrap)


def test_all_of_it_goes_and_the_name_is_free(bootstrap: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CROSSREP_HOME", str(tmp_path))
    monkeypatch.setattr(readers, "EVERY", 1.0)
    space, spec = new_space(bootstrap, tmp_path)
    shared = topics_of(space, bootstrap) - {topic.name for topic in topics.plan(space) if not topic.shared}
    assert len(shared) == 4
    Load(space, bootstrap).send(100)
    used, locked = tmp_path / "fold" / space.name / "w0", tmp_path / "serve" / space.name
    for folder in (used, locked):
        folder.mkdir(parents=True)
        (folder / "lock").touch()
    with (locked / "lock").open() as lock, LocalView("user", space.name, bootstrap) as view:
        fcntl.flock(lock, fcntl.LOCK_EX)
        view.wait(60)
        wait_for(lambda: bool(readers.readers(bootstrap, space.name)), "the reader has said that it is there")
        done = CliRunner().invoke(cli, ["space", "retire", space.name, "--yes"], env={"KAFKA_BOOTSTRAP": bootstrap})
        assert done.exit_code == 1 and "has readers" in str(done.exception) and topics_of(space, bootstrap) > shared
        done = CliRunner().invoke(cli, ["space", "retire", space.name, "--yes", "--force"], env={"KAFKA_BOOTSTRAP": bootstrap})
        assert done.exit_code == 0, (done.output, done.exception)
        assert "a process uses it" in done.output.replace("\n", " ") and locked.exists() and not used.exists()

        def failed() -> bool:
            try:
                view.get(["1"])
                return False
            except CrossrepError as error:
                return "deleted" in str(error)

        wait_for(failed, "the view says that its topic is gone")
    assert topics_of(space, bootstrap) == shared
    with pytest.raises(SpaceError, match="no space"):
        spaces.find(space.name, bootstrap)
    wait_for(lambda: not groups_of(space, bootstrap), "no group is left")
    with pytest.raises(SpaceError, match="no space"):
        retire.retire(space.name, bootstrap, [])

    topics.create(Space.load(spec), bootstrap, 1)
    with LocalView("user", space.name, bootstrap) as fresh:
        fresh.wait(60)
        assert len(fresh) == 0 and kafka.bounds(bootstrap, space.frames_topic)[0] == (0, 0)


def test_what_was_interrupted_is_finished_by_repeating_it(bootstrap: str, tmp_path: Path) -> None:
    space, spec = new_space(bootstrap, tmp_path)
    published = spaces.find(space.name, bootstrap)
    topics.publish(replace(published, retiring=True), bootstrap)  # killed right after it began
    admin = kafka.admin(bootstrap)
    admin.delete_topics([space.frames_topic])[space.frames_topic].result(30)
    for use in (
        lambda: LocalView("user", space.name, bootstrap),
        lambda: topics.check(space, bootstrap),
        lambda: topics.create(Space.load(spec), bootstrap, 1),
        lambda: promote(f"current-{space.name}", space.name, bootstrap),
    ):
        with pytest.raises(SpaceError, match="crossrep space retire"):
            use()
    done = retire.retire(space.name, bootstrap, [])
    assert space.frames_topic not in done.topics and len(done.topics) == 7 and space.name not in spaces.read_all(bootstrap)
