"""One layer's softening, diagonalised in a small subspace: a closed form for every mu.

A layer's finished update D* is softened to

    D(mu) = argmin  0.5 <D - D*, F_t (D - D*)> + mu 0.5 <D, F_s D> .

In coordinates z that are orthonormal in F_t and diagonal in F_s (generalised eigenvectors of the
two; Golub and Van Loan, Matrix Computations, 8.7) this is ``z(mu) = z* / (1 + mu lambda)``. The
coordinates are those of a subspace that holds D*:

**Kronecker products**, ``F = G (x) S`` both: ``D = P M Q^T`` with P orthonormal columns of
span{L, G_s L, G_t L, ...} and Q likewise of the rows, for ``D* = L R``: block Krylov spaces of
the depth wanted (0: the adapter's own span, where nothing is cut). Each side has its own small
pencil, so that ``lambda_ij = g_i s_j``. In the whole space nothing is approximated; in a smaller
one D(mu) is the minimum over that subspace, and deeper ones contain it. Its rank is higher than the
adapter's: it is cut by an SVD, the nearest in the norm of F_t, and from there by alternating
halves, each solved exactly, towards the least ``sum (1 + mu lambda_ij) (M - M(mu))_ij^2``, which is
what is minimised above (weighted low-rank approximation, Srebro and Jaakkola, ICML 2003; a local
minimum).

**Any other structure**: the adapter's own span, in which F is one matrix of ``r^2`` rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from retain.curvature.blocks.base import Block
from retain.curvature.blocks.diagonal import DiagonalBlock
from retain.curvature.blocks.eigen import EigenBlock
from retain.curvature.blocks.factor import Factor, ScalarFactor
from retain.curvature.blocks.identity import IdentityBlock
from retain.curvature.blocks.kronecker import KroneckerBlock
from retain.curvature.blocks.linalg import eigh

__all__ = ["AdapterSubspace", "KroneckerSubspace", "Subspace", "sides"]

SWEEPS = 3
"""Alternations of a cut; more changed no loss by 0.2 %."""

SLACK = 100
"""Directions below so many roundings of a block of vectors are taken for none."""


class Subspace(ABC):
    """A subspace of one layer's updates that holds the finished one, all in float64.

    Attributes:
        left: orthonormal columns, [d_out, k].
        right: orthonormal columns, [d_in, l]; the updates are ``left C right^T``.
        coordinates: z* of the finished update; orthonormal in F_t.
        ratios: lambda, of the same shape; none below zero.
    """

    left: Tensor
    right: Tensor
    coordinates: Tensor
    ratios: Tensor

    def softened(self, mu: float) -> Tensor:
        """The coordinates of D(mu)."""
        return self.coordinates / (1.0 + mu * self.ratios)

    def cut(self, mu: float, rank: int) -> Tensor:
        """The coordinates of an update of at most that rank, near D(mu); see the module."""
        return self.softened(mu)

    @abstractmethod
    def core(self, coordinates: Tensor) -> Tensor:
        """C [k, l] of coordinates; its norms are those of the update."""

    def thin(self, coordinates: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """(L, R) with ``L R`` the update, for coordinates that are cut to at most that rank.

        Each column of L is as long as its row of R.
        """
        u, s, vh = torch.linalg.svd(self.core(coordinates), full_matrices=False)
        root = s[:rank].sqrt()
        return self.left @ (u[:, :rank] * root), (root[:, None] * vh[:rank]) @ self.right.T


class KroneckerSubspace(Subspace):
    """See the module.

    Args:
        left: L, [d_out, k].
        right: R, [k, d_in].
        source: F_s as (G, S).
        target: F_t as (G, S); None stands for the identity.
        depth: of the Krylov spaces.
        epsilon: what is added to each side of the target, relative to its mean diagonal.
    """

    def __init__(
        self,
        left: Tensor,
        right: Tensor,
        source: tuple[Factor, Factor],
        target: tuple[Factor, Factor] | None,
        depth: int,
        epsilon: float,
    ) -> None:
        near = target or (None, None)
        self.left, g, self._columns, z = _side(left, source[0], near[0], depth, epsilon)
        self.right, s, self._rows, w = _side(right.T, source[1], near[1], depth, epsilon)
        self.coordinates, self.ratios = z @ w.T, torch.outer(g, s)

    def cut(self, mu: float, rank: int) -> Tensor:
        full, weights = self.softened(mu), 1.0 + mu * self.ratios
        if min(full.shape) <= rank or mu == 0:  # D* has the adapter's rank
            return full
        columns = torch.linalg.svd(full, full_matrices=False).U[:, :rank]
        for _ in range(SWEEPS):
            across = torch.linalg.qr(_half(full, weights, columns)).Q
            down = _half(full.T, weights.T, across)
            columns = torch.linalg.qr(down).Q
        low: Tensor = down @ across.T
        return low

    def core(self, coordinates: Tensor) -> Tensor:
        return self._columns @ coordinates @ self._rows.T


class AdapterSubspace(Subspace):
    """See the module; ranks are never raised here, so that nothing is cut.

    Args:
        left: L, [d_out, k].
        right: R, [k, d_in].
        source: F_s.
        target: F_t; None stands for the identity.
        epsilon: as for `KroneckerSubspace`; relative to the mean diagonal where F_t has no sides.
    """

    def __init__(
        self, left: Tensor, right: Tensor, source: Block, target: Block | None, epsilon: float
    ) -> None:
        self.left, self.right = p, q = _orthonormal(left), _orthonormal(right.T)
        near = None if target is None else _restricted(target, p, q, epsilon)
        self.ratios, self._turn, back = _pencil(_restricted(source, p, q, 0.0), near)
        self.coordinates = back @ ((p.T @ left) @ (right @ q)).reshape(-1)

    def core(self, coordinates: Tensor) -> Tensor:
        return (self._turn @ coordinates).reshape(self.left.shape[1], self.right.shape[1])


def _side(
    start: Tensor, source: Factor, target: Factor | None, depth: int, epsilon: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One side of a Kronecker product in a Krylov space that holds the columns `start`.

    Returns:
        An orthonormal basis, the source's values, the turn T such that ``basis T`` is orthonormal
        in the target's factor and diagonal in the source's, and the coordinates of `start` in it.
    """
    basis = _krylov(start, [source] if target is None else [source, target], depth)
    near = None if target is None else _damped(target, basis, epsilon)
    values, turn, back = _pencil(_within(source, basis), near)
    return basis, values, turn, back @ (basis.T @ start)


