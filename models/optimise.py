"""The steps of training, and what a progress bar shows of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from rich.progress import Progress, ProgressColumn, Task, TaskID
from rich.text import Text
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # rows int [B, F], labels float [B, 1 + tasks], clicks first, ad bool [B] -> scalar
LEARNING_RATE = 2e-3
SHOWN = 50  # batches between two losses on the progress bar


def adam(module: nn.Module, rate: float = LEARNING_RATE) -> torch.optim.Adam:
    return torch.optim.Adam(module.parameters(), lr=rate, fused=True)


def optimise(
    optimiser: torch.optim.Adam, loss: Loss, batches: Iterator[tuple[Tensor, Tensor, Tensor]], task: TaskID, bar: Progress
) -> None:
    """One pass over `batches`, a step each. The bar shows the mean loss of the last ones."""
    recent = torch.zeros(())
    for step, batch in enumerate(batches, 1):
        optimiser.zero_grad()
        found = loss(*batch)
        found.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        recent = recent.to(found.device) + found.detach()
        if step % SHOWN == 0:
            bar.update(task, loss=float(recent) / SHOWN)
            recent = torch.zeros(())
        bar.advance(task)


class Figures(ProgressColumn):
    """What a task has been told last: its loss, its AUC on later days."""

    def render(self, task: Task) -> Text:
        return Text(", ".join(f"{name} {value:.4f}" for name, value in task.fields.items()), style="cyan")


def bars(shown: bool) -> Progress:
    return Progress(*Progress.get_default_columns(), Figures(), disable=not shown)
