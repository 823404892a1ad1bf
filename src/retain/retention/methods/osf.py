"""OSF: each task is learned in the weights' small singular directions (arXiv 2504.07097), by PEFT.

Before each task every adapted weight is decomposed anew, so that what the tasks before have written
is in it. The largest singular directions are frozen, and the gradients of the others are made
orthogonal to them. PEFT's documentation advises to begin with half of the directions, and to freeze
more from task to task: here the share that stays free shrinks by one n-th of itself for each of n
tasks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from retain.data.batches import Example
from retain.errors import ConfigError
from retain.models.adapters.osf import OSF as Adapter
from retain.retention.method import Method, Task

__all__ = ["OSF"]


class OSF(Method):
    """Orthogonal subspace fine-tuning; see the module. It needs the adapter ``osf``.

    Args:
        preserve: the share of each weight's singular directions that the first task leaves alone.
        grow: freeze more for each further task: of n tasks, the t-th (from 0) has
            ``preserve + (1 - preserve) t / n``.

    Raises:
        ConfigError: a value out of range.
    """

    name: ClassVar[str] = "osf"
    adapters: ClassVar[frozenset[str]] = frozenset({"osf"})
    why_not: ClassVar[dict[str, str]] = dict.fromkeys(
        ("lora", "full", "bottleneck", "prefix"), "PEFT's OSF is a way of tuning of its own"
    )
    weighted: ClassVar[bool] = False

    def __init__(self, *, preserve: float = 0.5, grow: bool = True) -> None:
        super().__init__()
        if not (math.isfinite(preserve) and 0 < preserve < 1):
            raise ConfigError(
                "preserve is no share",
                got=preserve,
                allowed="above 0 and below 1",
                fix="preserve: 0.5",
            )
        self.preserve, self.grow = preserve, grow

    def adapter_options(self, options: dict[str, Any], tasks: int) -> dict[str, Any]:
        return {**options, "preserve": self.preserve}

    def share(self, index: int, tasks: int) -> float:
        """The share of directions that a task leaves alone."""
        return self.preserve + self.grow * (1 - self.preserve) * index / tasks

    def before_task(self, task: Task) -> Sequence[Example]:
        adapter = self.context.adapter
        assert isinstance(adapter, Adapter)
        adapter.decompose(self.share(task.index, self.context.tasks))
        return task.examples
