"""Ending training once later days say that it no longer helps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from typing import Generic, TypeVar

from torch import Tensor, nn

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
        for number, epoch in enumerate(epochs):
            yield from epoch
            if number >= len(self.scores):  # else it was scored before training was cut off
                score = self.score(self.network)
                if score > max(self.scores, default=-math.inf):
                    self.best = deepcopy(self.network)
                self.scores.append(score)
            if len(self.scores) - 1 - self.scores.index(max(self.scores)) >= self.patience:
                return

    def resume(self, scores: list[float], best: Mapping[str, Tensor]) -> None:
        """Take up the scores of the epochs that were learnt before, and the weights of the best."""
        self.scores = scores
        self.best = deepcopy(self.network)
        self.best.load_state_dict(best)
