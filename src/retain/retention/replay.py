"""Replay: rows of earlier tasks, stored, are learned again beside those of the next."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from retain.data.batches import Example
from retain.errors import ConfigError
from retain.retention.method import Method, Task
from retain.retention.rows import Kept, choose, pack, unpack

__all__ = ["Replay", "check_share"]


class Replay(Method):
    """Keeps some rows of each task, and mixes all it has kept into each later task's rows.

    They are rows like any other: the loss is a mean over all predictions, and an epoch grows by
    them. A classifier answers each with the columns of its own task.

    Args:
        strength: means nothing here; see `share`.
        share: of each finished task's rows that are kept, at least one; 0 is plain training.
        per_task: how many are kept, in place of a share.

    Raises:
        ConfigError: a value out of range.
    """

    name: ClassVar[str] = "replay"
    stores_data: ClassVar[bool] = True
    weighted: ClassVar[bool] = False

    def __init__(
        self, strength: float = 0.0, *, share: float = 0.1, per_task: int | None = None
    ) -> None:
        super().__init__(strength)
        check_share(share, 1.0)
        if per_task is not None and per_task < 0:
            raise ConfigError("per_task is negative", got=per_task, allowed="0 or more", fix="100")
        self.share, self.per_task = share, per_task
        self.kept: list[Kept] = []

    def before_task(self, task: Task) -> Sequence[Example]:
        return [*task.examples, *self.kept]

    def after_task(self, task: Task) -> None:
        count = self.per_task
        if count is None:
            count = math.ceil(self.share * len(task.examples))
        rows = choose(task.examples, count, task.seed)
        self.kept += [Kept.of(row, task.columns) for row in rows]

    def state(self) -> dict[str, Tensor]:
        return pack(self.kept)

    def restore(self, state: dict[str, Tensor]) -> None:
        self.kept = unpack(state)


def check_share(share: float, largest: float) -> None:
    """Raises `ConfigError` unless a share is a number from 0 to `largest`."""
    if not (math.isfinite(share) and 0 <= share <= largest):
        allowed = f"0 to {largest:g}" if math.isfinite(largest) else "a finite number, 0 or above"
        raise ConfigError("the share is no share", got=share, allowed=allowed, fix="share: 0.1")
