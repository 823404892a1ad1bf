"""Several processes that train one model, each on its own rows (DistributedDataParallel).

Each holds the whole adapter, and the gradients are averaged before anything here sees them, so
all do the same. What is measured by a forward pass may differ in the last bits all the same, and
such a difference would grow; so what the recipe sets is that of the first process everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from retain.errors import MismatchError

__all__ = ["check_same", "count", "of_first", "rank", "several", "share", "told"]


LARGE = 2**20
"""Numbers of a tensor that is sent by itself, without a copy."""


def several() -> bool:
    """Whether there are others."""
    started = distributed.is_available() and distributed.is_initialized()
    return bool(started and distributed.get_world_size() > 1)


def count() -> int:
    """How many there are."""
    return distributed.get_world_size() if several() else 1


def rank() -> int:
    """The number of this process; 0 is the first."""
    return distributed.get_rank() if several() else 0


def share(tensors: Sequence[Tensor]) -> None:
    """Sets tensors, in place, to those of the first process; small ones in one message."""
    if not several():
        return
    with torch.no_grad():
        for t in tensors:
            if t.numel() >= LARGE:
                whole = t.detach().contiguous()
                distributed.broadcast(whole, 0)
                t.copy_(whole)
        small = [t for t in tensors if t.numel() < LARGE]
        for kind in sorted({(t.dtype, t.device) for t in small}, key=str):
            same = [t for t in small if (t.dtype, t.device) == kind]
            flat = torch.cat([t.detach().reshape(-1) for t in same])
            distributed.broadcast(flat, 0)
            parts = flat.split([t.numel() for t in same])
            for t, part in zip(same, parts, strict=True):
                t.copy_(part.view(t.shape))


def told(document: Any, device: torch.device) -> list[Any]:
    """What each process has to say, for JSON, in order; they can talk on `device`."""
    if not several():
        return [document]
    text = torch.frombuffer(bytearray(json.dumps(document).encode()), dtype=torch.uint8).to(device)
    sizes = torch.zeros(count(), dtype=torch.int64, device=device)
    sizes[rank()] = len(text)
    distributed.all_reduce(sizes)
    found = [text.new_zeros(int(sizes.max())) for _ in sizes]
    padded = text.new_zeros(int(sizes.max()))
    padded[: len(text)] = text
    distributed.all_gather(found, padded)
    each = zip(found, sizes.tolist(), strict=True)
    return [json.loads(bytes(f[:n].cpu().numpy().tobytes())) for f, n in each]


def of_first(values: Sequence[float], device: torch.device) -> list[float]:
    """The numbers that the first process has, as many as all; they can talk on `device`."""
    if not several():
        return list(values)
    told = torch.tensor(list(values), dtype=torch.float64, device=device)
    distributed.broadcast(told, 0)
    found: list[float] = told.tolist()
    return found


def check_same(what: str, value: float, device: torch.device, fix: str) -> None:
    """All processes have this number, but for rounding.

    Raises:
        MismatchError: in every process, if one has another.
    """
    if not several():
        return
    told = torch.tensor([value, -value], dtype=torch.float64, device=device)
    distributed.all_reduce(told, distributed.ReduceOp.MAX)
    most, least = float(told[0]), -float(told[1])
    if most - least > 1e-3 * max(abs(most), abs(least)):
        raise MismatchError(
            f"the processes hold different {what}",
            got=f"from {least:.6g} to {most:.6g}",
            allowed="one for all",
            fix=fix,
        )
