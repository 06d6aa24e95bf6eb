"""The registry: versions are numbered, whole or not at all, and never anything else than what was registered."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from crossrep.errors import CrossrepError, DataError, ModelError
from models.registry import Registry, digest, resolve
from tests.cluster import ROOT


def model(folder: Path, weights: bytes = b"weights", **more: Any) -> Path:
    """A folder as the registry sees one; nothing in it is ever loaded as a model."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {"weights.safetensors": weights, "vocabulary.json": b"{}"}
    for file, content in files.items():
        (folder / file).write_bytes(content)
    digests = {file: hashlib.sha256(content).hexdigest() for file, content in files.items()}
    (folder / "manifest.json").write_text(json.dumps({"kind": "lfm4ads", "outputs": {"ur": 4}, "sha256": digests, **more}))
    return folder


@pytest.fixture(params=["folder", "memory"])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Registry:
    """In a folder, and on what stands for an object store: neither folders nor renames."""
    return Registry(str(tmp_path / "registry") if request.param == "folder" else f"memory://{tmp_path.name}")


def test_versions_are_numbered_and_say_what_they_are(registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert registry.names() == [] and registry.newest("ads") is None
    first = registry.add(model(tmp_path / "a", dataset="some days"), "ads", space="ads-v1")
    second = registry.add(model(tmp_path / "b", b"others"), "ads", parent=1, about={"metrics": {"auc": 0.7}})
    registry.add(model(tmp_path / "b", b"others"), "other")
    assert [first.reference, second.reference] == ["ads@1", "ads@2"] and registry.names() == ["ads", "other"]
    assert registry.versions("ads") == [first, second] == [registry.find("ads@1"), registry.find("ads@latest")]
    assert first.registered.space == "ads-v1" and second.registered.parent == 1 and second.registered.crossrep
    assert first.manifest["dataset"] == "some days" and second.manifest["metrics"] == {"auc": 0.7}
    (tmp_path / "a" / "weights.safetensors").write_bytes(b"changed behind its back")
    registry.fetch(first, tmp_path / "copy")
    assert {path.name: path.read_bytes() for path in (tmp_path / "copy").iterdir() if path.suffix != ".json"} == {
        "weights.safetensors": b"weights"
    }
    monkeypatch.setenv("CROSSREP_HOME", str(tmp_path / "home"))
    folder, identity = resolve("ads@2", registry.url)
    assert (folder / "weights.safetensors").read_bytes() == b"others" and identity.label == "ads@2" and identity.space is None
    assert resolve(str(tmp_path / "b"), None)[1].digest == identity.digest, "a folder and its registered copy are the same model"
    assert identity.digest != digest(first.manifest, "")
    assert resolve("ads@1", registry.url)[1].space == "ads-v1"
    (folder / "weights.safetensors").write_bytes(b"rotten")
    assert (resolve("ads@2", registry.url)[0] / "weights.safetensors").read_bytes() == b"others", "a damaged copy is made anew"


def test_what_is_not_there_or_not_whole(registry: Registry, tmp_path: Path) -> None:
    entry = registry.add(model(tmp_path / "a"), "ads")
    for reference, said in {
        "ads@2": "no model ads@2 in .*known: ads@1.*crossrep models add",
        "x@latest": "known: ads",
        "ads@0": "is no reference: write ads@3",
        "ads": "is no reference",
        "../ads@1": "is no name",
    }.items():
        with pytest.raises(ModelError, match=said):
            registry.find(reference)
    (tmp_path / "a" / "vocabulary.json").write_bytes(b"[]")
    with pytest.raises(ModelError, match=r"vocabulary.json is not the file its manifest names"):
        registry.add(tmp_path / "a", "ads")
    with pytest.raises(ModelError, match=r"vocabulary.json is not the file"):
        resolve(str(tmp_path / "a"), None)
    with pytest.raises(ModelError, match='must name every file of the model with its SHA-256, under "sha256"'):
        registry.add(model(tmp_path / "c", sha256={"../../secret": "0"}), "ads")
    assert registry.versions("ads") == [entry]
    folders = registry._folders("ads")
    folders.fs.pipe_file(folders.path("1", "weights.safetensors"), b"rotten")
    with pytest.raises(ModelError, match=r"1/weights.safetensors is not the file its manifest names.*Take another copy or version"):
        registry.fetch(entry, tmp_path / "copy")
    folders.fs.rm(folders.path("1", "weights.safetensors"))
    with pytest.raises(ModelError, match=r"is gone: ads@1 cannot be used"):
        registry.fetch(entry, tmp_path / "copy")
    folders.fs.pipe_file(folders.path("1", "manifest.json"), b'{"registered": {}}')
    with pytest.raises(ModelError, match="no manifest of a registered model"):
        registry.find("ads@1")


def test_many_at_once_get_numbers_of_their_own(tmp_path: Path) -> None:
    registry = Registry(str(tmp_path / "registry"))
    folders = [model(tmp_path / str(i), str(i).encode()) for i in range(16)]
    with ThreadPoolExecutor(16) as pool:
        entries = list(pool.map(lambda folder: registry.add(folder, "ads"), folders))
    assert sorted(entry.registered.version for entry in entries) == list(range(1, 17))
    for i, entry in enumerate(entries):
        registry.fetch(entry, tmp_path / "copy")
        assert (tmp_path / "copy" / "weights.safetensors").read_bytes() == str(i).encode()


@pytest.mark.parametrize("moment", ["Folders.begin", "Folders.finish", "os.replace"])
def test_a_kill_leaves_nothing_that_anybody_sees(tmp_path: Path, moment: str) -> None:
    registry, folder = Registry(str(tmp_path / "registry")), model(tmp_path / "a")
    first = registry.add(folder, "ads")
    code = f"""
import os, signal
from pathlib import Path
from crossrep.files.publication import Folders
from models.registry import Registry
before = {moment}
def die(*args, **more):
    if {moment!r} == "Folders.begin":
        before(*args, **more)
    os.kill(os.getpid(), signal.SIGKILL)
{moment} = die
Registry({registry.url!r}).add(Path({str(folder)!r}), "ads")
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == -signal.SIGKILL
    assert (tmp_path / "registry" / "ads" / "2").is_dir(), "it had begun"
    assert registry.versions("ads") == [first] == [registry.find("ads@latest")]
    again = registry.add(folder, "ads")
    assert again.reference == "ads@3" and registry.versions("ads") == [first, again]
    assert {path.name for path in (tmp_path / "registry" / "ads").iterdir()} == {"1", "3"}
    assert not list((tmp_path / "registry").rglob("*.part"))


def test_where_it_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(CrossrepError, match="nowhere://x cannot be opened"):
        Registry("nowhere://x").names()
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file/x cannot be written.*your rights"):
        Registry(str(tmp_path / "file" / "x")).add(model(tmp_path / "a"), "ads")
