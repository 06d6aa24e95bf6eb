"""Standalone retrieval: score(u, i) = cos(UR, IR), with an adapter trained by InfoNCE if wanted: cos(A(UR), B(IR)).

Stated by public accounts of the paper: the cosine of UR and IR, and an optional adapter trained with InfoNCE. (The authors' code takes
the dot product of a linear layer of UR or CR with IR, trained with BCE.) Our own choices, because no text we could reach states them:

- A and B are linear; where they keep the dimension they start as the identity, so that training begins at the plain cosine;
- negatives are the other positives of the batch, less those of the same item, and at temperature .07;
- log q, an item's share among the positives, is taken off its logit, if given: in a batch, popular items are negatives more often
  (Yi et al., RecSys 2019).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional


class RetrievalAdapter(nn.Module):
    """UR [B, user] and IR [B, item] -> vectors of length 1, float32 [B, dim] each: their dot product is the cosine."""

    def __init__(self, user: int, item: int, dim: int | None = None):
        super().__init__()
        self.user, self.item = (nn.Linear(width, dim or item) for width in (user, item))
        for layer in (self.user, self.item):
            nn.init.zeros_(layer.bias)
            if layer.in_features == layer.out_features:
                nn.init.eye_(layer.weight)

    def forward(self, ur: Tensor, ir: Tensor) -> tuple[Tensor, Tensor]:
        return functional.normalize(self.user(ur), dim=1), functional.normalize(self.item(ir), dim=1)


def info_nce(users: Tensor, items: Tensor, ids: Tensor, temperature: float = 0.07, log_q: Tensor | None = None) -> Tensor:
    """-log softmax of each pair's own cosine among those with the batch's other items.

    Args:
        users, items: of length 1, [B, dim], a pair a row.
        ids: int [B], of the items; a row's negatives are the other ids.
        log_q: [B], logarithms of the items' shares among all positives.
    """
    logits = users @ items.T / temperature
    if log_q is not None:
        logits = logits - log_q
    same = (ids[:, None] == ids) & ~torch.eye(len(ids), dtype=torch.bool, device=ids.device)
    return functional.cross_entropy(logits.masked_fill(same, -torch.inf), torch.arange(len(ids), device=ids.device))


def fit(
    adapter: RetrievalAdapter,
    ur: NDArray[np.float32],
    ir: NDArray[np.float32],
    item: NDArray[np.integer],
    *,
    epochs: int = 1,
    batch: int = 512,
    rate: float = 1e-3,
    seed: int = 0,
) -> list[float]:
    """Train on positives, row by row: ur [N, user], ir [N, item] of the item number `item` [N]. Returns each epoch's mean loss."""
    device = adapter.user.weight.device
    users, items, numbers = (torch.from_numpy(array).to(device) for array in (ur, ir, item.astype(np.int64)))
    log_q = (torch.bincount(numbers) / len(numbers)).log()[numbers]
    adam = torch.optim.Adam(adapter.parameters(), lr=rate)
    order, losses = torch.Generator().manual_seed(seed), []
    for _ in range(epochs):
        total = 0.0
        for i in torch.split(torch.randperm(len(numbers), generator=order).to(device), batch):
            adam.zero_grad()
            u, v = adapter(users[i], items[i])
            loss = info_nce(u, v, numbers[i], log_q=log_q[i])
            loss.backward()  # type: ignore[no-untyped-call]
            adam.step()
            total += len(i) * float(loss.detach())
        losses.append(total / len(numbers))
    return losses
