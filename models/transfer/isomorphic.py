"""The isomorphic interaction module: CR' = MLP'(Cross'(x)), upstream's cross layers and MLP copied, then fine-tuned with the click model.

Stated by public accounts of the paper: the interaction module and the MLP are copied and fine-tuned; the authors' code copies the embedding
tables and the first layers of a model of the same shape. Our own choices:

- the copy stands beside the click model, and adds to its logit by a layer that starts at 0 (`dcnv2.py`), so that nothing changes at first;
- it may be frozen for the first steps, until that layer has learnt what to do with it; x gets its gradient all along;
- if x is not as wide as upstream's embedded features, a linear layer comes before it. A click model of upstream's own features
  should rather begin with upstream's embeddings: `model.table.load_state_dict(network.table.state_dict())`.
"""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn

from models.towers import TripleTower, crosses, mlps


class Isomorphic(nn.Module):
    """x [B, width] -> CR' [B, upstream's cr].

    Args:
        network: upstream, whose ad branch is copied; it is left as it is.
        width: of x; None: as upstream's.
        frozen_steps: calls in training mode for which the copies stay as they are. The count is part of the state_dict.
    """

    steps_left: Tensor

    def __init__(self, network: TripleTower, width: int | None = None, frozen_steps: int = 0):
        super().__init__()
        upstream = network.outputs
        self.width = upstream["cr"]
        self.project = nn.Identity() if width in (None, upstream["embedding"]) else nn.Linear(width or 0, upstream["embedding"])
        self.cross = deepcopy(network.cross).float().requires_grad_(True)
        self.mlp = deepcopy(network.ad_branch).float().requires_grad_(True)
        self.register_buffer("steps_left", torch.tensor(frozen_steps))

    def forward(self, x: Tensor, r: Tensor | None = None) -> Tensor:
        """`r` is not used: the module takes the place of the representations."""
        frozen = bool(self.steps_left > 0)
        for copied in (self.cross, self.mlp):
            copied.requires_grad_(not frozen)
        if frozen and self.training:
            self.steps_left -= 1
        start = self.project(x)
        *_, crossed = [start, *crosses(self.cross, start)]
        *_, cr = mlps(self.mlp, crossed)
        return cr
