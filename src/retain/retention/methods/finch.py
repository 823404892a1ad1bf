"""FINCH: a lower learning rate on batches of high loss (Prashant et al. 2026, arXiv 2605.20005).

Its bound: what a step makes a model forget grows at most as the rate times the square root of the
loss. So a step on a batch of loss L is taken at ``rate / max(1, sqrt(strength * L))``: no step is
worth more, in that product, than one at the loss ``1 / strength``, and the rate rises as the loss
falls. The abstract says this much; the exact schedule is this module's own. Adam's steps are linear
in the rate, so the step is made and then shortened.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from retain.data.batches import Batch, Example
from retain.models.processes import several
from retain.retention.bounds import check_strength
from retain.retention.method import Method, Task

__all__ = ["Finch"]


class Finch(Method):
    """Loss-adaptive steps; see the module. In several processes the loss is the mean of theirs.

    Args:
        strength: the inverse of the loss up to which the rate is the whole, per nat per prediction.

    Raises:
        ConfigError: a strength out of range.
    """

    name = "finch"

    def __init__(self, strength: float = 4.0) -> None:
        super().__init__(strength)
        check_strength(strength)
        self.columns: slice | None = None
        self.total, self.count = 0.0, 0
        self.factor = 1.0
        self.before: list[Tensor] = []

    def before_task(self, task: Task) -> Sequence[Example]:
        self.columns, self.total, self.count = task.columns, 0.0, 0
        return task.examples

    def loss(self, model: nn.Module, batch: Batch, logits: Tensor) -> Tensor | None:
        own = logits.detach()[:, self.columns or slice(None)]
        own = own.to(torch.promote_types(own.dtype, torch.float32))
        if self.columns is not None and own.shape[1] == 1:  # a regression
            found = (own[:, 0] - batch.targets.to(own)).square().sum()
        else:
            found = functional.cross_entropy(own, batch.targets.long(), reduction="sum")
        self.total += float(found)
        self.count += len(batch.targets)
        return None

    def before_step(self, model: nn.Module) -> float | None:
        sums = torch.tensor([self.total, float(self.count)], dtype=torch.float64)
        if several():
            sums = sums.to(next(model.parameters()).device)
            torch.distributed.all_reduce(sums)
        mean = float(sums[0] / sums[1])
        self.total, self.count = 0.0, 0
        self.factor = 1 / max(1.0, math.sqrt(self.strength * mean))
        trained = self.context.adapter.parameters().values()
        self.before = [p.detach().clone() for p in trained] if self.factor < 1 else []
        return None

    @torch.no_grad()
    def after_step(self, model: nn.Module, optimizer: Optimizer) -> float | None:
        if self.before:
            trained = self.context.adapter.parameters().values()
            for parameter, before in zip(trained, self.before, strict=True):
                parameter.copy_(before.lerp(parameter, self.factor))
        self.before = []
        return None
