"""Weights that are divided among processes (FSDP2's `fully_shard`), as whole ones.

LoRA's A and B are small, so each process keeps a whole copy of them, and all do the same to it.
`gather` makes the copies what the shards are, `scatter` the shards what the copies are. All
processes must call them alike. The sharded parameter stays the model's and the optimiser's own;
between its forward and its backward pass a module may hold another one in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.functional import pad

from retain.errors import ModelError

__all__ = [
    "Shard", "check_divided", "gather", "gather_gradients", "is_sharded", "local", "own", "reshard",
    "scatter", "shard_made", "shard_of", "whole", "wholes",
]  # fmt: skip

_SHARD = "_retain_shard"
"""The attribute of a module, and of a whole copy, for its `Shard`."""


class Shard:
    """A module's sharded weight and its whole copy.

    Of a module that is pickled or copied it does not go along.
    """

    def __init__(self, model: nn.Module, module: nn.Module) -> None:
        self.model, self.module = model, module
        sharded: Any = module._parameters["weight"]
        self.sharded = sharded
        self.whole = nn.Parameter(whole(sharded).clone(), sharded.requires_grad)
        setattr(self.whole, _SHARD, self)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def part(self, t: Tensor) -> Tensor:
        """This process's part of a whole tensor."""
        if not _by_rows(self.sharded):
            return self._laid(t).to_local()  # type: ignore[no-any-return]
        mesh = self.sharded.device_mesh
        first = mesh.get_local_rank() * -(-len(t) // mesh.size())
        return t[first : first + len(self.sharded.to_local())]

    def _laid(self, t: Tensor) -> Any:
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = self.sharded.device_mesh, self.sharded.placements
        return distribute_tensor(t.detach(), mesh, placements, src_data_rank=None)

    def scatter_gradient(self) -> None:
        """Makes the shard's gradient what the copy's is."""
        if self.whole.grad is None:
            self.sharded.grad = None
        elif self.sharded.grad is None:
            self.sharded.grad = self._laid(self.whole.grad.clone())
        else:
            self.sharded.grad.to_local().copy_(self.part(self.whole.grad))

    def on_backward(self, call: Callable[[Tensor], None]) -> Any:
        """Calls it when a backward pass is about to add to the weight's gradient.

        Autograd knows the weight by another parameter, so it is the module's output that tells.

        Returns:
            A handle with ``remove``.
        """

        def forward(_module: nn.Module, _args: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(call)

        return self.module.register_forward_hook(forward)


def is_sharded(weight: Tensor | None) -> bool:
    """Whether it is a part of a tensor that other processes have parts of."""
    return hasattr(weight, "full_tensor")


def check_divided(model: nn.Module) -> None:
    """Refuses trained weights that are divided in another way than FSDP2's.

    Raises:
        ModelError: FSDP1, or a tensor-parallel plan.
    """
    kinds = {type(module).__name__ for module in model.modules()}
    odd = [n for n, p in model.named_parameters() if p.requires_grad and is_sharded(p)]
    if "FullyShardedDataParallel" in kinds:
        got, fix = "FSDP1", "fsdp_version: 2 in the settings of accelerate"
    elif odd and not any(kind.startswith("FSDP") for kind in kinds):
        got, fix = f"a tensor-parallel plan, of {odd[0]} too", "leave LoRA out of it"
    else:
        return
    raise ModelError(
        "the trained weights are divided in a way that no recipe was tried with", got=got,
        allowed="FSDP2, DistributedDataParallel, or one process", fix=fix,
    )  # fmt: skip


def local(t: Tensor) -> Tensor:
    """This process's part of a tensor; all of one that is not divided."""
    part: Any = getattr(t, "to_local", None)
    found: Tensor = t if part is None else part()
    return found


def whole(t: Tensor) -> Tensor:
    """All of a tensor, of which this process may have a part."""
    gathered: Any = getattr(t, "full_tensor", None)
    found: Tensor = t if gathered is None else gathered().detach()
    return found


def shard_made(model: nn.Module, module: nn.Module) -> Shard:
    """The one of a module whose weight is sharded; made when it is first asked for."""
    found: Shard | None = vars(module).get(_SHARD)
    if found is None or found.sharded is not module._parameters["weight"]:
        found = Shard(model, module)
        module.__dict__[_SHARD] = found
    return found


def shard_of(owner: nn.Module | Tensor) -> Shard | None:
    """That of a whole copy, or of a module; None of others."""
    found: Shard | None = getattr(owner, _SHARD, None)
    return found


def own(parameter: nn.Parameter) -> nn.Parameter:
    """The model's parameter behind a copy; any other is its own."""
    shard = shard_of(parameter)
    return parameter if shard is None else shard.sharded


def reshard(model: nn.Module) -> None:
    """Lets go of whole weights that a forward pass has left behind, which would be old later."""
    for module in model.modules():
        if type(module).__name__.startswith("FSDP") and hasattr(module, "reshard"):
            module.reshard()  # type: ignore[operator]


def gather_gradients(shards: Sequence[Shard]) -> None:
    """Makes the copies' gradients what those of the shards are."""
    held = [shard for shard in shards if shard.sharded.grad is not None]
    for shard in shards:
        shard.whole.grad = None
    for shard, found in zip(held, wholes([s.sharded.grad for s in held]), strict=True):
        shard.whole.grad = found


def _by_rows(t: Any) -> bool:
    """Whether each process has some of its rows, as FSDP2 divides."""
    return is_sharded(t) and t.device_mesh.ndim == 1 and all(p.is_shard(0) for p in t.placements)


def wholes(tensors: Sequence[Any]) -> list[Tensor]:
    """`whole` of each; those that are divided alike are sent in one message."""
    kinds: dict[object, list[int]] = {}
    for i, t in enumerate(tensors):
        alike = (t.dtype, t.device_mesh) if _by_rows(t) else i
        kinds.setdefault(alike, []).append(i)
    found: dict[int, Tensor] = {}
    for places in kinds.values():
        some = [tensors[i] for i in places]
        found |= zip(
            places, _together(some) if _by_rows(some[0]) else map(whole, some), strict=True
        )
    return [found[i] for i in range(len(tensors))]


def _together(tensors: Sequence[Any]) -> list[Tensor]:
    """Those that are divided by rows among one group of processes: all but the last ones alike."""
    mesh = tensors[0].device_mesh
    rows = [-(-len(t) // mesh.size()) for t in tensors]
    sizes = [n * t.shape[1:].numel() for t, n in zip(tensors, rows, strict=True)]
    mine = [t.to_local().reshape(-1) for t in tensors]
    flat = torch.cat([pad(t, (0, n - len(t))) for t, n in zip(mine, sizes, strict=True)])
    parts = [torch.empty_like(flat) for _ in range(mesh.size())]
    distributed.all_gather(parts, flat, mesh.get_group())
    each = torch.stack(parts).split(sizes, 1)
    return [
        e.reshape(-1, *t.shape[1:])[: len(t)].contiguous()
        for e, t in zip(each, tensors, strict=True)
    ]


@torch.no_grad()
def gather(weights: Iterable[Tensor], *, gradients: bool = False) -> None:
    """Makes those of the weights that are whole copies what their shards are."""
    shards = [shard for shard in map(shard_of, weights) if shard is not None]
    for shard, found in zip(shards, wholes([s.sharded for s in shards]), strict=True):
        shard.whole.requires_grad_(shard.sharded.requires_grad)
        shard.whole.copy_(found)
    if gradients:
        gather_gradients(shards)


@torch.no_grad()
def scatter(weights: Iterable[Tensor], *, gradients: bool = False) -> None:
    """Makes the shards of those of the weights that are whole copies what these are."""
    shards = [shard for shard in map(shard_of, weights) if shard is not None]
    for model in {id(shard.model): shard.model for shard in shards}.values():
        reshard(model)
    for shard in shards:
        shard.sharded.to_local().copy_(shard.part(shard.whole))
        if gradients:
            shard.scatter_gradient()
