"""The non-linear adapter: EE' = EE ⊙ σ(r · M).

Stated in a summary of the paper, for r = CR, and in the authors' code: M is a linear layer with a bias, one gate for each number of EE.

`gain` is our own: EE' = gain · EE ⊙ σ(r · M). The formula is gain = 1, and about halves the embeddings at the start. With gain = 2, as in
LHUC (Swietojanski and Renals, 2014), M is 0 at the start, and the click model begins unchanged, from where others begin.
"""

from __future__ import annotations

from torch import Tensor, nn


class NonLinearAdapter(nn.Module):
    """x [B, width], r [B, representations] -> [B, width]. M is 0 at the start if gain is 2, else random."""

    def __init__(self, width: int, representations: int, gain: float = 1.0):
        super().__init__()
        self.width, self.gain = width, gain
        self.gate = nn.Linear(representations, width)
        if gain == 2.0:
            nn.init.zeros_(self.gate.weight)
            nn.init.zeros_(self.gate.bias)

    def forward(self, x: Tensor, r: Tensor) -> Tensor:
        gate: Tensor = self.gate(r).sigmoid()
        return self.gain * x * gate
