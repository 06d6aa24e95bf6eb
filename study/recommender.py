"""A standard sequential recommender for two domains, with gated cross-attention (GCA) where it is asked for.

Each domain has a stream, which stands at every event of the user, of whichever domain: an event of its own domain is the item's embedding,
one of the other domain a learned token, so that the stream has a state at every time. Layers are SASRec's (Kang and McAuley, ICDM 2018):
self-attention over the stream's own events of the same or an earlier moment. Positions are moments, not places: the order of ties is
arbitrary, and nothing depends on it but which of the tied events a state stands at. One item table serves input and output.

The two streams meet at the end, where each domain's output is a linear layer of both states, and before that at the levels of `crossings`:
level 0 is right after the embeddings (early), level i after layer i. There each stream X reads the other, Y: X'' = X + g([X; X']) ⊙ X',
X' = CrossAttention(q = X, k = v = Y); both read what the other was before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from models.transfer.gated_cross_attention import GatedCrossAttention
from study.split import Batch

LAYERS = 2


@dataclass(frozen=True)
class Architecture:
    """What arms differ in."""

    dim: int
    feed_forward: int  # width of the hidden layer in each of the encoder's feed-forward nets
    crossings: tuple[int, ...] = ()
    heads: int = 2
    dropout: float = 0.3


class Alignment(NamedTuple):
    """Cosines of X and X' at one level, of one domain."""

    level: int
    domain: int
    cosines: Tensor  # float32 [n]: at the domain's own events, where any event of the other could be read


class Recommender(nn.Module):
    """Two domains of `sizes` items, sequences of at most `moments` distinct times."""

    def __init__(self, sizes: tuple[int, int], moments: int, architecture: Architecture):
        super().__init__()
        self.sizes, self.architecture = sizes, architecture
        dim, heads = architecture.dim, architecture.heads
        self.items = nn.Embedding(sum(sizes), dim)
        self.positions = nn.Embedding(moments, dim)
        self.others = nn.Parameter(torch.empty(2, dim))
        for weights in (self.items.weight, self.positions.weight, self.others):
            nn.init.normal_(weights, std=dim**-0.5)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.dropout = nn.Dropout(architecture.dropout)
        # Of each level, domain 0 first.
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                dim, heads, architecture.feed_forward, architecture.dropout, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(2 * LAYERS)
        )
        self.crossings = nn.ModuleList(GatedCrossAttention(dim, dim, heads) for _ in range(2 * len(architecture.crossings)))
        self.outputs = nn.ModuleList(nn.Sequential(nn.Linear(2 * dim, dim), nn.LayerNorm(dim)) for _ in range(2))

    def forward(self, batch: Batch) -> tuple[list[Tensor], list[Alignment]]:
        """The states of both domains, float32 [B, T, dim], and, but while training, how X and X' stand at every crossing."""
        earlier = batch.moment[:, :, None] >= batch.moment[:, None, :]  # [B, T, T]: or of the same moment
        itself = torch.eye(batch.item.shape[1], dtype=torch.bool)  # whoever has nothing else to read
        own = [batch.domain == domain for domain in (0, 1)]
        readable = [earlier & events[:, None, :] for events in own]
        masks = [self._mask(each | itself) for each in readable]
        embedded, positions = self.items(batch.item), self.positions(batch.moment)
        streams = []
        for mine, other, norm in zip(own, self.others, self.norms):
            streams.append(self.dropout(norm(torch.where(mine[:, :, None], embedded, other) + positions)))
        alignments: list[Alignment] = []
        for level in range(LAYERS + 1):
            if level:
                pair = self.layers[2 * level - 2 : 2 * level]
                streams = [layer(x, src_mask=mask) for layer, x, mask in zip(pair, streams, masks)]
            if level in self.architecture.crossings:
                crossed = []
                for domain in (0, 1):
                    crossing = self.crossings[2 * self.architecture.crossings.index(level) + domain]
                    assert isinstance(crossing, GatedCrossAttention)
                    x, y, mask = streams[domain], streams[1 - domain], readable[1 - domain]
                    crossed.append(crossing(x, y, mask))
                    if not self.training:
                        at = own[domain] & mask.any(2)
                        cosines = cosine_similarity(x[at], crossing.attend(x, y, mask)[at], dim=1)
                        alignments.append(Alignment(level, domain, cosines))
                streams = crossed
        joined = torch.cat(streams, 2)
        return [output(joined) for output in self.outputs], alignments

    def _mask(self, readable: Tensor) -> Tensor:
        """float32 [B * heads, T, T]: -inf where not readable; made once for all layers."""
        mask = torch.zeros(readable.shape).masked_fill_(~readable, -torch.inf)
        return mask.repeat_interleave(self.architecture.heads, 0)

    def table(self, domain: int) -> Tensor:
        """float32 [items of the domain, dim]"""
        return self.items.weight[: self.sizes[0]] if domain == 0 else self.items.weight[self.sizes[0] :]


def parameters(model: nn.Module) -> int:
    return sum(each.numel() for each in model.parameters())
