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
from retain.errors import ConfigError
from retain.models.adapter import LoraSite, lora_sites
from retain.retention.laplace import check_strength
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
        self.block: slice | None = None
        self.sites: list[LoraSite] = []
        self._handles: list[Any] = []
        self._frozen: list[tuple[Tensor, Tensor]] = []

    def adapter_options(self, options: dict[str, Any], tasks: int) -> dict[str, Any]:
        """The rank is that of one task; the scaling stays what it is for one."""
        rank, alpha = int(options.get("rank", 16)), options.get("alpha")
        alpha = 2.0 * rank if alpha is None else float(alpha)
        return {**options, "rank": rank * tasks, "alpha": alpha * tasks}

    def before_task(self, task: Task) -> Sequence[Example]:
        self._release()
        self.sites = lora_sites(self.context.adapter.model)
        tasks, rank = self.context.tasks, self.sites[0].rank
        if rank % tasks or task.index >= tasks:
            raise ConfigError(
                "O-LoRA has no block for this task",
                got=f"rank {rank} for {tasks} tasks, task {task.index + 1}",
                allowed="a rank that is a multiple of the number of tasks",
                fix="attach the adapter with OLoRA.adapter_options(options, tasks)",
            )
        size = rank // tasks
        self.block = block = slice(task.index * size, (task.index + 1) * size)
        for site in self.sites:
            mask = torch.zeros(rank, 1, dtype=site.a.dtype, device=site.a.device)
            mask[block] = 1
            # At the gradient's birth, so that clipping sees the block alone.
            self._handles.append(site.a.register_hook(mask.mul))
            self._handles.append(site.b.register_hook(mask.T.mul))
        self._frozen = [(s.a.detach().clone(), s.b.detach().clone()) for s in self.sites]
        return task.examples

    def loss(self, model: nn.Module, batch: Batch, logits: Tensor) -> Tensor | None:
        assert self.block is not None
        if not self.strength or not self.block.start:
            return None
        start = self.block.start
        terms = [(s.a[self.block] @ s.a[:start].detach().T).abs().sum() for s in self.sites]
        return self.strength * torch.stack(terms).sum()

    def after_step(self, model: nn.Module, optimizer: Optimizer) -> float | None:
        """Puts the other blocks back, which weight decay moves without a gradient."""
        assert self.block is not None
        rest = [slice(None, self.block.start), slice(self.block.stop, None)]
        with torch.no_grad():
            for site, (a, b) in zip(self.sites, self._frozen, strict=True):
                for part in rest:
                    site.a[part] = a[part]
                    site.b[:, part] = b[:, part]
        return None

    def after_task(self, task: Task) -> None:
        self._release()

    def restore(self, state: dict[str, Tensor]) -> None:
        self._release()

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._frozen, self.block = [], [], None
