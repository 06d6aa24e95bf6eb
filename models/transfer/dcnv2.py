"""A plain click model, DCNv2 (Wang et al., WWW 2021), with a place for every way of transfer.

    DCNv2(rows, fields)                                                              nothing is transferred
    DCNv2(rows, fields, plugs={"embedding": Concat(width, k)})                       likewise FieldConcat, Linear, NonLinearAdapter
    DCNv2(rows, fields, plugs={"embedding": FieldAttention(width, dims, fields)})    early; stacked: also at "cross1", ...
    DCNv2(rows, fields, beside=Isomorphic(network))                                  network: an upstream's

width is fields * embedding. Stacked: the cross layers, then the MLP, as in upstream's mix tower.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.towers import linears, mlp


class DCNv2(nn.Module):
    """Table rows int [B, fields], representations r [B, k] -> click logits [B].

    Args:
        rows: of the table, all fields together (`features.Features`).
        plugs: by the name of a layer, embedding, cross1, ..., mlp1, ...: a module (x, r) -> x' of `module.width`, put behind that layer.
            Only the one at "embedding" may change the width.
        beside: a module (x, r) -> [B, module.width] of the embedded features; a linear layer that starts at 0 adds it to the logit.

    Raises:
        ValueError: a plug's name is no layer, or its width does not fit.
    """

    def __init__(
        self,
        rows: int,
        fields: int,
        *,
        embedding: int = 10,
        cross_layers: int = 3,
        hidden: tuple[int, ...] = (256, 64),
        plugs: Mapping[str, nn.Module] | None = None,
        beside: nn.Module | None = None,
    ):
        super().__init__()
        self.table = nn.Embedding(rows, embedding)
        nn.init.normal_(self.table.weight, std=0.01)
        self.plugs = nn.ModuleDict(plugs or {})
        embedded = fields * embedding
        width = _width(self.plugs["embedding"]) if "embedding" in self.plugs else embedded
        self.cross = nn.ModuleList(nn.Linear(width, width) for _ in range(cross_layers))
        self.mlp = mlp(width, *hidden)
        self.head = nn.Linear(hidden[-1], 1)
        widths = {f"cross{i}": width for i in range(1, cross_layers + 1)} | {f"mlp{i}": units for i, units in enumerate(hidden, 1)}
        for name, plug in self.plugs.items():
            if name != "embedding" and _width(plug) != widths.get(name):
                raise ValueError(f"no place for {plug.__class__.__name__} of width {plug.width} at {name!r}; layers are {widths}")
        self.beside = beside
        if beside is not None:
            self.beside_head = nn.Linear(_width(beside), 1, bias=False)
            nn.init.zeros_(self.beside_head.weight)

    def forward(self, rows: Tensor, r: Tensor | None = None) -> Tensor:
        embedded = self.table(rows).flatten(1)
        start = x = self._plugged("embedding", embedded, r)
        for i, layer in enumerate(self.cross, 1):
            x = self._plugged(f"cross{i}", torch.addcmul(x, start, layer(x)), r)
        for i, layer in enumerate(linears(self.mlp), 1):
            x = self._plugged(f"mlp{i}", functional.relu(layer(x)), r)
        logit: Tensor = self.head(x)
        if self.beside is not None:
            logit = logit + self.beside_head(self.beside(embedded, r))
        return logit.squeeze(1)

    def _plugged(self, name: str, x: Tensor, r: Tensor | None) -> Tensor:
        plugged: Tensor = self.plugs[name](x, r) if name in self.plugs else x
        return plugged


def _width(module: nn.Module) -> int:
    width = module.width
    assert isinstance(width, int)
    return width
