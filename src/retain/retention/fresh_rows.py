"""A LoRA for each task inside one: rows of A and columns of B, of which a task trains its own.

What was learned before stays as it is in the other rows (`FrozenRows`), and the adapter is one
plain PEFT adapter throughout, checkpoints included. A run that continues another one adds its fresh
rows with `retain.models.lora.grow_lora`; O-LoRA attaches those of all tasks at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from retain.errors import ConfigError
from retain.models.sites import LoraSite
from retain.retention.hooks import GradientHooks, Work

__all__ = ["FrozenRows", "block_of", "fresh_rows"]


class FrozenRows:
    """All rows of A and columns of B but some, held as they are until `release`.

    Args:
        sites: the layers, of one rank.
        active: the rows of A and columns of B that train.
    """

    def __init__(self, sites: Sequence[LoraSite], active: slice) -> None:
        self.sites, rank = list(sites), sites[0].rank
        self.active = slice(*active.indices(rank)[:2])
        self.rest = [slice(None, self.active.start), slice(self.active.stop, None)]
        weights, masks = self._weights(), _Masks()
        with torch.no_grad():
            for site in self.sites:
                masks.of(site.b, self.active, 1)
                masks.of(site.a, self.active, 0)
        self.hooks = GradientHooks(weights, masks)
        self.renew()

    def renew(self) -> None:
        """Takes what is there now for what is to stay."""
        self._frozen = [part.clone() for part in self._parts()]

    def after_step(self) -> None:
        """Puts the frozen rows back, which weight decay moves without a gradient."""
        if self._frozen:
            torch._foreach_copy_(self._parts(), self._frozen)

    def release(self) -> None:
        """Lets all rows train again."""
        self.hooks.detach()

    def _weights(self) -> list[nn.Parameter]:
        return [weight for site in self.sites for weight in (site.b, site.a)]

    def _parts(self) -> list[Tensor]:
        """What is to stay of A and B, as views."""
        found: list[Tensor] = []
        for site in self.sites:
            for part in self.rest:
                found += [site.a.detach()[part], site.b.detach()[:, part]]
        return [part for part in found if part.numel()]


class _Masks(Work):
    """Gradients of some rows or columns alone; those of one shape share a mask."""

    def __init__(self) -> None:
        self._weights: list[nn.Parameter] = []
        self._masks: list[Tensor] = []
        self._made: dict[object, Tensor] = {}

    def of(self, weight: nn.Parameter, active: slice, dim: int) -> None:
        """One more weight, of which these rows (0) or columns (1) train."""
        key = (weight.shape, weight.dtype, weight.device, dim)
        if key not in self._made:
            self._made[key] = torch.zeros_like(weight)
            self._made[key].movedim(dim, 0)[active] = 1
        self._weights.append(weight)
        self._masks.append(self._made[key])

    def change(self, places: Sequence[int]) -> None:
        found = [(self._weights[place].grad, self._masks[place]) for place in places]
        pairs = [(gradient, mask) for gradient, mask in found if gradient is not None]
        torch._foreach_mul_([g for g, _ in pairs], [m for _, m in pairs])


def fresh_rows(sites: Sequence[LoraSite]) -> slice | None:
    """The last rows of A, whose columns of B are 0 in every layer; None where there are none."""
    used = 0
    for site in sites:
        columns = site.b.detach().any(dim=0).nonzero()
        used = max(used, int(columns[-1]) + 1 if len(columns) else 0)
    if not used:
        return slice(None)
    alike = len({site.rank for site in sites}) == 1
    return slice(used, None) if alike and used < sites[0].rank else None


def block_of(sites: Sequence[LoraSite], index: int, tasks: int) -> slice:
    """The rows of A and columns of B of one task, in an adapter that has those of all.

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
