"""A LoRA for each task inside one: rows of A and columns of B, of which a task trains its own.

In a study one LoRA of rank ``r * tasks`` is attached, with the scaling of rank r. The blocks of
earlier tasks stay as they are, those of later ones have B = 0. The result is a plain PEFT adapter.
For a run that continues another one, `retain.models.growing` adds the block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from retain.errors import ConfigError
from retain.models.adapter import LoraSite, lora_sites
from retain.retention.method import Method, Task

__all__ = ["Block", "Blockwise", "block_of"]


class Block:
    """A part of each layer's LoRA, which trains; all else is held until `release`.

    Args:
        sites: the layers, of one rank.
        span: the block's rows of A and columns of B.
        train_a: whether A's rows are trained, or B's columns alone.
    """

    def __init__(self, sites: Sequence[LoraSite], span: slice, *, train_a: bool = True) -> None:
        self.sites, rank = list(sites), sites[0].rank
        self.span = slice(*span.indices(rank)[:2])
        self.rest = [slice(None, self.span.start), slice(self.span.stop, None)]
        self.train_a, self._handles = train_a, []
        for site in self.sites:
            mask = torch.zeros(rank, 1, dtype=site.a.dtype, device=site.a.device)
            mask[self.span] = 1
            # At the gradient's birth, so that clipping sees the block alone.
            self._handles.append(site.b.register_hook(mask.T.mul))
            if train_a:
                self._handles.append(site.a.register_hook(mask.mul))
            else:
                site.a.requires_grad_(False)
        self.renew()

    def renew(self) -> None:
        """Takes what is there now for what is to stay."""
        self._frozen = [(s.a.detach().clone(), s.b.detach().clone()) for s in self.sites]

    def put_back(self) -> None:
        """Puts the other blocks back, which weight decay moves without a gradient."""
        with torch.no_grad():
            for site, (a, b) in zip(self.sites, self._frozen, strict=True):
                for part in self.rest:
                    site.a[part] = a[part]
                    site.b[:, part] = b[:, part]

    def release(self) -> None:
        """Lets all blocks train again."""
        for handle in self._handles:
            handle.remove()
        if not self.train_a:
            for site in self.sites:
                site.a.requires_grad_(True)


def block_of(sites: Sequence[LoraSite], index: int, tasks: int) -> slice:
    """The rows of A and columns of B that belong to one task.

    Raises:
        ConfigError: there is no such block.
    """
    rank = sites[0].rank
    if rank % tasks or index >= tasks:
        raise ConfigError(
            "the adapter has no block for this task",
            got=f"rank {rank} for {tasks} tasks, task {index + 1}",
            allowed="a rank that is a multiple of the number of tasks",
            fix="attach the adapter with the method's adapter_options(options, tasks)",
        )
    size = rank // tasks
    return slice(index * size, (index + 1) * size)


class Blockwise(Method):
    """A method whose tasks each train a block of their own, which `begin_block` opens.

    Attributes:
        block: of the task that is being learned; None between tasks.
    """

    adapters: ClassVar[frozenset[str]] = frozenset({"lora"})

    def __init__(self, strength: float = 0.0) -> None:
        super().__init__(strength)
        self.block: Block | None = None

    def adapter_options(self, options: dict[str, Any], tasks: int) -> dict[str, Any]:
        """The rank of all tasks; the scaling stays what it is for one."""
        rank, alpha = int(options.get("rank", 16)), options.get("alpha")
        alpha = 2.0 * rank if alpha is None else float(alpha)
        return {**options, "rank": rank * tasks, "alpha": alpha * tasks}

    def begin_block(self, task: Task, *, train_a: bool = True) -> Block:
        """Holds all blocks but the task's."""
        self._release()
        sites = lora_sites(self.context.adapter.model)
        span = block_of(sites, task.index, self.context.tasks)
        self.block = Block(sites, span, train_a=train_a)
        return self.block

    def after_step(self, model: nn.Module, optimizer: Optimizer) -> float | None:
        assert self.block is not None
        self.block.put_back()
        return None

    def after_task(self, task: Task) -> None:
        self._release()

    def restore(self, state: dict[str, Tensor]) -> None:
        self._release()

    def _release(self) -> None:
        if self.block is not None:
            self.block.release()
        self.block = None
