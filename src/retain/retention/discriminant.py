"""A discriminant start for each task, which learns in a block of its own.

See `retain.retention.start` for what A becomes, and `retain.retention.blocks` for the blocks: the
adapter of the tasks before is kept as it is. A stays and B alone learns. Between the tasks S_old is
kept, the sum of the source text's second moments and those of each task, measured before it is
learned: no data, and constant memory. Nothing is added to the loss, and a step costs less than that
of plain LoRA, since A needs no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from retain.data.batches import Example
from retain.errors import ConfigError
from retain.models.adapter import lora_sites
from retain.retention.blocks import Blockwise
from retain.retention.method import Context, Task
from retain.retention.moments import Moments, input_moments
from retain.retention.rows import choose
from retain.retention.start import check_start, set_start

__all__ = ["Discriminant"]


class Discriminant(Blockwise):
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
    weighted: ClassVar[bool] = False

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
        super().__init__(strength)
        check_start(start, gain, epsilon, answers, rows)
        if not (math.isfinite(source_weight) and source_weight >= 0):
            raise ConfigError(
                "source_weight is out of range",
                got=source_weight,
                allowed="a finite number, 0 or above",
                fix="source_weight: 1",
            )
        self.start, self.gain, self.epsilon, self.answers = start, gain, epsilon, answers
        self.rows, self.source_weight, self.train_a = rows, source_weight, train_a
        self.old: Moments | None = None
        self.new: Moments | None = None

    def begin(self, context: Context) -> None:
        super().begin(context)
        self.old = None
        if context.source and self.source_weight and self.start != "random":
            self.old = self._measure(context.source[: self.rows]).times(self.source_weight)

    def before_task(self, task: Task) -> Sequence[Example]:
        if self.start != "random":
            self.new = self._measure(choose(task.examples, self.rows, task.seed))
        block = self.begin_block(task, train_a=self.train_a)
        set_start(
            block.sites, self.new, self.old, kind=self.start,
            gain=self.gain, epsilon=self.epsilon, seed=task.seed, span=block.span,
        )  # fmt: skip
        return task.examples

    def after_task(self, task: Task) -> None:
        super().after_task(task)
        if self.new is not None:
            self.old = self.new if self.old is None else self.new.plus(self.old)
        self.new = None

    def state(self) -> dict[str, Tensor]:
        return {} if self.old is None else self.old.tensors()

    def restore(self, state: dict[str, Tensor]) -> None:
        super().restore(state)
        self.new = self.old = None
        if state:
            self.old = Moments.of_tensors(state)

    def _measure(self, examples: Sequence[Example]) -> Moments:
        context = self.context
        return input_moments(
            context.adapter.model,
            lora_sites(context.adapter.model),
            examples,
            answers=self.answers,
            batch_size=context.batch_size,
            progress=context.progress,
        )
