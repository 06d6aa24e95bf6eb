"""Attention over half-lives: EE' = [EE; Σ_h a_h · (y_h · V + b)], a = softmax_h(q(EE) · k(y_h) / √rank).

A record can hold the same mean at several half-lives: what somebody did in the last hour, this week, ever. How to weigh them is left open
by the paper; here the impression does it. Its embedded features are the query, the means at their half-lives the tokens. A token holds
what tells how far to trust it too, such as its weight, and every place has a key of its own, as a half-life is no part of its mean.

All of this is our own choice. Beside an attended representation stands whatever has no half-lives: one token, whose share is 1, so that it
passes through a linear layer as in `concat.FieldConcat`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


class HalfLifeAttention(nn.Module):
    """x [B, width], y [B, half-lives, dim] -> [B, adapted]. At the start the shares are nearly equal, so that it is nearly their mean."""

    def __init__(self, width: int, half_lives: int, dim: int, adapted: int = 10, rank: int = 8):
        super().__init__()
        self.query, self.key, self.value = nn.Linear(width, rank), nn.Linear(dim, rank), nn.Linear(dim, adapted)
        self.place = nn.Parameter(0.1 * torch.randn(half_lives, rank))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        query = self.query(x)[:, None]
        attended = functional.scaled_dot_product_attention(query, self.key(y) + self.place, self.value(y))
        return attended.squeeze(1)


class AttendedConcat(nn.Module):
    """x [B, width], r [B, sum of half-lives * dim] -> [B, width + adapted * len(shapes)].

    Args:
        shapes: (half-lives, dim) of each representation in r; (1, dim): there is nothing to weigh.
    """

    def __init__(self, width: int, shapes: Sequence[tuple[int, int]], adapted: int = 10):
        super().__init__()
        self.width, self.shapes = width + adapted * len(shapes), list(shapes)
        self.adapters = nn.ModuleList(
            HalfLifeAttention(width, half_lives, dim, adapted) if half_lives > 1 else nn.Linear(dim, adapted) for half_lives, dim in shapes
        )

    def forward(self, x: Tensor, r: Tensor) -> Tensor:
        parts = torch.split(r, [half_lives * dim for half_lives, dim in self.shapes], dim=1)
        adapted = [
            adapter(x, part.reshape(-1, *shape)) if isinstance(adapter, HalfLifeAttention) else adapter(part)
            for adapter, part, shape in zip(self.adapters, parts, self.shapes)
        ]
        return torch.cat([x, *adapted], dim=1)
