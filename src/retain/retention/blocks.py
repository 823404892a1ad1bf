"""A LoRA for each task inside one: rows of A and columns of B, of which a task trains its own.

In a study one LoRA of rank ``r * tasks`` is attached, with the scaling of rank r. The blocks of
earlier tasks stay as they are, those of later ones have B = 0. The result is a plain PEFT adapter.
While a task learns, its block alone is in the layers (`OpenBlock`), so gradients, optimiser and
force cost what rank r does; of earlier blocks there is their output to add. For a run that
continues another one, `retain.models.lora` adds the block, and `Block` holds the rest, since a
checkpoint there is the whole adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from retain.errors import ConfigError
from retain.models.sites import LoraSite, lora_sites
from retain.retention.hooks import Change, GradientHooks
from retain.retention.method import Method, Task

__all__ = ["Block", "Blockwise", "OpenBlock", "block_of"]


class Block:
    """A part of each layer's LoRA, which trains; all else is held until `release`.

    Args:
        sites: the layers, of one rank.
        span: the block's rows of A and columns of B.
    """

    def __init__(self, sites: Sequence[LoraSite], span: slice) -> None:
        self.sites, rank = list(sites), sites[0].rank
        self.span = slice(*span.indices(rank)[:2])
        self.rest = [slice(None, self.span.start), slice(self.span.stop, None)]
        pairs: list[tuple[nn.Parameter, Change]] = []
        for site in self.sites:
            mask = torch.zeros(rank, 1, dtype=site.a.dtype, device=site.a.device)
            mask[self.span] = 1
            pairs += [(site.b, mask.T.mul), (site.a, mask.mul)]
        self.hooks = GradientHooks(pairs)
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
        self.hooks.detach()


class OpenBlock:
    """A part of each layer's LoRA that takes the place of the whole until `release`.

    The layers' A and B are the block's own parameters then, which is all that an optimiser sees.
    What earlier blocks give is added to the layer's output, without dropout; later ones, whose B
    is 0, give nothing and are left out.

    Args:
        sites: the layers, of one rank; from then on their A and B are the block's.
        span: the block's rows of A and columns of B.
        train_a: whether A's rows are trained, or B's columns alone.

    Attributes:
        sites: the layers.
        earlier: of each layer, A [r, d_in] and B [d_out, r] of all blocks before this one.
    """

    def __init__(self, sites: Sequence[LoraSite], span: slice, *, train_a: bool = True) -> None:
        self.sites, self.span = list(sites), slice(*span.indices(sites[0].rank)[:2])
        self._wholes = [(site.a, site.b) for site in self.sites]
        self.earlier = [
            (a.detach()[: self.span.start], b.detach()[:, : self.span.start].contiguous())
            for a, b in self._wholes
        ]
        self._handles = []
        for site, (a, b), (a0, b0) in zip(self.sites, self._wholes, self.earlier, strict=True):
            site.lora_a.weight = nn.Parameter(a.detach()[self.span].clone(), requires_grad=train_a)
            site.lora_b.weight = nn.Parameter(b.detach()[:, self.span].clone())
            if len(a0):
                hook = partial(_add_earlier, a=a0, b=b0, scaling=site.scaling)
                layer: Any = site.layer
                self._handles.append(layer.register_forward_hook(hook))

    def displacements(self) -> dict[str, tuple[Tensor, Tensor]]:
        """What earlier blocks add to each layer, ``left @ right``, by its name; empty at first."""
        if not self.span.start:
            return {}
        kind = torch.promote_types(self.earlier[0][0].dtype, torch.float32)
        pairs = zip(self.sites, self.earlier, strict=True)
        return {site.name: (site.scaling * b.to(kind), a.to(kind)) for site, (a, b) in pairs}

    def release(self) -> None:
        """Puts the whole back, with the block in it."""
        for handle in self._handles:
            handle.remove()
        with torch.no_grad():
            for site, (a, b) in zip(self.sites, self._wholes, strict=True):
                a[self.span], b[:, self.span] = site.a, site.b
                site.lora_a.weight, site.lora_b.weight = a, b


def _add_earlier(
    layer: Any, args: tuple[Any, ...], output: Tensor, *, a: Tensor, b: Tensor, scaling: float
) -> Tensor | None:
    """A forward hook of PEFT's layer; None leaves the output as it is."""
    if layer.disable_adapters:
        return None
    more = nn.functional.linear(nn.functional.linear(args[0].to(a.dtype), a), b)
    return output + (scaling * more).to(output.dtype)


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
        self.block: OpenBlock | None = None

    def adapter_options(self, options: dict[str, Any], tasks: int) -> dict[str, Any]:
        """The rank of all tasks; the scaling stays what it is for one."""
        rank, alpha = int(options.get("rank", 16)), options.get("alpha")
        alpha = 2.0 * rank if alpha is None else float(alpha)
        return {**options, "rank": rank * tasks, "alpha": alpha * tasks}

    def begin_block(self, task: Task, *, train_a: bool = True) -> OpenBlock:
        """Opens the task's block; the others stay as they are."""
        self._release()
        sites = lora_sites(self.context.adapter.model)
        span = block_of(sites, task.index, self.context.tasks)
        self.block = OpenBlock(sites, span, train_a=train_a)
        return self.block

    def after_task(self, task: Task) -> None:
        self._release()

    def restore(self, state: dict[str, Tensor]) -> None:
        self._release()

    def _release(self) -> None:
        if self.block is not None:
            self.block.release()
        self.block = None
