"""O-LoRA: each task learns in a LoRA of its own, orthogonal to those before (arXiv 2310.14152).

One LoRA of rank ``r * tasks`` is attached, with the scaling of rank r. Task t trains block t alone
(rows of A, columns of B); the blocks before it are frozen, those after it still have B = 0. To the
loss comes ``strength * sum over layers and t' < t of sum |A_t A_t'^T|`` (the entries' absolute
values, as in the authors' code; the paper writes squares). The result is a plain PEFT adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from retain.data.batches import Batch, Example
from retain.retention.blocks import Blockwise
from retain.retention.laplace import check_strength
from retain.retention.method import Task

__all__ = ["OLoRA"]

_REASON = "its subspaces are the rows of LoRA's A"


class OLoRA(Blockwise):
    """Orthogonal low-rank adaptation; see the module.

    With one task and any strength it is plain LoRA. Its adapter's size, not its own memory, grows
    with the number of tasks, which must be known from the beginning.

    Args:
        strength: of the orthogonality (the paper's lambda_1, 0.5 there). Its unit is no nat.

    Raises:
        ConfigError: a strength out of range.
    """

    name: ClassVar[str] = "olora"
    why_not: ClassVar[dict[str, str]] = dict.fromkeys(("full", "bottleneck", "prefix"), _REASON)

    def __init__(self, strength: float = 0.5) -> None:
        super().__init__(strength)
        check_strength(strength)

    def before_task(self, task: Task) -> Sequence[Example]:
        self.begin_block(task)
        return task.examples

    def loss(self, model: nn.Module, batch: Batch, logits: Tensor) -> Tensor | None:
        assert self.block is not None
        if not self.strength or not self.block.span.start:
            return None
        pairs = zip(self.block.sites, self.block.earlier, strict=True)
        terms = [(site.a @ a.T).abs().sum() for site, (a, _) in pairs]
        return self.strength * torch.stack(terms).sum()
