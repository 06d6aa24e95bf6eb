"""Representations as torch tensors, and as a layer of a downstream model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from crossrep.errors import SpaceError
from crossrep.extras import extra
from crossrep.keys import MISSING, Id, KeyIndex, Keys
from crossrep.views.answers import Representations
from crossrep.views.view import LocalView

with extra("torch"):
    import torch
    from torch import Tensor, nn

Ids = Sequence[Id] | NDArray[Any] | Tensor
Rows = tuple[NDArray[np.float32], NDArray[np.float32]]  # vectors [n, dim]; confidence and age [n, 2]


class LookedUp(NamedTuple):
    """What a `RepresentationLookup` knows of a batch of ids of shape [B]; or [B, L], say, and then it is [B, L, dim] and [B, L, 1]."""

    vectors: Tensor  # float32 [B, dim]; of a key without one: the view's answer for missing keys (zeros, or the mean of those known)
    confidence: Tensor  # float32 [B, 1]: the weight that is left, decayed to the stream's time; 0: no vector (`latest` columns: 1 or 0)
    age: Tensor  # float32 [B, 1]: seconds from the column's newest event to the stream's time; 0 where confidence is 0


class RepresentationLookup(nn.Module):
    """One column of a view as a layer: ids in, vectors out, as they are in the stream at that moment.

        cr = RepresentationLookup(users, "cr")
        click = nn.Sequential(cr, nn.Linear(cr.dim, 1))
        click(["17", "4711"])  # float32 [2, 1]

    Ids are a list of strings, bytes or integers, an array, or an int64 tensor of any shape (integers stand for their decimals).

    Representations are inputs: the module has no parameters, adds nothing to a state_dict, and no gradient goes into the table. It answers
    on the device it was moved to (`.to("cuda")` moves it with the model around it): a batch is gathered on the CPU and copied once.

    Every call reads the view as it is then, until `refresh` is first called. From then on it answers as of the last `refresh`: an id is
    read once, when first asked for, and decayed to the stream's time at the `refresh`; so whatever computes a step twice (gradient
    checkpointing, a closure) gets the same numbers twice. Call it once a step; it costs nothing by itself.

    Looks up in the process of its view: not in a DataLoader's workers, where every call raises CrossrepError. Let workers deliver ids.
    Copies of the module (`copy.deepcopy`, as averaged models make) share the view; it cannot be pickled.

    Args:
        view: caught up or not; `view.wait()` first unless early zeros do no harm.
        column: one with a vector.

    Raises:
        KeyError: the entity has no vectors of that name.
        SpaceError: the view follows an alias. A model has learnt what the vectors of one space mean; another space's would be noise to it,
            even with the same dimensions. Let a new model come with its space.
    """

    _place: Tensor  # empty; knows the device

    def __init__(self, view: LocalView, column: str):
        super().__init__()
        if view.alias is not None:
            raise SpaceError(
                f"a model cannot follow {view.alias!r}: the vectors it has learnt are those of one space. Open the view of that space, now "
                f"LocalView({view.entity!r}, {view.space.name!r}), and a new one with each new model"
            )
        self.dim = view.dim(column)
        self.view, self.column = view, column
        self._memo: _Memo | None = None
        self.register_buffer("_place", torch.empty(0), persistent=False)

    def refresh(self) -> None:
        """From now on answer as of this moment, for every id, until the next call."""
        self._memo = _Memo(self.dim, self.view.stream_time)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # there is nothing in it to compile
    def forward(self, ids: Ids) -> Tensor:
        """Ids of shape [B] -> float32 [B, dim].

        Raises:
            ValueError: an id is empty or longer than 64 bytes.
            CrossrepError: the view has ended.
        """
        return self.look_up(ids).vectors

    def look_up(self, ids: Ids) -> LookedUp:
        """Vectors, confidence and age; raises as `forward` does."""
        shape = (len(ids),)
        if isinstance(ids, Tensor | np.ndarray):
            shape, ids = tuple(ids.shape), ids.reshape(-1).tolist()
        keys = Keys.of(ids)
        vectors, others = self._read(keys) if self._memo is None else self._memo.read(keys, self._read)
        to = self._place.device
        confidence, age = torch.from_numpy(others).to(to).reshape(*shape, 2, 1).unbind(-2)
        return LookedUp(torch.from_numpy(vectors).to(to).reshape(*shape, self.dim), confidence, age)

    def _read(self, keys: Keys, at: float | None = None) -> Rows:
        answer = self.view.get(keys, at, [self.column])
        values = answer[self.column]
        age = np.subtract(answer.at, values.times, out=np.zeros(len(keys)), where=values.known)
        return values.vectors, np.stack([values.confidence, np.maximum(age, 0.0)], axis=1).astype(np.float32)

    def extra_repr(self) -> str:
        return f"{self.view.entity}.{self.column} of {self.view.space.name}, dim={self.dim}"


class _Memo:
    """Every id's rows as they were first read."""

    def __init__(self, dim: int, at: float):
        self.at = at
        self._index = KeyIndex(1024)
        self._vectors, self._others = np.zeros((1024, dim), np.float32), np.zeros((1024, 2), np.float32)

    def read(self, keys: Keys, fetch: Callable[[Keys, float], Rows]) -> Rows:
        slots, missing = self._index.look_up(keys)
        if missing:
            new = np.flatnonzero(slots == MISSING)
            vectors, others = fetch(keys.take(new), self.at)
            while self._index.size + missing > self._index.capacity:
                self._index.grow(2 * self._index.capacity)
                self._vectors = np.concatenate([self._vectors, np.zeros_like(self._vectors)])
                self._others = np.concatenate([self._others, np.zeros_like(self._others)])
            self._index.insert(keys, slots)
            self._vectors[slots[new]], self._others[slots[new]] = vectors, others
        return self._vectors[slots], self._others[slots]


def tensors(answer: Representations) -> dict[str, Tensor]:
    """See `Representations.to_torch`."""
    return {name: torch.from_numpy(values.vectors) for name, values in answer.items() if values.vectors.shape[1]}
