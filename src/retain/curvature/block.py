"""The curvature of one weight matrix: what every structure can do.

A block is a symmetric positive semi-definite operator F on matrices D of the shape
[d_out, d_in]. Its unit is nats per prediction: ``0.5 <D, F D>`` is, to second order, the KL
divergence in nats per predicted token that the displacement D of this one weight causes.

In weight space D is a product of thin matrices, ``D = L R`` with L [d_out, k] and R [k, d_in],
and the thin methods never build it (but for the diagonal, whose cost is that of D).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Block", "Thin", "solve_two_sided"]


_FLAT = 1e-6
"""Eigenvalues below this share of the largest are taken for rounding."""


class Thin(NamedTuple):
    """Value and gradients of ``0.5 <L R, F (L R)>``.

    Attributes:
        value: the quadratic, a scalar tensor.
        left: its gradient in L, [d_out, k].
        right: its gradient in R, [k, d_in].
    """

    value: Tensor
    left: Tensor
    right: Tensor


class Block(ABC):
    """A positive semi-definite operator on matrices [d_out, d_in]."""

    shape: tuple[int, int]

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that define the block, by short names."""

    @abstractmethod
    def to(self, device: torch.device) -> Block:
        """The same block on another device."""

    @abstractmethod
    def matvec(self, d: Tensor) -> Tensor:
        """F D, of the shape [d_out, d_in]."""

    @abstractmethod
    def thin(self, left: Tensor, right: Tensor) -> Thin:
        """Value and gradients of the quadratic at ``D = left @ right``."""

    @abstractmethod
    def prox(self, d: Tensor, tau: float) -> Tensor:
        """The solution X of ``X + tau F X = d``; d is [d_out, d_in], tau is at least 0."""

    @abstractmethod
    def prox_left(self, b: Tensor, c: Tensor, b0: Tensor, a0: Tensor, tau: float) -> Tensor:
        """The solution X of ``X + tau F(X c - b0 a0) c^T = b``.

        Shapes: b [d_out, r], c [r, d_in], b0 [d_out, k], a0 [k, d_in]; k may be 0.
        """

    @abstractmethod
    def prox_right(self, a: Tensor, c: Tensor, b0: Tensor, a0: Tensor, tau: float) -> Tensor:
        """The solution X of ``X + tau c^T F(c X - b0 a0) = a``.

        Shapes: a [r, d_in], c [d_out, r], b0 [d_out, k], a0 [k, d_in]; k may be 0.
        """

    @abstractmethod
    def to_dense(self) -> Tensor:
        """F as a matrix [d_out * d_in, d_out * d_in] on row-major ``vec(D)``. For small blocks."""

    @abstractmethod
    def trace(self) -> float:
        """The trace of F."""

    def quadratic(self, d: Tensor) -> Tensor:
        """``0.5 <D, F D>`` in nats per prediction, a scalar tensor."""
        return 0.5 * (d * self.matvec(d)).sum()

    def memory(self) -> int:
        """Bytes that the block's tensors take."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())


def solve_two_sided(
    p: tuple[Tensor, Tensor],
    q: tuple[Tensor, Tensor],
    y: Tensor,
    tau: float,
    pull: Tensor | None = None,
) -> Tensor:
    """The solution X of ``X + tau P X Q = Y + tau U_p pull U_q^T``.

    Eigenvalues below zero, which only rounding makes, count as zero, so that the solution is
    never longer than Y. The pull is dropped along eigenvectors whose eigenvalue is only
    rounding: it vanishes there in exact arithmetic, and nothing would divide its error.

    Args:
        p: eigenvalues and eigenvectors of P.
        q: the same of Q.
        y: Y.
        tau: at least 0.
        pull: a term in the two bases, which is zero wherever P or Q is.
    """
    (dp, up), (dq, uq) = p, q
    dp, dq = dp.clamp(min=0), dq.clamp(min=0)
    inner = up.T @ y @ uq
    if pull is not None:
        alive = (dp > _FLAT * dp.max())[:, None] & (dq > _FLAT * dq.max())[None, :]
        inner = inner + tau * pull * alive
    inner = inner / (1.0 + tau * dp[:, None] * dq[None, :])
    return up @ inner @ uq.T
