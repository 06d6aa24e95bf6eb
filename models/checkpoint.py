"""What a training that was cut off goes on from: weights, Adam's moments, the best network so far, in one file beside the model to come.

The generator is not kept: a run begins with its seed again and draws the batches it has learnt once more, which takes a fraction of a
second, so the rest of them are the same. On the same machine with as many threads the model is then the same, bit by bit, as that of a run
that was never cut off.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from models.early_stopping import EarlyStopping

log = logging.getLogger(__name__)

FILE = ".unfinished.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # what Adam keeps of each parameter
Batch = TypeVar("Batch")
About = dict[str, Any]


class Checkpoint:
    """Writes a file every so often while training goes on, and begins with that of a run that was asked the same.

    Args:
        folder: the model's.
        about: what a run depends on, by name; a file of another run is not used, and a warning says what differs.
        every: seconds between two files.
    """

    def __init__(
        self, folder: Path, about: About, network: nn.Module, adam: torch.optim.Adam, stopping: EarlyStopping[Any] | None, every: float
    ):
        self.path, self.every = folder / FILE, every
        self.about: About = json.loads(json.dumps(about))
        self.network, self.adam, self.stopping = network, adam, stopping
        self.learnt = 0  # batches
        if self.path.exists():
            self._resume()

    def watch(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches that have not been learnt; asked for the next one, the last has been."""
        done, written = self.learnt, time.monotonic()
        for number, batch in enumerate(batches, 1):
            if number <= done:
                continue
            yield batch
            self.learnt = number
            if time.monotonic() - written >= self.every:
                self._write()
                written = time.monotonic()

    def remove(self) -> None:
        """The model is written."""
        self.path.unlink(missing_ok=True)

    def _write(self) -> None:
        tensors = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        kept = self.adam.state_dict()["state"]
        tensors |= {f"{moment}.{place}": kept[place][moment] for place in kept for moment in MOMENTS}
        scores = self.stopping.scores if self.stopping is not None else []
        if self.stopping is not None and scores:
            tensors |= {f"best.{name}": value for name, value in self.stopping.best.state_dict().items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".new")
        known = {"about": json.dumps(self.about), "learnt": str(self.learnt), "scores": json.dumps(scores)}
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, temporary, known)
        temporary.replace(self.path)

    def _resume(self) -> None:
        try:
            with safe_open(self.path, "pt") as file:
                known = file.metadata()
                tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
            about, learnt, scores = json.loads(known["about"]), int(known["learnt"]), json.loads(known["scores"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            log.warning("%s cannot be read, so training begins anew: %s", self.path, error)
            return
        if different := [name for name in self.about if about.get(name) != self.about[name]]:
            name = different[0]
            log.warning(
                "%s is of another run (%s: %s then, %s now), so training begins anew", self.path, name, about.get(name), self.about[name]
            )
            return
        self.network.load_state_dict(_named(tensors, "network."))
        kept = {place: {moment: tensors[f"{moment}.{place}"] for moment in MOMENTS} for place, _ in enumerate(self.network.parameters())}
        self.adam.load_state_dict({"state": kept, "param_groups": self.adam.state_dict()["param_groups"]})
        if self.stopping is not None and scores:
            self.stopping.resume(scores, _named(tensors, "best."))
        self.learnt = learnt
        log.warning("training goes on behind the %s batches that %s has learnt", f"{learnt:,}", self.path)


def digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def _named(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
