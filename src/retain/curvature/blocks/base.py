"""The curvature of one weight matrix: what every structure can do.

A block is a symmetric positive semi-definite operator F on matrices D of the shape
[d_out, d_in]. Its unit is nats per prediction: ``0.5 <D, F D>`` is, to second order, the KL
divergence in nats per predicted token that the displacement D of this one weight causes.

In weight space D is a product of thin matrices, ``D = L R`` with L [d_out, k] and R [k, d_in],
and the thin methods never build it (but for the diagonal, whose cost is that of D).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

from torch import Tensor

from retain.curvature.blocks.factor import ENDINGS, Factor, factor_from
from retain.errors import shown

__all__ = ["Block", "Merged", "Reader", "Thin"]


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


class Merged(NamedTuple):
    """What stands for the sums of blocks.

    Attributes:
        blocks: one for each sum.
        lost: squared Frobenius norm of what the sums lost.
        norm: squared Frobenius norm of the sums; 0 where nothing can be lost.
        weights: of a Kronecker product, the coefficients of both terms in (G, S), for each block.
    """

    blocks: Sequence[Block]
    lost: float = 0.0
    norm: float = 0.0
    weights: Sequence[tuple[list[float], list[float]]] = ()


class Reader:
    """Reads the tensors of one block by their short names.

    Args:
        tensors: all tensors; those that several blocks read are one and the same.
        prefix: of the block's names.
        factors: factors that were made before: one for all blocks that read the same tensors.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], prefix: str, factors: dict[Any, Factor]
    ) -> None:
        self._tensors, self._prefix, self._factors = tensors, prefix, factors

    def tensor(self, name: str, dims: int) -> Tensor:
        """A tensor of so many dimensions.

        Raises:
            KeyError: there is none of this name.
            ValueError: it has more or fewer dimensions.
        """
        found = self._tensors[self._prefix + name]
        if found.dim() != dims:
            what = f"{shown(self._prefix + name, plain=True)} of the shape {list(found.shape)}"
            raise ValueError(f"{what}, which has not {dims} dimensions")
        return found

    def factor(self, name: str, size: int) -> Factor:
        """A factor [size, size].

        Raises:
            ValueError: it is missing, or a part of it.
        """
        name = self._prefix + name
        found = {end: self._tensors[name + end] for end in ENDINGS if name + end in self._tensors}
        key = tuple(map(id, found.values()))
        if key not in self._factors:
            factor = factor_from(found, size)
            if factor is None:
                raise ValueError(f"{shown(name, plain=True)} is missing, or a part of it")
            self._factors[key] = factor
        return self._factors[key]


class Block(ABC):
    """A positive semi-definite operator on matrices [d_out, d_in]."""

    shape: tuple[int, int]

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """All tensors that define the block, by short names; a file holds these."""

    @classmethod
    @abstractmethod
    def unpack(cls, read: Reader, shape: tuple[int, int]) -> Self:
        """The block of this shape with these tensors, unchecked.

        Raises:
            KeyError, ValueError: one is missing, or no matrix.
        """

    @abstractmethod
    def check(self, where: str, sound: set[int]) -> None:
        """Its tensors fit one another and make no direction negative.

        Args:
            where: the block's name, for messages.
            sound: ``id`` of the shared parts that have passed before; this block's are added.

        Raises:
            ValueError: they do not; the message names the tensor.
        """

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

    def turned(self, b0: Tensor, a0: Tensor) -> tuple[Tensor, Tensor]:
        """b0 and a0 in the basis in which `prox_both` works."""
        return b0, a0

    def prox_both(
        self, b: Tensor, a: Tensor, scaling: float, anchor: tuple[Tensor, Tensor],
        taus: tuple[float, float],
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
        """`prox_left` of B, then `prox_right` of A, of the update ``scaling B A - b0 a0``.

        Args:
            b: [d_out, r].
            a: [r, d_in].
            scaling: of their product.
            anchor: b0 [d_out, k] and a0 [k, d_in], `turned`.
            taus: of B and of A; what has 0 stays.

        Returns:
            B, A, and the quadratic there, where it takes no further read of the factors.
        """
        of_b, of_a = taus
        if of_b:
            b = self.prox_left(b, scaling * a, *anchor, of_b)
        if of_a:
            a = self.prox_right(a, scaling * b, *anchor, of_a)
        return b, a, None

    @abstractmethod
    def to_dense(self) -> Tensor:
        """F as a matrix [d_out * d_in, d_out * d_in] on row-major ``vec(D)``. For small blocks."""

    @abstractmethod
    def trace(self) -> float:
        """The trace of F."""

    @abstractmethod
    def scaled(self, c: float, made: dict[int, Tensor] | None = None) -> Self:
        """``c F``; c is at least 0. Factors that may be shared stay as they are.

        Args:
            c: the number.
            made: ``id`` of a shared tensor -> what was made of it for another block.
        """

    @classmethod
    @abstractmethod
    def merge(cls, a: Sequence[Self], b: Sequence[Self]) -> Merged:
        """The sums ``a[i] + b[i]``, each as one block at the memory of one.

        Args:
            a: blocks of one fit that share a part: see `shared`.
            b: those of the same layers in another fit.
        """

    @property
    def shared(self) -> object:
        """What several blocks have in common, one and the same object for all of them."""
        return self