def sides(block: Block) -> tuple[Factor, Factor] | None:
    """(G, S) of a block that is a Kronecker product; None for any other."""
    if isinstance(block, KroneckerBlock):
        return block.outputs, block.inputs
    if isinstance(block, IdentityBlock):
        one = torch.ones_like(block.scale)
        return ScalarFactor(block.scale, block.shape[0]), ScalarFactor(one, block.shape[1])
    return None


def _half(full: Tensor, weights: Tensor, columns: Tensor) -> Tensor:
    """The X [n, r] that minimises ``sum w_ij (full - columns X^T)_ij^2``.

    A system of r rows for each of X's. All weights are 1 or above and the columns orthonormal, so
    none is singular.
    """
    pairs = (columns[:, :, None] * columns[:, None, :]).flatten(1)
    systems = (weights.T @ pairs).reshape(-1, columns.shape[1], columns.shape[1])
    right = (weights * full).T @ columns
    found: Tensor = torch.cholesky_solve(right[:, :, None], torch.linalg.cholesky(systems))
    return found[:, :, 0]


def _pencil(far: Tensor, near: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(values, T, T^-1) with ``T^T near T = I`` and ``T^T far T = diag(values)``."""
    if near is None:
        values, turn = eigh(far)
        return values.clamp(min=0), turn, turn.T
    root = torch.linalg.cholesky(near)
    half = torch.linalg.solve_triangular(root, far, upper=False)
    whole = torch.linalg.solve_triangular(root, half.T, upper=False)
    values, vectors = eigh((whole + whole.T) / 2)
    turn = torch.linalg.solve_triangular(root.T, vectors, upper=True)
    return values.clamp(min=0), turn, vectors.T @ root.T


def _krylov(start: Tensor, factors: Sequence[Factor], depth: int) -> Tensor:
    """Orthonormal columns of span{X, F X, F' F X, ...} with up to `depth` factors before X."""
    basis = fresh = _orthonormal(start)
    for _ in range(depth):
        grown = torch.cat([_product(factor, fresh) for factor in factors], 1)
        grown = grown / grown.norm(dim=0).clamp(min=torch.finfo(grown.dtype).tiny)
        for _ in range(2):  # once leaves what rounding has put back
            grown = grown - basis @ (basis.T @ grown)
        fresh = _orthonormal(grown, SLACK * max(_eps(factor) for factor in factors))
        if not fresh.shape[1]:
            break
        basis = torch.cat([basis, fresh], 1)
    return basis


def _orthonormal(columns: Tensor, floor: float = 0.0) -> Tensor:
    """Orthonormal columns of a span; directions of `floor` and below are left out."""
    u, s, _ = torch.linalg.svd(columns, full_matrices=False)
    least = SLACK * torch.finfo(s.dtype).eps * float(s.max()) if len(s) else 0.0
    kept: Tensor = u[:, s > max(floor, least)]
    return kept


def _product(factor: Factor, columns: Tensor) -> Tensor:
    like = next(iter(factor.tensors().values()))
    return factor.matmul(columns.to(like.dtype)).double()


def _eps(factor: Factor) -> float:
    return torch.finfo(next(iter(factor.tensors().values())).dtype).eps


def _within(factor: Factor, basis: Tensor) -> Tensor:
    inner = basis.T @ _product(factor, basis)
    return (inner + inner.T) / 2


def _damped(factor: Factor, basis: Tensor, epsilon: float) -> Tensor:
    extra = epsilon * factor.trace() / factor.size
    return _within(factor, basis) + extra * torch.eye(basis.shape[1]).to(basis)


def _restricted(block: Block, p: Tensor, q: Tensor, epsilon: float) -> Tensor:
    """F between the updates ``p_i q_j^T``, row-major: [k l, k l] for k columns of p, l of q."""
    pair = sides(block)
    if pair is not None:
        return torch.kron(_damped(pair[0], p, epsilon), _damped(pair[1], q, epsilon))
    extra = epsilon * block.trace() / (block.shape[0] * block.shape[1])
    if isinstance(block, EigenBlock):
        p, q = block.outputs.to(p).T @ p, block.inputs.to(q).T @ q
        block = block.inner
    assert isinstance(block, DiagonalBlock)
    k, n = p.shape[1], q.shape[1]
    pairs = (p[:, :, None] * p[:, None, :]).flatten(1), (q[:, :, None] * q[:, None, :]).flatten(1)
    found = pairs[0].T @ block.values.to(p) @ pairs[1]
    found = found.reshape(k, k, n, n).transpose(1, 2).reshape(k * n, k * n)
    return (found + found.T) / 2 + extra * torch.eye(k * n).to(p)
