"""A space takes the vectors of one model: who is first, who is refused, and that a worker which slept through a change stands back."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import pytest

from crossrep import kafka
from crossrep.control import binding, spaces
from crossrep.control.binding import Model
from crossrep.errors import ModelError, StateError
from crossrep.spec import Space, infer_group
from models import upstream
from models.registry import Registry, resolve
from models.upstream import Identity
from streams.inference.infer import check_model
from tests.cluster import ROOT, Workers, free_port, new_space, prove, ready, settled, wait_for
from tests.streams.small_model import SPEC, Feed, inferred, is_stopped, small_dataset, small_model


def other_model(folder: Path) -> Path:
    """The small model in other bytes: for the digest, another one."""
    found = upstream.read_manifest(small_model())
    vocabulary = (small_model() / "vocabulary.json").read_bytes() + b"\n"
    files = {"weights.safetensors": (small_model() / "weights.safetensors").read_bytes(), "vocabulary.json": vocabulary}
    digests = {file: hashlib.sha256(content).hexdigest() for file, content in files.items()}
    upstream.write(folder, {**files, "manifest.json": json.dumps({**found, "sha256": digests}).encode()})
    return folder


def infer(workers: Workers, space: Space, model: str, name: str, *more: str) -> tuple[subprocess.Popen[bytes], int]:
    port = free_port()
    options = ["--name", name, "--port", str(port), "--session-timeout", "3", *more]
    return workers.start("infer", space.name, "--model", model, *options), port


def nobody(group: str, bootstrap: str) -> bool:
    admin = kafka.admin(bootstrap)  # its futures never end once it is gone
    (asked,) = admin.describe_consumer_groups([group]).values()
    return not asked.result(30).members


def test_the_first_worker_binds_the_space_and_others_are_refused(bootstrap: str, workers: Workers, tmp_path: Path) -> None:
    space, path = new_space(bootstrap, tmp_path, SPEC, partitions=2)
    other = other_model(tmp_path / "other")
    registry = Registry(str(tmp_path / "registry"))
    registry.add(small_model(), "small")
    place = ["--registry", registry.url]
    feed = Feed(space, small_dataset(), bootstrap)
    workers.fold(path)
    first, port = infer(workers, space, "small@1", "i0", *place)
    wait_for(lambda: ready(port), "the first one is ready")
    feed.send(300)
    wait_for(lambda: inferred(space, bootstrap) and settled(space, bootstrap), "folded")
    published = spaces.find(space.name, bootstrap)
    bound = binding.read(published, bootstrap)
    assert bound is not None and bound.label == "small@1"
    _, stranger = resolve(str(other), None)
    with pytest.raises(ModelError, match=rf"space '{space.name}' is that of model small@1 \({bound.digest[:12]}\).*are never averaged"):
        binding.bind(published, stranger, bootstrap)
    with pytest.raises(StateError, match=rf"workers of group {infer_group(space)} are running \(i0\): stop them all first"):
        binding.bind(published, stranger, bootstrap, accept=True)

    first.send_signal(signal.SIGSTOP)  # it sleeps through what follows
    wait_for(lambda: is_stopped(first) and nobody(infer_group(space), bootstrap), "its session is over")
    accepted, port = infer(workers, space, str(other), "i1", "--accept-model")
    wait_for(lambda: ready(port), "the other one is ready")
    feed.send(300)
    wait_for(lambda: inferred(space, bootstrap) and settled(space, bootstrap), "folded")
    first.send_signal(signal.SIGCONT)
    assert first.wait(60) == 1, "it wakes up and stands back"
    assert "Vectors of two models" in (tmp_path / "1-infer.log").read_text()
    feed.send(300)
    wait_for(lambda: inferred(space, bootstrap) and settled(space, bootstrap), "folded")
    prove(space, bootstrap, feed.counts)
    assert accepted.poll() is None


def test_of_many_that_begin_at_once_one_model_wins(bootstrap: str, tmp_path: Path) -> None:
    space, _ = new_space(bootstrap, tmp_path, partitions=1)
    published = spaces.find(space.name, bootstrap)
    models = [Identity(f"m@{number}", f"{number}" * 64) for number in (1, 1, 2, 2)]
    barrier = Barrier(len(models))

    def begin(model: Identity) -> str:
        barrier.wait()
        try:
            binding.bind(published, model, bootstrap)
        except ModelError as error:
            return f"refused: {error}"
        return model.label

    with ThreadPoolExecutor(len(models)) as pool:
        ends = list(pool.map(begin, models))
    bound = binding.read(published, bootstrap)
    assert bound is not None and [end for end in ends if not end.startswith("refused")] == [bound.label] * 2
    assert all(f"is that of model {bound.label}" in end for end in ends if end.startswith("refused"))

    anew = replace(published, topic_ids={**published.topic_ids, space.frames_topic: "another"})
    assert binding.read(anew, bootstrap) is None, "the frames are gone, and so is what the model wrote"
    with pytest.raises(ModelError, match="is no model's any more, not of m@1"):
        binding.check(anew, models[0], bootstrap)


def test_what_a_killed_binder_leaves_open_hides_nothing(bootstrap: str, tmp_path: Path) -> None:
    (space, _), (other, _) = (new_space(bootstrap, tmp_path, partitions=1) for _ in range(2))
    code = f"""
import os, signal
from crossrep import kafka
from crossrep.control import binding, spaces
retried = kafka.retried
def killed_at_commit(call, *more):
    if getattr(call, "__name__", "") == "commit_transaction":
        call.__self__.flush(30)
        os.kill(os.getpid(), signal.SIGKILL)
    return retried(call, *more)
kafka.retried = killed_at_commit
binding.bind(spaces.find({other.name!r}, {bootstrap!r}), binding.Model("killed@1", "0"), {bootstrap!r})
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    published = spaces.find(space.name, bootstrap)
    binding.bind(published, Model("m@1", "1"), bootstrap)
    with pytest.raises(ModelError, match="is that of model m@1"):
        binding.bind(published, Model("m@2", "2"), bootstrap)


def test_a_model_must_fit_the_space() -> None:
    space = Space.parse(SPEC.format(name="a-v1", partitions=1))
    model = upstream.load(small_model())
    check_model(space, model, Identity("m@1", "0", "a-v1"))
    check_model(space, model, Identity("m@1", "0", None))
    with pytest.raises(ModelError, match="model m@1 was registered for space 'a-v2', not for 'a-v1'"):
        check_model(space, model, Identity("m@1", "0", "a-v2"))
    wider = Space.parse(SPEC.format(name="a-v1", partitions=1).replace("dim = 32", "dim = 16"))
    with pytest.raises(ModelError, match=r"space 'a-v1' needs ur\[16\], but model .* gives ur\[32\]"):
        check_model(wider, model, Identity("m@1", "0"))
