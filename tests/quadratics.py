"""The quadratic of a curvature written out with its dense matrix, for autograd."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from retain import Curvature
from retain.models.sites import LoraSite, find_sites

__all__ = ["dense_quadratic", "displacement", "joined"]


def displacement(curvature: Curvature, model: nn.Module) -> dict[str, Tensor]:
    """How far each block's weight is from the anchor, with the graph to the model's own weights."""
    moves = {}
    for site in find_sites(model):
        anchor = curvature.anchor.get(site.name, ())
        if not isinstance(site, LoraSite):
            moves[site.name] = site.weight - anchor[0]
        elif curvature.info.space == "adapter":
            b0, a0 = anchor
            moves[f"{site.name}.lora_A"] = site.a - a0
            moves[f"{site.name}.lora_B"] = site.b - b0
        else:
            moves[site.name] = site.scaling * site.b @ site.a
            if len(anchor) == 2:
                moves[site.name] = moves[site.name] - anchor[0] @ anchor[1]
    return moves


def joined(curvature: Curvature, moves: Mapping[str, Tensor]) -> Tensor:
    """Row-major vectors of all displacements, in the order of the blocks."""
    assert set(moves) == set(curvature.blocks)
    return torch.cat([moves[name].reshape(-1) for name in curvature.blocks])


def dense_quadratic(curvature: Curvature, model: nn.Module, dense: Tensor | None = None) -> Tensor:
    """``0.5 d^T F d`` at a model; `dense` is F where that is known already."""
    d = joined(curvature, displacement(curvature, model))
    return 0.5 * d @ (curvature.to_dense() if dense is None else dense) @ d
