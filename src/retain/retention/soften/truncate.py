"""An adapter at a smaller rank: the cut that a curvature feels least.

With G and S the two sides of a layer's curvature, the product of rank k nearest to ``B A`` in

    tr(D^T G D S) = |G^(1/2) D S^(1/2)|^2

comes from the singular values of ``G^(1/2) B A S^(1/2)`` (Eckart and Young 1936). A small matrix of
the adapter's rank has the same, and is found from ``B^T G B`` and ``A S A^T`` alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from retain.curvature.blocks.kronecker import KroneckerBlock
from retain.curvature.curvature import Curvature
from retain.errors import MismatchError
from retain.models.forward import no_autocast
from retain.models.sites import LoraSite

__all__ = ["truncated"]

ROUNDING = 1e-4
"""Of a root's singular values: those below this share of the largest are rounding."""


@no_autocast()
def truncated(
    sites: Sequence[LoraSite], curvature: Curvature, rank: int
) -> tuple[dict[str, tuple[Tensor, Tensor]], float]:
    """(B [d_out, rank], A [rank, d_in]) by layer, and how much is cut away.

    Args:
        sites: the layers; one of no more than this rank keeps its factors.
        curvature: of Kronecker structure in weight space.
        rank: to be kept.

    Returns:
        The factors, and ``sum |cut|^2 / sum |whole|^2`` over the layers in the curvature's norm.

    Raises:
        MismatchError: a curvature without two sides.
    """
    found, lost, whole = {}, 0.0, 0.0
    for site in sites:
        if site.rank <= rank:
            found[site.name] = (site.b.detach().clone(), site.a.detach().clone())
            continue
        block = curvature.blocks[site.name]
        if not isinstance(block, KroneckerBlock):
            raise MismatchError(
                "the curvature has no two sides to cut by",
                got=f"structure {curvature.info.structure}", fix="fit it with structure='kfac'",
                allowed="kfac, shampoo, activation or tridiagonal in weight space",
            )  # fmt: skip
        kind = torch.promote_types(site.b.dtype, torch.float32)
        b, a = site.b.detach().to(kind), site.a.detach().to(kind)
        left = _root(b.T @ block.outputs.matmul(b))
        right = _root(a @ block.inputs.matmul(a.T))
        u, values, v = torch.linalg.svd(left.T @ right)
        roots = values[:rank].sqrt()
        b_in = torch.linalg.pinv(left.T, rtol=ROUNDING) @ u[:, :rank] * roots
        a_in = roots[:, None] * (v[:rank] @ torch.linalg.pinv(right, rtol=ROUNDING))
        new_b, new_a = b.double() @ b_in, a_in @ a.double()
        found[site.name] = new_b.to(site.b), new_a.to(site.a)
        kept_b, kept_a = (f.to(kind) for f in found[site.name])  # as rounded as they will be
        gap = block.thin(torch.cat([b, -kept_b], 1), torch.cat([a, kept_a], 0))
        lost += 2.0 * float(gap.value) * site.scaling**2
        whole += float(values.square().sum()) * site.scaling**2
    return found, lost / whole if whole else 0.0


def _root(gram: Tensor) -> Tensor:
    """L with ``L L^T = gram``, for one that may be singular; in float64."""
    wide = gram.double()
    values, vectors = torch.linalg.eigh(0.5 * (wide + wide.T))
    root: Tensor = vectors * values.clamp(min=0).sqrt()
    return root
