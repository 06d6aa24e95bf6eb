"""Concatenation: EE' = [EE; r · A + b].

The representations pass through a small adapter and are features like others. Stated in public accounts of the paper ("concat, CR through a
small adapter"); the authors' code has one linear layer with 10 outputs, as many as an embedding has, and so has this by default. Of several
representations, `FieldConcat` gives each an adapter of its own, so that they are as many fields more: through one adapter for all of them
they would have to share its few outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Concat(nn.Module):
    """x [B, width], r [B, representations] -> [B, width + adapted]."""

    def __init__(self, width: int, representations: int, adapted: int = 10):
        super().__init__()
        self.width = width + adapted
        self.adapter = nn.Linear(representations, adapted)

    def forward(self, x: Tensor, r: Tensor) -> Tensor:
        return torch.cat((x, self.adapter(r)), dim=1)


class FieldConcat(nn.Module):
    """x [B, width], r [B, sum of dims] -> [B, width + adapted * len(dims)]. Args: dims: the width of each representation in r."""

    def __init__(self, width: int, dims: Sequence[int], adapted: int = 10):
        super().__init__()
        self.width, self.dims = width + adapted * len(dims), list(dims)
        self.adapters = nn.ModuleList(nn.Linear(dim, adapted) for dim in dims)

    def forward(self, x: Tensor, r: Tensor) -> Tensor:
        parts = torch.split(r, self.dims, dim=1)
        return torch.cat([x, *(adapter(part) for adapter, part in zip(self.adapters, parts))], dim=1)
