"""Linear transfer: EE' = EE + r · M.

What a summary of the paper compares with ("directly using representations as features (linear fusion) fails"); what exactly it is, no
text we could reach says. To add the projection to the embeddings is our own choice, as is M = 0 at the start: the click model begins
unchanged.
"""

from __future__ import annotations

from torch import Tensor, nn


class Linear(nn.Module):
    """x [B, width], r [B, representations] -> [B, width]."""

    def __init__(self, width: int, representations: int):
        super().__init__()
        self.width = width
        self.projection = nn.Linear(representations, width, bias=False)
        nn.init.zeros_(self.projection.weight)

    def forward(self, x: Tensor, r: Tensor) -> Tensor:
        projected: Tensor = self.projection(r)
        return x + projected
