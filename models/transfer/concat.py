"""Concatenation: EE' = [EE; r · A + b].

The representations pass through a small adapter and are features like others. Stated in public accounts of the paper ("concat, CR through a
small adapter"); the authors' code has one linear layer with 10 outputs, as many as an embedding has, and so has this by default.
"""

from __future__ import annotations

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
