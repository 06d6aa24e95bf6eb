"""Ending training once later days say that it no longer helps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from typing import Generic, TypeVar

from torch import nn

Module = TypeVar("Module", bound=nn.Module)
Batch = TypeVar("Batch")


class EarlyStopping(Generic[Module]):
    """Scores a network after every epoch, and keeps a copy of the best.

    Args:
        score: of the network as it is; more is better.
        patience: epochs in a row without a better score until it ends.
    """

    def __init__(self, network: Module, score: Callable[[Module], float], patience: int):
        self.network, self.score, self.patience = network, score, patience
        self.best = network
        self.scores: list[float] = []

    def watch(self, epochs: Iterable[Iterable[Batch]]) -> Iterator[Batch]:
        """The batches of all epochs that are worth while; asked for the next one, an epoch's last batch has been learnt."""
        highest, since = -math.inf, 0
        for epoch in epochs:
            yield from epoch
            self.scores.append(self.score(self.network))
            since += 1
            if self.scores[-1] > highest:
                self.best, highest, since = deepcopy(self.network), self.scores[-1], 0
            if since == self.patience:
                return
