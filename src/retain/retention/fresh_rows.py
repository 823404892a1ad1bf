"""A LoRA for each task inside one: rows of A and columns of B, of which a task trains its own.

What was learned before stays as it is in the other rows (`FrozenRows`), and the adapter is one
plain PEFT adapter throughout, checkpoints included. A run that continues another one adds its fresh
rows with `retain.models.growing.grow_lora`; O-LoRA attaches those of all tasks at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from retain.errors import ConfigError
from retain.models.sites import LoraSite
from retain.retention.hooks import Change, GradientHooks

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
        pairs: list[tuple[nn.Parameter, Change | None]] = []
        for site in self.sites:
            mask = torch.zeros(rank, 1, dtype=site.a.dtype, device=site.a.device)
            mask[self.active] = 1
            pairs += [(site.b, mask.T.mul), (site.a, mask.mul)]
        self.hooks = GradientHooks(pairs)
        self.renew()

    def renew(self) -> None:
        """Takes what is there now for what is to stay."""
        self._frozen = [(s.a.detach().clone(), s.b.detach().clone()) for s in self.sites]

    def after_step(self) -> None:
        """Puts the frozen rows back, which weight decay moves without a gradient."""
        with torch.no_grad():
            for site, (a, b) in zip(self.sites, self._frozen, strict=True):
                for part in self.rest:
                    site.a[part] = a[part]
                    site.b[:, part] = b[:, part]

    def release(self) -> None:
        """Lets all rows train again."""
        self.hooks.detach()


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
