"""O-LoRA: each task learns in a LoRA of its own, orthogonal to those before (arXiv 2310.14152).

One LoRA of rank ``r * tasks`` is attached, with the scaling of rank r. Task t trains block t alone
(rows of A, columns of B); the blocks before it are frozen, those after it still have B = 0. To the
loss comes ``strength * sum over layers and t' < t of sum |A_t A_t'^T|`` (the entries' absolute
values, as in the authors' code; the paper writes squares). The result is a plain PEFT adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from retain.data.batches import Batch, Example
from retain.models.sites import lora_sites
from retain.retention.bounds import check_strength
from retain.retention.fresh_rows import FrozenRows, block_of
from retain.retention.method import Method, Task

__all__ = ["OLoRA"]

_REASON = "its subspaces are the rows of LoRA's A"


class OLoRA(Method):
    """Orthogonal low-rank adaptation; see the module.

    With one task and any strength it is plain LoRA. Its adapter's size, not its own memory, grows
    with the number of tasks, which must be known from the beginning.

    Args:
        strength: of the orthogonality (the paper's lambda_1, 0.5 there). Its unit is no nat.

    Raises:
        ConfigError: a strength out of range.
    """

    name: ClassVar[str] = "olora"
    adapters: ClassVar[frozenset[str]] = frozenset({"lora"})
    why_not: ClassVar[dict[str, str]] = dict.fromkeys(("full", "bottleneck", "prefix"), _REASON)

    def __init__(self, strength: float = 0.5) -> None:
        super().__init__(strength)
        check_strength(strength)
        self.frozen: FrozenRows | None = None

    def adapter_options(self, options: dict[str, Any], tasks: int) -> dict[str, Any]:
        """The rank of all tasks; the scaling stays what it is for one."""
        rank, alpha = int(options.get("rank", 16)), options.get("alpha")
        alpha = 2.0 * rank if alpha is None else float(alpha)
        return {**options, "rank": rank * tasks, "alpha": alpha * tasks}

    def trained(self, count: int, tasks: int) -> int:
        """Of one block."""
        return count // tasks

    def before_task(self, task: Task) -> Sequence[Example]:
        self._release()
        sites = lora_sites(self.context.adapter.model)
        self.frozen = FrozenRows(sites, block_of(sites, task.index, self.context.tasks))
        return task.examples

    def loss(self, model: nn.Module, batch: Batch, logits: Tensor) -> Tensor | None:
        assert self.frozen is not None
        own = self.frozen.active
        if not self.strength or not own.start:
            return None
        terms = [(s.a[own] @ s.a[: own.start].detach().T).abs().sum() for s in self.frozen.sites]
        return self.strength * torch.stack(terms).sum()

    def after_step(self, model: nn.Module, optimizer: Optimizer) -> float | None:
        assert self.frozen is not None
        self.frozen.after_step()
        return None

    def after_task(self, task: Task) -> None:
        self._release()

    def restore(self, state: dict[str, Tensor]) -> None:
        self._release()

    def _release(self) -> None:
        if self.frozen is not None:
            self.frozen.release()
        self.frozen = None
