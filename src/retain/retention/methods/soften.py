"""Softening after each task: plain LoRA, then back to a budget of forgetting without training.

The adapter of all tasks so far is pulled back along what the source text relies on, and not along
what the task just learned does (`retain.soften`), until the KL divergence to the base model,
measured on source text, is within the budget. Nothing happens while a task is learned.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from retain.curvature.curvature import Curvature
from retain.errors import ConfigError, SourceError
from retain.retention.budget import check_budget
from retain.retention.measure import Reference, fit_rows
from retain.retention.method import Context, Method, Task
from retain.retention.soften.adapter import soften
from retain.retention.state import choose, pack_curvature, unpack_curvature

__all__ = ["Soften"]


class Soften(Method):
    """Plain LoRA that is softened after each task; see the module.

    Args:
        strength: means nothing here; see `budget`.
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

    def __init__(
        self, strength: float = 0.0, *, budget: float = 0.02, rows: int = 64, probe: int = 16
    ) -> None:
        super().__init__(strength)
        check_budget(budget)
        for name, count in (("rows", rows), ("probe", probe)):
            if count < 1:
                raise ConfigError(
                    f"{name} is too small", got=count, allowed="1 or more", fix=f"{name}: 16"
                )
        self.budget, self.rows, self.probe = budget, rows, probe
        self.curvature: Curvature | None = None

    def begin(self, context: Context) -> None:
        super().begin(context)
        if not context.source:
            raise SourceError(
                "softening holds to source text",
                got="none",
                allowed="at least one row",
                fix="give a source",
            )
        self.curvature = fit_rows(
            context, choose(context.source, self.rows, context.seed), "kfac", context.seed
        )

    def after_task(self, task: Task) -> None:
        model, context = self.context.adapter.model, self.context
        assert self.curvature is not None
        read = choose(task.examples, self.rows, task.seed)
        target = fit_rows(context, read, "kfac", task.seed)
        held = choose(context.source, self.probe, context.seed + 1)
        base = Reference(model, held, batch_size=min(context.batch_size, len(held)))
        soft = soften(model, self.curvature, target=target)
        soft.apply(soft.within_measured(self.budget, lambda: base.measure(model).kl))

    def state(self) -> dict[str, Tensor]:
        return {} if self.curvature is None else {"curvature": pack_curvature(self.curvature)}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.curvature = unpack_curvature(state["curvature"])

    def memory(self) -> int:
        return 0 if self.curvature is None else self.curvature.memory()
