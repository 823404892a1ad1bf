"""The recommended recipe: behind a Wiener filter, and held by the curvature of the source text.

The filter (`retain.retention.wiener`) keeps an update from reading what the source and the earlier
tasks use. What it reads none the less, B answers for: the K-FAC curvature of the source text at the
base model pulls it back (`retain.retention.laplace`). Each does what the other cannot, since the
filter knows nothing of outputs, and a force acts only after a step has been made. Without source
text it is the filter alone. The curvature stays that of the base model; of the tasks nothing but
second moments is kept. The outputs of a classifier's task begin fitted to the model as it is
(`retain.training.head`), since those drawn at random distort it while they learn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from retain.curvature.curvature import Curvature
from retain.data.batches import Example
from retain.retention.laplace import Retention, check_strength
from retain.retention.measure import fit_rows
from retain.retention.method import Context, Task
from retain.retention.state import choose, pack_curvature, unpack_curvature
from retain.retention.wiener import Wiener
from retain.types import HeadStart

__all__ = ["Auto"]

CURVATURE = "curvature"


class Auto(Wiener):
    """The recipe; see the module.

    Args:
        strength: nats of task loss that one nat of predicted forgetting weighs; 0 leaves the
            filter alone.
        **options: of `retain.retention.wiener.Wiener`.

    Raises:
        ConfigError: a value out of range.
    """

    name: ClassVar[str] = "auto"
    weighted: ClassVar[bool] = True
    head: ClassVar[HeadStart] = "fitted"

    def __init__(self, strength: float = 10.0, **options: Any) -> None:
        check_strength(strength)
        super().__init__(strength, **options)
        self.curvature: Curvature | None = None
        self.retention: Retention | None = None

    def begin(self, context: Context) -> None:
        super().begin(context)
        self.curvature = None
        if self.strength and context.source:
            rows = choose(context.source, self.rows, context.seed)
            self.curvature = fit_rows(context, rows, "kfac", context.seed)

    def before_task(self, task: Task) -> Sequence[Example]:
        rows = super().before_task(task)
        if self.curvature is not None:
            assert self.block is not None
            self.retention = Retention(
                self.context.adapter.model, self.curvature, self.strength,
                beside=self.block.displacements(), resuming=True,
            )  # fmt: skip
        return rows

    def before_step(self, model: nn.Module) -> float | None:
        return None if self.retention is None else self.retention.add_force()

    def state(self) -> dict[str, Tensor]:
        found = super().state()
        return (
            found if self.curvature is None else found | {CURVATURE: pack_curvature(self.curvature)}
        )

    def restore(self, state: dict[str, Tensor]) -> None:
        super().restore({name: s for name, s in state.items() if name != CURVATURE})
        self.curvature = unpack_curvature(state[CURVATURE]) if CURVATURE in state else None

    def memory(self) -> int:
        kept = sum(t.numel() * t.element_size() for t in super().state().values())
        return kept + (0 if self.curvature is None else self.curvature.memory())

    def _release(self) -> None:
        self.retention = None
        if self.curvature is not None:
            self.curvature.drop_rounded()
        super()._release()
