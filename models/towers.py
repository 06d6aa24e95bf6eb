"""The network of the triple tower, its layers by name, and its two branches (what it is after, and what is our own choice: lfm4ads.py)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from torch import Tensor, addcmul, nn
from torch.nn import functional

CLICK = "click"  # the main task; others are named by the data set's labels


class TripleTower(nn.Module):
    """F fields in all, d = embedding: one gather gives [B, F, d], of which each tower reads its part.

    Args:
        mlp_layers: of a branch; all but the last, which has `cr` units, have `hidden`.
        shared: one branch for ads and content. False: a branch each.
        tasks: what is predicted besides the click.
    """

    def __init__(
        self,
        rows: int,
        user: int,
        item: int,
        event: int,
        *,
        embedding: int,
        cross_layers: int,
        hidden: int,
        ur: int,
        ir: int,
        cr: int,
        mlp_layers: int = 2,
        shared: bool = False,
        tasks: Sequence[str] = (),
    ):
        super().__init__()
        if ur != ir:
            raise ValueError(f"ur and ir must be equal for their dot product, not {ur} and {ir}")
        if mlp_layers < 1:
            raise ValueError(f"mlp_layers must be at least 1, not {mlp_layers}")
        self.user_fields, self.item_fields, self.tasks = user, item, tuple(tasks)
        width = (user + item + event) * embedding
        branch = [width, *[hidden] * (mlp_layers - 1), cr]
        self.table = nn.Embedding(rows, embedding)
        nn.init.normal_(self.table.weight, std=0.01)
        self.user_tower = mlp(user * embedding, 2 * ur, ur)
        self.item_tower = mlp(item * embedding, 2 * ir, ir)
        self.cross = nn.ModuleList(nn.Linear(width, width) for _ in range(cross_layers))
        self.content_branch = None if shared else mlp(*branch)
        self.content_head = None if shared else nn.Linear(cr, 1 + len(tasks))
        self.ad_branch = mlp(*branch)  # the only one if shared
        self.ad_head = nn.Linear(cr, 1 + len(tasks))

    @property
    def layers(self) -> dict[str, int]:
        """The layers that a CR can be taken from, in order, with their widths."""
        branch = linears(self.ad_branch)
        width = branch[0].in_features
        crossed = {f"cross{i}": width for i in range(1, len(self.cross) + 1)}
        return {"embedding": width, **crossed, **{f"mlp{i}": layer.out_features for i, layer in enumerate(branch, 1)}}

    @property
    def outputs(self) -> dict[str, int]:
        """What `representations` gives, with its dimensions."""
        ur, ir, cr = (linears(layers)[-1].out_features for layers in (self.user_tower, self.item_tower, self.ad_branch))
        return {"ur": ur, "ir": ir, "cr": cr, **self.layers}

    def activations(self, embedded: Tensor) -> dict[str, Tensor]:
        """[B, F, d] -> every layer of `layers` [B, width]: `embedding`, the cross layers, and the ad branch's after their activation.

        All of them are on the way to the last one: naming them costs nothing.
        """
        start = embedded.flatten(1)
        crossed = [start, *crosses(self.cross, start)]
        return dict(zip(self.layers, [*crossed, *mlps(self.ad_branch, crossed[-1])]))

    def representations(self, embedded: Tensor) -> dict[str, Tensor]:
        """[B, F, d] -> UR [B, ur], IR [B, ir], CR [B, cr], which is the last layer of the ad branch's MLP, and the layers by name."""
        n = self.user_fields
        layers = self.activations(embedded)
        return {
            "ur": self.user_tower(embedded[:, :n].flatten(1)),
            "ir": self.item_tower(embedded[:, n : n + self.item_fields].flatten(1)),
            "cr": layers[f"mlp{len(linears(self.ad_branch))}"],
            **layers,
        }

    def logits(self, embedded: Tensor) -> tuple[Tensor, Tensor]:
        """[B, F, d] -> the logits [B, 1 + tasks] of the content branch and of the ad branch, the click's first."""
        found = self.representations(embedded)
        match = (found["ur"] * found["ir"]).sum(1, keepdim=True) / found["ur"].shape[1] ** 0.5
        match = functional.pad(match, (0, len(self.tasks)))  # UR and IR meet for the click alone
        ad: Tensor = self.ad_head(found["cr"]) + match
        if self.content_branch is None or self.content_head is None:
            return ad, ad
        *_, last = mlps(self.content_branch, found[f"cross{len(self.cross)}" if len(self.cross) else "embedding"])
        return self.content_head(last) + match, ad


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with ReLU between them; whatever comes after the last is the caller's."""
    layers: list[nn.Module] = [nn.Linear(widths[0], widths[1])]
    for width, out in pairwise(widths[1:]):
        layers += [nn.ReLU(), nn.Linear(width, out)]
    return nn.Sequential(*layers)


def linears(layers: nn.Sequential) -> list[nn.Linear]:
    return [layer for layer in layers if isinstance(layer, nn.Linear)]


def crosses(layers: nn.ModuleList, start: Tensor) -> Iterator[Tensor]:
    """DCNv2's cross layers, x' = start * (W x + b) + x, one after the other: [B, w] each."""
    crossed = start
    for layer in layers:
        crossed = addcmul(crossed, start, layer(crossed))
        yield crossed


def mlps(layers: nn.Sequential, x: Tensor) -> Iterator[Tensor]:
    """The layers of an `mlp`, each after its activation: ReLU, and SiLU for the last."""
    *hidden, last = linears(layers)
    for layer in hidden:
        x = functional.relu(layer(x))
        yield x
    yield functional.silu(last(x))
