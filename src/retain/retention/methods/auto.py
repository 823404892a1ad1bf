"""The recipe (`retain.retention.recipe`), a task at a time.

Before the first task the curvature of the source text is measured at the base model, where there is
any. Each further task learns in fresh rows; after each, what it relies on joins the past.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.optim import Optimizer

from retain.data.batches import Example
from retain.retention.bounds import check_max_rank
from retain.retention.filter import Filter
from retain.retention.growing import Growing
from retain.retention.loader import reader_of
from retain.retention.method import Context, Task
from retain.retention.recipe import Recipe
from retain.retention.state import choose
from retain.types import STRENGTH, FactorRank, Gain, HeadStart, Update

__all__ = ["Auto", "Wiener"]


class Auto(Growing):
    """The recipe; see the module. Its options are those of `Recipe` and of `Filter`.

    Args:
        strength: nats of task loss that one nat of predicted forgetting weighs.
        parts: of the recipe; all by default.
        budget: in place of the strength, nats per source token.
        update: ``gradient`` or ``proximal``.
        weight: what reading a unit of the old costs, in units of the new that is missed.
        epsilon: of the filter's ridge.
        gain: of A's start over PEFT's, before the filter; or ``matched``.
        answers: the share of predicting positions in the rows' second moments.
        rows: rows of the source text, and of each task, that are read at most.
        max_rank: of the whole adapter, which is cut beyond it: twice a task's at least, four
            times by default.
        kl: nats of task loss that one nat of the true divergence on source rows weighs, on average
            over steps (`retain.retention.output_kl`); 0 for none.
        factor_rank: `rank` of `retain.fit_curvature`, for the tasks too. Sketches of rank 64 take a
            tenth of the memory, and a faster fit, start and step.

    Raises:
        ConfigError: a value out of range.
    """

    name: ClassVar[str] = "auto"
    adapters: ClassVar[frozenset[str]] = frozenset({"lora"})
    why_not: ClassVar[dict[str, str]] = dict.fromkeys(
        ("full", "bottleneck", "prefix"), "what it filters is what LoRA's A reads"
    )
    head: ClassVar[HeadStart] = "fitted"
    later: ClassVar[dict[str, Any]] = {"kl": 0.0, "factor_rank": "auto"}

    def __init__(
        self,
        strength: float = STRENGTH,
        *,
        parts: Sequence[str] | None = None,
        budget: float | None = None,
        update: Update = "gradient",
        weight: float = 1.0,
        epsilon: float = 1e-3,
        gain: Gain = 3.0,
        answers: float = 0.5,
        rows: int = 64,
        max_rank: int | None = None,
        kl: float = 0.0,
        factor_rank: FactorRank = "auto",
    ) -> None:
        super().__init__(strength)
        options = Filter(gain, epsilon, answers, rows, weight)
        self.recipe = Recipe(
            None, strength, parts=parts, budget=budget, update=update, filter=options, kl=kl
        )
        self.fits_head = "head" in self.recipe.parts
        self.max_rank, self.factor_rank = max_rank, factor_rank

    def begin(self, context: Context) -> None:
        super().begin(context)
        check_max_rank(self.max_rank, self.rank)
        if self.recipe.kl.weight:
            context.check_source("the KL needs source text", "give a source, or kl: 0")
        self.recipe.curvature = self.recipe.past = None
        if context.source and self.recipe.parts & {"filter", "force"}:
            rows = choose(context.source, self.recipe.options.rows, context.seed)
            self.recipe.curvature = context.fit_source(
                rows, seed=context.seed, rank=self.factor_rank
            )

    def before_task(self, task: Task) -> Sequence[Example]:
        adapter, recipe = self.context.adapter, self.recipe
        recipe.release()
        seed = self.context.seed + task.index
        self.attach(recipe.grow(adapter.model, self.rank, seed=seed, max_rank=self.max_rank))
        recipe.begin(
            adapter.model, reader_of(task.examples), seed=task.seed,
            probe=() if recipe.budget is None else self.context.probe(),
            source=self.context.source,
        )  # fmt: skip
        return task.examples

    def before_step(self, model: nn.Module) -> float | None:
        return self.recipe.before_optimizer()

    def after_step(self, model: nn.Module, optimizer: Optimizer) -> float | None:
        return self.recipe.after_step(optimizer)

    def after_task(self, task: Task) -> None:
        self.recipe.end()
        if task.index + 1 < self.context.tasks and self.recipe.parts & {"filter", "force"}:
            self.recipe.consolidate(
                self.context.adapter.model, task.examples, columns=task.columns, seed=task.seed,
                rank=self.factor_rank,
            )  # fmt: skip

    def state(self) -> dict[str, Tensor]:
        return self.recipe.state(source=False)

    def constant(self) -> dict[str, Tensor]:
        return self.recipe.state(past=False)

    def restore(self, state: dict[str, Tensor]) -> None:
        self.recipe.restore(state)

    def memory(self) -> int:
        return self.recipe.memory()


class Wiener(Auto):
    """The recipe without its force and its fitted head."""

    name: ClassVar[str] = "wiener"
    weighted: ClassVar[bool] = False
    head: ClassVar[HeadStart] = "drawn"

    def __init__(
        self,
        strength: float = 0.0,
        *,
        weight: float = 1.0,
        epsilon: float = 1e-3,
        gain: Gain = 3.0,
        answers: float = 0.5,
        rows: int = 64,
    ) -> None:
        super().__init__(
            strength, parts=("rows", "filter"), weight=weight, epsilon=epsilon, gain=gain,
            answers=answers, rows=rows,
        )  # fmt: skip
