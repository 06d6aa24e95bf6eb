"""What an upstream model must offer, whatever it is made of, and how one is loaded from its folder.

A model is a folder with a `manifest.json`, whose "kind" names the code that reads the rest, and whose "sha256" names every other file of
the model with its digest. To plug in another model, implement `UpstreamModel` and `load(folder, **options)` in a module of your own and
add it to `KINDS`. Importing this module does not import torch.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from crossrep.control.binding import Model
from crossrep.errors import ModelError

KINDS = {"lfm4ads": "models.lfm4ads"}


@runtime_checkable
class UpstreamModel(Protocol):
    """Turns (user, item, event) into vectors. Everything in and out is numpy; the instance may be used by one thread at a time."""

    name: str
    # "user", "item", "event" -> the names of the feature columns it reads. Ids are features too: "user_id", "item_id".
    # An event's fields are "scenario", "branch" and "event_time".
    features: Mapping[str, tuple[str, ...]]
    outputs: Mapping[str, int]  # name of the output -> its dimension, e.g. {"ur": 32, "ir": 32, "cr": 64}

    def encode(self, kind: str, ids: Sequence[str], rows: Sequence[Mapping[str, object]]) -> NDArray[np.int32]:
        """int32 [n, len(features[kind])] for kind "user" or "item"; called once per feature update, not per event.

        Never raises on a value: what is missing, None, NaN or not known becomes the field's unknown value.
        """
        ...

    def encode_events(self, scenario: Sequence[str], branch: Sequence[str], event_time: NDArray[np.float64]) -> NDArray[np.int32]:
        """int32 [n, len(features["event"])]; called for every event. Times are seconds since 1970, UTC."""
        ...

    def forward(self, user: NDArray[np.int32], item: NDArray[np.int32], event: NDArray[np.int32]) -> dict[str, NDArray[np.float32]]:
        """int32 [B, F] of each kind -> every output as float32 [B, dim], finite; row i depends on row i alone."""
        ...


@dataclass(frozen=True)
class Identity(Model):
    """Which weights a worker runs."""

    space: str | None = None  # the space they were registered for


def load(folder: str | Path, **options: Any) -> UpstreamModel:
    """The model in `folder`.

    `options` go to the model's own loader. `crossrep infer` gives `outputs`, the names of what its space aggregates, and `dtype`.
    """
    manifest = read_manifest(folder)
    kind = manifest.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ModelError(f"{Path(folder) / 'manifest.json'}: unknown kind {kind!r}; known: {', '.join(sorted(KINDS))}")
    try:
        module = importlib.import_module(KINDS[kind])
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "safetensors"):
            raise
        raise ModelError(f"a model of kind {kind!r} needs {error.name}: pip install 'crossrep[model]'") from error
    loader: Callable[..., UpstreamModel] = module.load
    return loader(Path(folder), **options)


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of the model in `folder`, a JSON object."""
    path = Path(folder) / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"no model in {folder}: {path} is missing; `models.train` writes one") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    if not isinstance(manifest, dict):
        raise ModelError(f"{path} must hold a JSON object")
    return manifest


def write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write a model's files, each at once, in this order: with the manifest last, a half-replaced folder loads as nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        temporary = folder / f".{file}.{os.getpid()}"
        temporary.write_bytes(content)
        temporary.replace(folder / file)


def versions() -> dict[str, str | None]:
    """Of the code that trains. "commit" is git's, with a + where the checkout has changes; None outside of one."""
    try:
        git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
        commit = subprocess.run(git, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = None
    code = {"crossrep": version("crossrep"), "commit": commit}
    return {**code, "python": platform.python_version(), "torch": version("torch"), "numpy": version("numpy")}
