"""An adapter at a smaller rank: the cut that a curvature feels least, or the shortest one.

With G and S the two sides of a layer's curvature, the product of rank k nearest to ``B A`` in

    tr(D^T G D S) = |G^(1/2) D S^(1/2)|^2

comes from the singular values of ``G^(1/2) B A S^(1/2)`` (Eckart and Young 1936). A small matrix of
the adapter's rank has the same, and is found from ``B^T G B`` and ``A S A^T`` alone. Without a
curvature G and S are the identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from retain.curvature.blocks.kronecker import KroneckerBlock
from retain.curvature.curvature import Curvature
from retain.curvature.merge import square
from retain.errors import MismatchError
from retain.models.forward import no_autocast

__all__ = ["difference", "truncated"]

ROUNDING = 1e-4
"""Of a root's singular values: those below this share of the largest are rounding."""


class Layer(Protocol):
    """What is asked of a layer: ``dW = scaling * B @ A``, in a model or in a file."""

    @property
    def name(self) -> str: ...
    @property
    def scaling(self) -> float: ...
    @property
    def a(self) -> Tensor: ...
    @property
    def b(self) -> Tensor: ...
    @property
    def rank(self) -> int: ...


@no_autocast()
def truncated(
    sites: Sequence[Layer], curvature: Curvature | None, rank: int
) -> tuple[dict[str, tuple[Tensor, Tensor]], float]:
    """(B [d_out, rank], A [rank, d_in]) by layer, and how much is cut away.

    Args:
        sites: the layers; one of no more than this rank keeps its factors.
        curvature: of Kronecker structure in weight space; None for the least squares of dW.
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
        block = None if curvature is None else _block(curvature, site.name)
        b, a = site.b.detach(), site.a.detach()
        if block is None:
            b, a = b.double(), a.double()
            new_b, new_a = _nearest(b, a, rank)
        else:
            like = next(iter(block.tensors().values()))  # its precision, where it lies
            b, a = b.to(like), a.to(like)
            left = _root(b.T @ block.outputs.matmul(b))
            right = _root(a @ block.inputs.matmul(a.T))
            u, values, v = torch.linalg.svd(left.T @ right)
            roots = values[:rank].sqrt()
            b_in = torch.linalg.pinv(left.T, rtol=ROUNDING) @ u[:, :rank] * roots
            a_in = roots[:, None] * (v[:rank] @ torch.linalg.pinv(right, rtol=ROUNDING))
            new_b, new_a = b.double() @ b_in, a_in @ a.double()
        found[site.name] = new_b.to(site.b), new_a.to(site.a)
        gap = difference((b, a), found[site.name])  # as rounded as they will be
        size = site.scaling**2
        if block is None:
            lost += square(*gap) * size
            whole += square(b, a) * size
        else:
            lost += 2.0 * float(block.thin(*gap).value) * size
            whole += float(values.square().sum()) * size
    return found, lost / whole if whole else 0.0


def difference(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """(L, R) with ``L R = B A - B' A'``, in the precision of the first pair."""
    (b, a), (kept_b, kept_a) = one, (f.to(one[0]) for f in other)
    return torch.cat([b, -kept_b], 1), torch.cat([a, kept_a], 0)


def _block(curvature: Curvature, name: str) -> KroneckerBlock:
    block = curvature.blocks.get(name)
    if not isinstance(block, KroneckerBlock):
        raise MismatchError(
            "the curvature has no two sides to cut by",
            got=f"structure {curvature.info.structure} in {curvature.info.space} space",
            allowed="kfac, shampoo, activation or tridiagonal in weight space",
            fix="fit it with structure='kfac'",
        )  # fmt: skip
    return block


def _nearest(b: Tensor, a: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The factors of rank k whose product is nearest to ``B A`` in the Frobenius norm."""
    (outer, left), (inner, right) = torch.linalg.qr(b), torch.linalg.qr(a.T)
    u, values, v = torch.linalg.svd(left @ right.T)
    roots = values[:rank].sqrt()
    return outer @ u[:, :rank] * roots, roots[:, None] * (v[:rank] @ inner.T)


def _root(gram: Tensor) -> Tensor:
    """L with ``L L^T = gram``, for one that may be singular; in float64."""
    wide = gram.double()
    values, vectors = torch.linalg.eigh(0.5 * (wide + wide.T))
    root: Tensor = vectors * values.clamp(min=0).sqrt()
    return root
