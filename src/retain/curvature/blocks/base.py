"""The curvature of one weight matrix: what every structure can do.

A block is a symmetric positive semi-definite operator F on matrices D of the shape
[d_out, d_in]. Its unit is nats per prediction: ``0.5 <D, F D>`` is, to second order, the KL
divergence in nats per predicted token that the displacement D of this one weight causes.

In weight space D is a product of thin matrices, ``D = L R`` with L [d_out, k] and R [k, d_in],
and the thin methods never build it (but for the diagonal, whose cost is that of D).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from retain.curvature.blocks.factor import Factor

__all__ = ["Block", "MoveFactor", "Thin"]

MoveFactor = Callable[[Factor], Factor]
"""Maps a factor to the same one elsewhere; one that several blocks share, to one and the same."""


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
    def factors(self) -> dict[str, Factor]:
        """The parts of the block that other blocks may share, by short names."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """All tensors that define the block, by short names."""

    @abstractmethod
    def moved(self, move: MoveFactor, tensor: Callable[[Tensor], Tensor]) -> Block:
        """The same block with each factor and each other tensor mapped."""

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

    @abstractmethod
    def scaled(self, c: float) -> Block:
        """``c F``; c is at least 0. Factors that may be shared stay as they are."""

    def quadratic(self, d: Tensor) -> Tensor:
        """``0.5 <D, F D>`` in nats per prediction, a scalar tensor."""
        return 0.5 * (d * self.matvec(d)).sum()

    def memory(self) -> int:
        """Bytes that the block's tensors take."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())
