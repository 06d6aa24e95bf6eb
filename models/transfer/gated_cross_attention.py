"""Gated cross-attention: X' = CrossAttention(q = X, k = v = Y), X'' = X + g([X; X']) ⊙ X'.

After arXiv 2510.09435 and its authors' slides: the residual form, and that the gate g is a feed-forward net on the concatenation, which
depends on the input and works element by element; used early (after the embeddings) or stacked (after later layers too), and reported with
|cos(X, X')|, which is said to fall in training as quality grows. Our own choices, because no text we could reach states them:

- g = tanh(W2 · silu(W1 · [X; X'])) with W2 = 0 at the start, after the gates of Flamingo's cross-attention: the model begins unchanged, and
  the gate may also subtract;
- no normalisation, no position of a source;
- in a model of fields and not of sequences, X is the fields' embeddings, one token each, and Y the representations, one token each after
  a linear layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


class GatedCrossAttention(nn.Module):
    """X [B, N, dim], Y [B, M, source] -> X'' [B, N, dim].

    `cosine` is the mean |cos(X, X')| over the last call's tokens, a scalar tensor; those with nothing to attend to are left out, and NaN is
    of none.
    """

    cosine: Tensor

    def __init__(self, dim: int, source: int, heads: int = 1):
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim must be a multiple of heads, but {dim} is not one of {heads}")
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, dim) for width in (dim, source, source, dim))
        self.gate = nn.Sequential(nn.Linear(2 * dim, dim), nn.SiLU(), nn.Linear(dim, dim), nn.Tanh())
        for parameter in self.gate[2].parameters():
            nn.init.zeros_(parameter)
        self.register_buffer("cosine", torch.tensor(torch.nan), persistent=False)

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """`mask`: bool, broadcastable to [B, N, M], True: may attend to. A token that may attend to none stays as it is."""
        attended = self.attend(x, y, mask)
        allowed = torch.ones((), dtype=torch.bool, device=x.device) if mask is None else mask.any(-1)
        allowed = allowed.expand(x.shape[:2])
        with torch.no_grad():
            self.cosine = functional.cosine_similarity(x, attended, dim=-1)[allowed].abs().mean()
        gated: Tensor = self.gate(torch.cat((x, attended), dim=-1)) * attended
        return x + gated * allowed[..., None]

    def attend(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """X' [B, N, dim]; of no meaning where the mask is False throughout."""
        q, k, v = (self._split(part) for part in (self.query(x), self.key(y), self.value(y)))
        if mask is not None:
            # With nothing to attend to, softmax would be NaN, in the gradient too.
            mask = (mask | ~mask.any(-1, keepdim=True)).expand(len(x), x.shape[1], y.shape[1])[:, None]
        found = functional.scaled_dot_product_attention(q, k, v, mask)
        attended: Tensor = self.out(found.transpose(1, 2).flatten(2))
        return attended

    def _split(self, x: Tensor) -> Tensor:
        """[B, N, dim] -> [B, heads, N, dim / heads]."""
        return x.reshape(*x.shape[:2], self.heads, -1).transpose(1, 2)


class FieldAttention(nn.Module):
    """Gated cross-attention in a click model: x [B, width] is `tokens` tokens side by side, r [B, sum of dims] one a representation.

    Args:
        dims: the width of each representation in r.
        tokens: e.g. the number of fields, for embedded features.
    """

    def __init__(self, width: int, dims: Sequence[int], tokens: int, heads: int = 1):
        super().__init__()
        if width % tokens:
            raise ValueError(f"width must be a multiple of tokens, but {width} is not one of {tokens}")
        self.width, self.dims, self.tokens = width, list(dims), tokens
        self.sources = nn.ModuleList(nn.Linear(dim, width // tokens) for dim in dims)
        self.attention = GatedCrossAttention(width // tokens, width // tokens, heads)

    @property
    def cosine(self) -> Tensor:
        return self.attention.cosine

    def forward(self, x: Tensor, r: Tensor) -> Tensor:
        """Shapes as above; [B, width]."""
        y = torch.stack([source(part) for source, part in zip(self.sources, torch.split(r, self.dims, dim=1))], dim=1)
        updated: Tensor = self.attention(x.reshape(len(x), self.tokens, -1), y).flatten(1)
        return updated
