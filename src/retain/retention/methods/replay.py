"""Replay: rows of earlier tasks, stored, or of the base model's own samples, are learned again.

On its own samples no row of anybody's data is stored. The loss on a sample of the base model p is,
in expectation, ``H(p) + KL(p || q)``: it holds the tuned model q where the base model speaks, as
the KL on source text does, with noise in place of the base model's logits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from retain.data.batches import Example
from retain.data.sources import encode
from retain.errors import check_number
from retain.models.generating import sample_rows
from retain.retention.method import Context, Method, Task
from retain.retention.state import StoredRow, choose, pack_rows, unpack_rows

__all__ = ["Replay", "SelfReplay"]


class Replay(Method):
    """Keeps some rows of each task, and mixes all it has kept into each later task's rows.

    They are rows like any other: the loss is a mean over all predictions, and an epoch grows by
    them. A classifier answers each with the columns of its own task.

    Args:
        share: of each finished task's rows that are kept, at least one; 0 is plain training.
        per_task: how many are kept, in place of a share.

    Raises:
        ConfigError: a value out of range.
    """

    name: ClassVar[str] = "replay"
    stores_data: ClassVar[bool] = True
    weighted: ClassVar[bool] = False

    def __init__(self, *, share: float = 0.1, per_task: int | None = None) -> None:
        super().__init__()
        check_number("the share is out of range", share, "share: 0.1", most=1)
        if per_task is not None:
            what = "per_task is negative, or no whole number"
            check_number(what, per_task, "per_task: 100", whole=True)
        self.share, self.per_task = share, per_task
        self.kept: list[StoredRow] = []

    def before_task(self, task: Task) -> Sequence[Example]:
        return [*task.examples, *self.kept]

    def after_task(self, task: Task) -> None:
        count = self.per_task
        if count is None:
            count = math.ceil(self.share * len(task.examples))
        rows = choose(task.examples, count, task.seed)
        self.kept += [StoredRow.of(row, task.columns) for row in rows]

    def state(self) -> dict[str, Tensor]:
        return {"rows": pack_rows(self.kept)}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.kept = unpack_rows(state["rows"])


class SelfReplay(Method):
    """Samples once, at the beginning, and mixes some of it into each task's rows.

    The loss is a mean over predictions, so a sampled text of 64 tokens weighs as much as 64 answers
    of one token: `max_length` and `share` together say how much.

    Args:
        share: sampled rows for each row of a task, at least one; 0 is plain training.
        rows: how many are sampled. Where a task asks for more, they come again.
        max_length: tokens of a sample.
        temperature: 1 samples the model as it is.

    Raises:
        ConfigError: a value out of range.
    """

    name: ClassVar[str] = "self_replay"
    weighted: ClassVar[bool] = False
    why_not: ClassVar[dict[str, str]] = {"classifier": "a classifier cannot write text"}

    def __init__(
        self,
        *,
        share: float = 0.1,
        rows: int = 128,
        max_length: int = 64,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        check_number("the share is out of range", share, "share: 0.1")
        check_number("rows is too small", rows, "rows: 128", least=1, whole=True)
        check_number("max_length is too small", max_length, "max_length: 64", least=2, whole=True)
        self.share, self.rows = share, rows
        self.max_length, self.temperature = max_length, temperature
        self.samples: list[StoredRow] = []

    def begin(self, context: Context) -> None:
        super().begin(context)
        if not self.share:
            return
        with context.adapter.off() as base:
            rows = sample_rows(
                base, context.tokenizer, count=self.rows, max_length=self.max_length,
                seed=context.seed, temperature=self.temperature, progress=context.progress,
            )  # fmt: skip
        found = encode(rows, None, max_length=self.max_length, causal=True)
        self.samples = [StoredRow.of(example, None) for example in found]

    def before_task(self, task: Task) -> Sequence[Example]:
        if not self.share:
            return task.examples
        count = max(1, round(self.share * len(task.examples)))
        random = torch.Generator().manual_seed(task.seed)
        order: list[int] = []
        while len(order) < count:
            order += torch.randperm(len(self.samples), generator=random).tolist()
        return [*task.examples, *(self.samples[i] for i in order[:count])]

    def state(self) -> dict[str, Tensor]:
        return {"rows": pack_rows(self.samples)} if self.share else {}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.samples = unpack_rows(state["rows"]) if self.share else []
