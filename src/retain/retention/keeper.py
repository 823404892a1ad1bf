"""Methods that know the earlier tasks by second moments: no data, and constant memory.

Between the tasks S_old is kept, the sum of the source text's second moments and those of each task,
measured before it is learned. The adapter of the tasks before is kept as it is, see
`retain.retention.blocks`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from retain.data.batches import Example
from retain.errors import check_number
from retain.models.sites import lora_sites
from retain.retention.blocks import Blockwise
from retain.retention.method import Context, Task
from retain.retention.moments import Moments, input_moments
from retain.retention.state import choose

__all__ = ["MomentKeeper"]


class MomentKeeper(Blockwise):
    """A method with a block for each task and the moments of what came before.

    Args:
        answers: the share of predicting positions in the second moments; see `input_moments`.
        rows: rows of the source text, and of each task, that are read at most.
        source_weight: of the source text among the old; each task weighs 1.

    Attributes:
        old: S_old; None where there is no old text.
        new: S_new of the task that is being learned.

    Raises:
        ConfigError: a weight out of range.
    """

    weighted: ClassVar[bool] = False
    reads: bool = True
    """Whether anything is measured at all."""

    def __init__(self, strength: float, *, answers: float, rows: int, source_weight: float) -> None:
        super().__init__(strength)
        check_number("source_weight is out of range", source_weight, "source_weight: 1")
        self.answers, self.rows, self.source_weight = answers, rows, source_weight
        self.old: Moments | None = None
        self.new: Moments | None = None

    def begin(self, context: Context) -> None:
        super().begin(context)
        self.old = None
        if context.source and self.source_weight and self.reads:
            rows = choose(context.source, self.rows, context.seed)
            self.old = self._measure(rows).times(self.source_weight)

    def before_task(self, task: Task) -> Sequence[Example]:
        if self.reads:
            rows = choose(task.examples, self.rows, task.seed)
            self.new = self._measure(rows, first=False)
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
        self.old = Moments.of_tensors(state) if state else None
        self.new = None

    def _measure(self, examples: Sequence[Example], first: bool = True) -> Moments:
        context = self.context
        return input_moments(
            context.adapter.model,
            lora_sites(context.adapter.model),
            examples,
            answers=self.answers,
            first=first,
            batch_size=context.batch_size,
            progress=context.progress,
        )
