"""Softening after each task: plain LoRA, then back to a budget of forgetting without training.

The adapter of all tasks so far is pulled back along what the source text relies on, and not along
what the task just learned does (`retain.soften`), until the KL divergence to the base model,
measured on source text, is within the budget. Nothing happens while a task is learned.
"""

from __future__ import annotations

from typing import ClassVar

from retain.errors import check_number
from retain.retention.bounds import check_budget
from retain.retention.measure import Reference
from retain.retention.method import Context, Task
from retain.retention.methods.penalty import CurvatureMethod
from retain.retention.soften.adapter import soften
from retain.retention.state import choose

__all__ = ["Soften"]


class Soften(CurvatureMethod):
    """Plain LoRA that is softened after each task; see the module.

    Args:
        budget: nats per token of source text, for all tasks together.
        rows: rows of the source text, and of each task, whose curvature is measured.
        probe: rows of the source text on which the KL is measured.

    Raises:
        ConfigError: a value out of range.
    """

    name: ClassVar[str] = "soften"
    adapters: ClassVar[frozenset[str]] = frozenset({"lora"})
    weighted: ClassVar[bool] = False
    why_not: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("full", "bottleneck", "prefix"), "what it softens is an update s B A"),
        "classifier": "a new head has no answers of the base model to be held to",
    }

    def __init__(self, *, budget: float = 0.02, rows: int = 64, probe: int = 16) -> None:
        super().__init__()
        check_budget(budget)
        for name, count in (("rows", rows), ("probe", probe)):
            check_number(f"{name} is too small", count, f"{name}: 16", least=1, whole=True)
        self.budget, self.rows, self.probe = budget, rows, probe

    def begin(self, context: Context) -> None:
        super().begin(context)
        context.check_source("softening holds to source text", "give a source")
        rows = choose(context.source, self.rows, context.seed)
        self.curvature = context.fit_source(rows, seed=context.seed)

    def after_task(self, task: Task) -> None:
        model, context = self.context.adapter.model, self.context
        assert self.curvature is not None
        read = choose(task.examples, self.rows, task.seed)
        target = context.fit(read, seed=task.seed)
        held = choose(context.source, self.probe, context.seed + 1)
        base = Reference(model, held, batch_size=context.batch_size)
        soft = soften(model, self.curvature, target=target)
        soft.apply(soft.within_measured(self.budget, lambda: base.measure(model).kl))
