"""A triple tower after LFM4Ads (arXiv 2508.14948): user tower -> UR, item tower -> IR, mix tower -> CR.

From what is public about the paper: three towers; content and ad samples take separate branches; the representations handed on are UR,
IR and the CR, which is the penultimate MLP layer of the mix tower's *ad* branch. DCNv2 cross layers are among the interactions it compares.

Our own choices, because no text we could reach states them:

- widths, depths, one embedding table for all fields; the embeddings and the cross layers are shared, the branches are an MLP each. With
  `shared`, to compare, there is one MLP with one head for all samples;
- the penultimate layers end in SiLU: with ReLU, 22 to 28 of the CR's 64 dimensions were zero for everyone, at the same AUC;
- the logit of a branch is its head plus dot(UR, IR) / sqrt(dim), which is what trains the two outer towers;
- the ad branch learns from *all* samples, ads weighing more (`train.py`), the content branch from content samples. With 1 % ads, an ad
  branch fed by ads alone would see some 1,400 samples of our real data: its penultimate layer would stay near its random start, and that
  layer is the product. It is also asked about content samples, since every CR comes from it, so it must have seen some;
- other tasks than the click are further units of the heads, without the dot product: the branches learn from them, UR and IR do not.

A space may take a CR from any layer of the mix tower: `embedding`, `cross1`, ..., `mlp1`, ... are sources as `cr` is, which is another
name for the last of them. The authors' public code compares its own (there CR_0 .. CR_5).
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load as parse_weights
from safetensors.torch import save as dump_weights
from torch import Tensor, nn

from crossrep.errors import ModelError
from models.devices import has_fast_bfloat16
from models.features import BRANCHES, EVENT_FIELDS, Features
from models.towers import CLICK, TripleTower
from models.upstream import read_manifest, write

log = logging.getLogger(__name__)

Dtype = Literal["auto", "float32", "bfloat16"]
# What models saved before it had an entry were built with is that entry's default in TripleTower.
ARCHITECTURE: Mapping[str, Any] = {
    "embedding": 10,
    "cross_layers": 3,
    "hidden": 256,
    "mlp_layers": 2,
    "ur": 32,
    "ir": 32,
    "cr": 64,
    "shared": False,
    "tasks": (),
}
OUTPUTS = ("ur", "ir", "cr")  # unless others are asked for
BRANCH = EVENT_FIELDS.index("branch")


class Vectors(nn.Module):
    """The part of a network that a stream asks for."""

    def __init__(self, network: TripleTower, outputs: Sequence[str]):
        super().__init__()
        self.network, self.outputs = network, tuple(outputs)

    def forward(self, rows: Tensor) -> tuple[Tensor, ...]:
        """int32 [B, F] rows of the table -> float32 [B, dim] of each output. Traced, what leads to none of them is not computed."""
        found = self.network.representations(self.network.table(rows))
        return tuple(found[name].float() for name in self.outputs)


def traced(module: nn.Module, example: Tensor) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """The module as one call that leaves Python's lock to other threads until it ends.

    Called op by op it asks for the lock 40 times a batch: beside a thread of pure Python, 44 µs an event instead of 11 (bfloat16). torch
    would rather have torch.export, whose result keeps the lock unless a C++ compiler is there.
    """
    trace: Any = torch.jit.trace  # it has no types
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore", FutureWarning)
        call: Callable[[Tensor], tuple[Tensor, ...]] = trace(module.eval(), example, check_trace=False)
    return call


class LFM4Ads:
    """A trained triple tower as an `UpstreamModel`, on the CPU. The caller decides on threads (`torch.set_num_threads`).

    Args:
        outputs: what `forward` gives: ur, ir, cr, or layers of the network by name (`TripleTower.layers`).

    Raises:
        ModelError: the network has no such output.
    """

    def __init__(
        self,
        name: str,
        fields: Features,
        network: TripleTower,
        *,
        outputs: Sequence[str] = OUTPUTS,
        dtype: Literal["float32", "bfloat16"] = "float32",
    ):
        self.name = name
        self.fields = fields
        self.features: Mapping[str, tuple[str, ...]] = fields.names
        self.network = network.eval().requires_grad_(False)
        if dtype == "bfloat16":
            self.network.to(torch.bfloat16)
        offered = network.outputs
        if unknown := [output for output in outputs if output not in offered]:
            given = ", ".join(f"{output}[{size}]" for output, size in offered.items())
            raise ModelError(f"model {name!r} gives no {unknown[0]!r}; it can give {given}")
        self.outputs: Mapping[str, int] = {output: offered[output] for output in outputs}
        example = torch.zeros((2, sum(map(len, self.features.values()))), dtype=torch.int32)
        self._vectors = traced(Vectors(self.network, tuple(self.outputs)), example)
        # The row each branch has in the table, so that `predict` sees from an encoded event which head is asked for.
        self.ad_row = int(fields.offsets["event"][BRANCH]) + fields.fields["event"][BRANCH].encode(BRANCHES)[BRANCHES.index("ad")]

    def encode(self, kind: str, ids: Sequence[str], rows: Sequence[Mapping[str, object]]) -> NDArray[np.int32]:
        """int32 [n, fields of `kind`]; see `UpstreamModel`."""
        return self.fields.encode(kind, ids, rows)

    def encode_events(self, scenario: Sequence[str], branch: Sequence[str], event_time: NDArray[np.float64]) -> NDArray[np.int32]:
        """int32 [n, 3]; see `UpstreamModel`."""
        return self.fields.encode_events(scenario, branch, event_time)

    def forward(self, user: NDArray[np.int32], item: NDArray[np.int32], event: NDArray[np.int32]) -> dict[str, NDArray[np.float32]]:
        """int32 [B, F] of each kind -> float32 {"ur": [B, 32], "ir": [B, 32], "cr": [B, 64]}, or whatever `outputs` says."""
        with torch.inference_mode():
            vectors = self._vectors(fused(user, item, event))
        return {name: vector.numpy() for name, vector in zip(self.outputs, vectors)}

    def predict(self, user: NDArray[np.int32], item: NDArray[np.int32], event: NDArray[np.int32], task: str = CLICK) -> NDArray[np.float32]:
        """float32 [B]: probability of a click, or of another task, by the head of each event's own branch (unknown ones: content)."""
        unit = (CLICK, *self.network.tasks).index(task)
        with torch.inference_mode():
            content, ad = (logits[:, unit] for logits in self.network.logits(self.network.table(fused(user, item, event))))
            is_ad = torch.from_numpy(event[:, BRANCH] == self.ad_row)
            return torch.where(is_ad, ad, content).float().sigmoid().numpy()


