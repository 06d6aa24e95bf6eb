"""Logistic regression on the same features, trained beside the triple tower: what a network must at least beat."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from models.lfm4ads import fused

EPOCHS = 10  # it starts from zero and cannot overfit by interactions: it gains until here
L2 = 1e-2


class Logistic(nn.Module):
    """Logistic regression on the one-hot fields: a table of one column, whose rows are summed."""

    def __init__(self, rows: int, l2: float = L2):
        super().__init__()
        self.l2 = l2
        self.table = nn.Embedding(rows, 1)
        nn.init.zeros_(self.table.weight)
        self.bias = nn.Parameter(torch.zeros(()))

    def logits(self, rows: Tensor) -> Tensor:
        """int [B, F] -> [B]."""
        logits: Tensor = self.table(rows).sum((1, 2)) + self.bias
        return logits

    def loss(self, rows: Tensor, labels: Tensor, ad: Tensor) -> Tensor:
        loss = binary_cross_entropy_with_logits(self.logits(rows), labels[:, 0])
        weights: Tensor = self.table(rows)  # [B, F, 1]
        return loss + self.l2 * weights.square().sum((1, 2)).mean()

    def predict(self, user: NDArray[np.int32], item: NDArray[np.int32], event: NDArray[np.int32]) -> NDArray[np.float32]:
        """float32 [B]: probability of a click."""
        with torch.inference_mode():
            probability: NDArray[np.float32] = self.logits(fused(user, item, event)).sigmoid().numpy()
            return probability
