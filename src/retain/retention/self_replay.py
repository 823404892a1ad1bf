"""Replay of the model's own samples: text that the base model writes, learned beside each task.

No row of anybody's data is stored. The loss on a sample of the base model p is, in expectation,
``H(p) + KL(p || q)``: it holds the tuned model q where the base model speaks, as the KL on source
text does, with noise in place of the base model's logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from retain.data.batches import Example
from retain.data.sources import encode
from retain.errors import ConfigError
from retain.models.sample import sample_rows
from retain.retention.method import Context, Method, Task
from retain.retention.replay import check_share
from retain.retention.rows import Kept, pack, unpack

__all__ = ["SelfReplay"]


class SelfReplay(Method):
    """Samples once, at the beginning, and mixes some of it into each task's rows.

    The loss is a mean over predictions, so a sampled text of 64 tokens weighs as much as 64 answers
    of one token: `max_length` and `share` together say how much.

    Args:
        strength: means nothing here; see `share`.
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
        strength: float = 0.0,
        *,
        share: float = 0.1,
        rows: int = 128,
        max_length: int = 64,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(strength)
        check_share(share, float("inf"))
        for name, number, least in (("rows", rows, 1), ("max_length", max_length, 2)):
            if number < least:
                raise ConfigError(f"{name} is too small", got=number, allowed=f"{least} or more")
        self.share, self.rows = share, rows
        self.max_length, self.temperature = max_length, temperature
        self.samples: list[Kept] = []

    def begin(self, context: Context) -> None:
        super().begin(context)
        if not self.share:
            return
        with context.adapter.off() as base:
            rows = sample_rows(
                base,
                context.tokenizer,
                count=self.rows,
                max_length=self.max_length,
                seed=context.seed,
                temperature=self.temperature,
                progress=context.progress,
            )
        found = encode(rows, None, max_length=self.max_length, causal=True)
        self.samples = [Kept.of(example, None) for example in found]

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
        return pack(self.samples)

    def restore(self, state: dict[str, Tensor]) -> None:
        self.samples = unpack(state)