def fused(user: NDArray[np.int32], item: NDArray[np.int32], event: NDArray[np.int32]) -> Tensor:
    """int32 [B, F]: one index tensor, so that the embeddings of a batch are one gather."""
    return torch.from_numpy(np.concatenate((user, item, event), axis=1))


def agree(a: LFM4Ads, b: LFM4Ads, events: int = 512) -> bool:
    """Do two models give the same vectors for random events, to a cosine of .99 once what all vectors share is taken off?"""
    rng = np.random.default_rng(0)
    drawn = [
        np.stack([rng.integers(0, field.size, events) for field in a.fields.fields[kind]], axis=1) + a.fields.offsets[kind]
        for kind in ("user", "item", "event")
    ]
    rows = [rows.astype(np.int32) for rows in drawn]
    ours, theirs = a.forward(*rows), b.forward(*rows)
    for name, vectors in ours.items():
        x, y = vectors - vectors.mean(axis=0), theirs[name] - vectors.mean(axis=0)
        if ((x * y).sum(axis=1) < 0.99 * np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)).any():
            return False
    return True


def build(fields: Features, architecture: Mapping[str, Any]) -> TripleTower:
    """An untrained network for these fields; seed torch first if it matters."""
    user, item, event = (len(fields.fields[kind]) for kind in ("user", "item", "event"))
    return TripleTower(fields.rows, user, item, event, **architecture)


def save(
    folder: Path, name: str, fields: Features, network: TripleTower, architecture: Mapping[str, Any], about: Mapping[str, Any]
) -> None:
    """Write weights, vocabulary and, last, the manifest with their digests."""
    weights = {key: value.detach().float().contiguous() for key, value in network.state_dict().items()}
    files = {"weights.safetensors": dump_weights(weights), "vocabulary.json": json.dumps(fields.to_json()).encode()}
    manifest = {
        "kind": "lfm4ads",
        "name": name,
        "features": fields.names,
        "outputs": network.outputs,
        "architecture": dict(architecture),
        **about,
        "sha256": {file: sha256(content).hexdigest() for file, content in files.items()},
    }
    files["manifest.json"] = (json.dumps(manifest, indent=2) + "\n").encode()
    write(folder, files)


def load(folder: Path, *, outputs: Sequence[str] = OUTPUTS, dtype: Dtype = "float32") -> LFM4Ads:
    """The model that `save` wrote to `folder`. `dtype="auto"` is bfloat16 where the CPU is fast at it and the vectors stay the same."""
    if dtype not in get_args(Dtype):
        raise ValueError(f"dtype must be auto, float32 or bfloat16, not {dtype!r}")
    if dtype != "auto":
        return _load(folder, outputs, dtype)
    exact = _load(folder, outputs, "float32")
    if not has_fast_bfloat16():
        return exact
    fast = _load(folder, outputs, "bfloat16")
    if agree(exact, fast):
        log.info("the model computes in bfloat16: its vectors are the same as in float32")
        return fast
    log.warning("the model computes in float32: in bfloat16 its vectors are others")
    return exact


def _load(folder: Path, outputs: Sequence[str], dtype: Literal["float32", "bfloat16"]) -> LFM4Ads:
    manifest = read_manifest(folder)
    try:
        name, architecture, digests = manifest["name"], manifest["architecture"], manifest["sha256"]
        files = {file: (folder / file).read_bytes() for file in ("weights.safetensors", "vocabulary.json")}
        for file, content in files.items():
            if sha256(content).hexdigest() != digests[file]:
                raise ModelError(f"{folder / file} is not the file its manifest was written with; copy the whole folder or train again")
        fields = Features.from_json(json.loads(files["vocabulary.json"]))
        network = build(fields, architecture)
        network.load_state_dict(parse_weights(files["weights.safetensors"]))
    except (KeyError, TypeError, ValueError, RuntimeError, OSError, SafetensorError) as error:
        raise ModelError(f"the lfm4ads model in {folder} cannot be read: {error!r}") from error
    if not all(bool(torch.isfinite(value).all()) for value in network.state_dict().values()):
        raise ModelError(f"{folder / 'weights.safetensors'} holds values that are not finite")
    return LFM4Ads(name, fields, network, outputs=outputs, dtype=dtype)
