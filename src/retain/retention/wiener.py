"""Each task learns behind a Wiener filter, in a block of its own.

See `retain.retention.filters` for the filter, and `retain.retention.keeper` for what is kept
between the tasks. Nothing is added to the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import nn
from torch.optim import Optimizer

from retain.data.batches import Example
from retain.retention.filters import InputFilter, check_filter
from retain.retention.keeper import MomentKeeper
from retain.retention.method import Task

__all__ = ["Wiener"]


class Wiener(MomentKeeper):
    """LoRA behind a Wiener filter; see the module.

    Args:
        strength: means nothing here; see `weight`, and `retain.retention.auto`.
        weight: what a unit of the old that is read costs, in units of the new that is missed.
        epsilon: of the filter's ridge, relative to the mean of the new text's second moments.
        gain: of A's start over PEFT's, before the filter.
        answers: the share of predicting positions in the second moments; see `input_moments`.
        rows: rows of the source text, and of each task, that are read at most.
        source_weight: of the source text among the old; each task weighs 1.

    Raises:
        ConfigError: a value out of range.
    """

    name: ClassVar[str] = "wiener"
    why_not: ClassVar[dict[str, str]] = dict.fromkeys(
        ("full", "bottleneck", "prefix"), "what it filters is what LoRA's A reads"
    )

    def __init__(
        self,
        strength: float = 0.0,
        *,
        weight: float = 1.0,
        epsilon: float = 1e-3,
        gain: float = 3.0,
        answers: float = 0.5,
        rows: int = 64,
        source_weight: float = 1.0,
    ) -> None:
        check_filter(weight, epsilon, gain, answers, rows)
        super().__init__(strength, answers=answers, rows=rows, source_weight=source_weight)
        self.weight, self.epsilon, self.gain = weight, epsilon, gain
        self.filter: InputFilter | None = None

    def before_task(self, task: Task) -> Sequence[Example]:
        rows = super().before_task(task)
        block = self.begin_block(task)
        assert self.new is not None
        self.filter = InputFilter(
            block.sites, self.new, self.old, weight=self.weight, epsilon=self.epsilon,
            gain=self.gain,
        )  # fmt: skip
        return rows

    def after_step(self, model: nn.Module, optimizer: Optimizer) -> float | None:
        assert self.filter is not None
        self.filter.after_step()
        return super().after_step(model, optimizer)

    def _release(self) -> None:
        if self.filter is not None:
            self.filter.release()
        self.filter = None
        super()._release()
