"""Standalone retrieval: score(u, i) = cos(UR, IR), with an adapter trained by InfoNCE if wanted: cos(A(UR), B(IR)).

Stated by public accounts of the paper: the cosine of UR and IR, and an optional adapter trained with InfoNCE. (The authors' code takes
the dot product of a linear layer of UR or CR with IR, trained with BCE.) Our own choices, because no text we could reach states them:

- A and B are linear; where they keep the dimension they start as the identity, so that training begins at the plain cosine;
- negatives are the other positives of the batch, less those of the same item, and at temperature .07;
- log q, an item's share among the positives, is taken off its logit, if given: in a batch, popular items are negatives more often
  (Yi et al., RecSys 2019).

Trained without that correction, the cosine over the temperature tends to log p(i | u) - log q(i): who likes what more than others do.
Whoever serves adds temperature * log of today's popularity, of which a stream knows more than the training days did (`as_cosine`).
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
    temperature: float = 0.07,
    corrected: bool = True,
) -> list[float]:
    """Train on positives, row by row: ur [N, user], ir [N, item] of the item number `item` [N]. Returns each epoch's mean loss.

    Args:
        corrected: by log q; False: the cosine leaves popularity to `as_cosine`.
    """
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
            loss = info_nce(u, v, numbers[i], temperature, log_q[i] if corrected else None)
            loss.backward()  # type: ignore[no-untyped-call]
            adam.step()
            total += len(i) * float(loss.detach())
        losses.append(total / len(numbers))
    return losses


def as_cosine(
    users: NDArray[np.float32], items: NDArray[np.float32], bias: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """u·v + bias(v) for an index of cosines: users [q, d + 2] and items [n, d + 2], whose cosines order the items likewise for every user.

    The bias is a dimension that every user has as 1; one more makes all items equally long (Bachrach et al., RecSys 2014).
    """
    biased = np.column_stack((items, bias))
    square = (biased.astype(np.float64) ** 2).sum(1)
    longer = np.sqrt(square.max(initial=0.0) - square)
    ones, zeros = np.ones(len(users), np.float32), np.zeros(len(users), np.float32)
    return np.column_stack((users, ones, zeros)), np.column_stack((biased, longer)).astype(np.float32)
