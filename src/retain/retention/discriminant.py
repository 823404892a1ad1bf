"""A discriminant start for each task, which learns in a block of its own.

See `retain.retention.start` for what A becomes, and `retain.retention.keeper` for what is kept
between the tasks. A stays and B alone learns. Nothing is added to the loss, and a step costs less
than that of plain LoRA, since A needs no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from retain.data.batches import Example
from retain.retention.keeper import MomentKeeper
from retain.retention.method import Task
from retain.retention.start import check_start, set_start

__all__ = ["Discriminant"]


class Discriminant(MomentKeeper):
    """LoRA from a discriminant start; see the module. Without source text the first is principal.

    Args:
        strength: means nothing here.
        start: ``discriminant``, ``principal``, ``null`` or ``random``; see `set_start`.
        gain: of A over PEFT's; under Adam it is a factor of B's learning rate.
        epsilon: what directions that the old text never uses count as, relative to its mean.
        answers: the share of predicting positions in the second moments; see `input_moments`.
        rows: rows of the source text, and of each task, that are read at most.
        source_weight: of the source text among the old; each task weighs 1.
        train_a: let A's block learn too.

    Raises:
        ConfigError: a value out of range.
    """

    name: ClassVar[str] = "discriminant"
    why_not: ClassVar[dict[str, str]] = dict.fromkeys(
        ("full", "bottleneck", "prefix"), "what it chooses are the rows of LoRA's A"
    )

    def __init__(
        self,
        strength: float = 0.0,
        *,
        start: str = "discriminant",
        gain: float = 5.0,
        epsilon: float = 0.01,
        answers: float = 0.5,
        rows: int = 64,
        source_weight: float = 1.0,
        train_a: bool = False,
    ) -> None:
        check_start(start, gain, epsilon, answers, rows)
        super().__init__(strength, answers=answers, rows=rows, source_weight=source_weight)
        self.start, self.gain, self.epsilon, self.train_a = start, gain, epsilon, train_a
        self.reads = start != "random"

    def before_task(self, task: Task) -> Sequence[Example]:
        rows = super().before_task(task)
        block = self.begin_block(task, train_a=self.train_a)
        set_start(
            block.sites, self.new, self.old, kind=self.start,
            gain=self.gain, epsilon=self.epsilon, seed=task.seed,
        )  # fmt: skip
        return rows
