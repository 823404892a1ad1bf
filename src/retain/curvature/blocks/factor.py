"""One side of a Kronecker product: a symmetric positive semi-definite matrix S.

``DenseFactor`` keeps it whole, ``ScalarFactor`` is a multiple of the identity, and
``SketchFactor`` is low-rank plus diagonal, ``U U^T + diag(v)``, for sides that are too wide.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from retain.curvature.blocks.linalg import check_dense, check_nonnegative, eigh

__all__ = [
    "ENDINGS",
    "FLAT",
    "DenseFactor",
    "Factor",
    "ScalarFactor",
    "SketchFactor",
    "Spectrum",
    "diagonal_of",
    "factor_from",
    "inner",
    "truncate",
]

FLAT = 1e-6
"""Eigenvalues below this share of the largest are taken for rounding."""


class Factor(ABC):
    """A positive semi-definite matrix S, [size, size]."""

    size: int
    parts: ClassVar[dict[str, str]]
    """Ending of a tensor's name -> the attribute that holds it."""

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that define the factor, by the endings of their names."""
        return {ending: getattr(self, part) for ending, part in self.parts.items()}

    def replace(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes equal tensors that lie elsewhere, as views of one store."""
        for ending, part in self.parts.items():
            setattr(self, part, tensors[ending])

    @abstractmethod
    def check(self, where: str) -> None:
        """Its tensors fit one another, and no eigenvalue is below zero.

        Raises:
            ValueError: they do not.
        """

    @abstractmethod
    def matmul(self, m: Tensor) -> Tensor:
        """``S @ m`` for m [size, n]."""

    @abstractmethod
    def dense(self) -> Tensor:
        """S, [size, size]."""

    @abstractmethod
    def trace(self) -> float:
        """The trace of S."""

    @abstractmethod
    def scaled(self, c: float) -> Factor:
        """``c S``; c is at least 0."""

    @abstractmethod
    def plus(self, other: Factor) -> Factor:
        """``S + other``; a sum of sketches is a sketch of the larger of their ranks."""

    @abstractmethod
    def solve(self, y: Tensor, t: Tensor, pull: Tensor) -> Tensor:
        """The x with columns ``(I + t_j S) x_j = y_j + S pull_j``.

        Args:
            y: [size, n].
            t: [n], none below zero.
            pull: [size, n].
        """

    def eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues, ascending, none below zero, and eigenvectors."""
        matrix = self.dense()
        values, vectors = eigh(matrix.double() if self.size <= 64 else matrix)
        return values.clamp(min=0).to(matrix.dtype), vectors.to(matrix.dtype)


class DenseFactor(Factor):
    """S as it is.

    Args:
        matrix: S.
    """

    parts: ClassVar[dict[str, str]] = {"": "matrix"}

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.size = matrix, matrix.shape[0]
        self._eigen: tuple[Tensor, Tensor] | None = None

    def check(self, where: str) -> None:
        check_dense(where, self.matrix)

    def matmul(self, m: Tensor) -> Tensor:
        return self.matrix @ m

    def dense(self) -> Tensor:
        return self.matrix

    def trace(self) -> float:
        return float(self.matrix.trace())

    def scaled(self, c: float) -> DenseFactor:
        return DenseFactor(c * self.matrix)

    def plus(self, other: Factor) -> Factor:
        if isinstance(other, SketchFactor):
            return other.plus(self)
        return DenseFactor(self.matrix + other.dense())

    def solve(self, y: Tensor, t: Tensor, pull: Tensor) -> Tensor:
        d, u = self.eigen()
        return u @ Spectrum(d).solve(u.T @ y, t, u.T @ pull)

    def eigen(self) -> tuple[Tensor, Tensor]:
        if self._eigen is None:  # once: a proximal run asks at each step
            self._eigen = super().eigen()
        return self._eigen


class Spectrum:
    """S in the basis of its eigenvectors.

    Args:
        values: its eigenvalues, none below zero, [size].
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def matmul(self, m: Tensor) -> Tensor:
        """As `Factor.matmul`."""
        return self.values[:, None] * m

    def solve(self, y: Tensor, t: Tensor, pull: Tensor) -> Tensor:
        """As `Factor.solve`."""
        d = self.values
        alive = d > FLAT * d.max()  # nothing would divide the rounding error of the others
        return (y + (d * alive)[:, None] * pull) / (1.0 + d[:, None] * t)


class ScalarFactor(Factor):
    """S = c I.

    Args:
        scale: c, a tensor with one entry.
        size: of the identity.
    """

    parts: ClassVar[dict[str, str]] = {".scale": "scale"}

    def __init__(self, scale: Tensor, size: int) -> None:
        self.scale, self.size = scale, size

    def check(self, where: str) -> None:
        if self.scale.numel() != 1:
            raise ValueError(f"{where}.scale of the shape {list(self.scale.shape)}, not one number")
        check_nonnegative(f"{where}.scale", self.scale)

    def matmul(self, m: Tensor) -> Tensor:
        return self.scale * m

    def dense(self) -> Tensor:
        return torch.eye(self.size).to(self.scale) * self.scale

    def trace(self) -> float:
        return float(self.scale) * self.size

    def scaled(self, c: float) -> ScalarFactor:
        return ScalarFactor(c * self.scale, self.size)

    def plus(self, other: Factor) -> Factor:
        if isinstance(other, ScalarFactor):
            return ScalarFactor(self.scale + other.scale, self.size)
        return other.plus(self)

    def solve(self, y: Tensor, t: Tensor, pull: Tensor) -> Tensor:
        return (y + self.scale * pull) / (1.0 + self.scale * t)


class SketchFactor(Factor):
    """S = U U^T + diag(v); see `retain.curvature.blocks.sketch` for where it comes from.

    Args:
        vectors: U, [size, k].
        diagonal: v, [size], none below zero.
        bound: what ``|| S - true matrix ||_2`` cannot exceed, a tensor with one entry.
    """

    parts: ClassVar[dict[str, str]] = {
        ".vectors": "vectors",
        ".diagonal": "diagonal",
        ".bound": "bound",
    }

    def __init__(self, vectors: Tensor, diagonal: Tensor, bound: Tensor) -> None:
        self.vectors, self.diagonal, self.bound = vectors, diagonal, bound
        self.size = vectors.shape[0]

    def check(self, where: str) -> None:
        size, k = self.vectors.shape if self.vectors.dim() == 2 else (0, 0)
        if self.diagonal.shape != (size,) or self.bound.numel() != 1 or k > size:
            raise ValueError(f"{where}: parts of a sketch that do not fit each other")
        check_nonnegative(f"{where}.diagonal", self.diagonal)
        check_nonnegative(f"{where}.bound", self.bound)

    def matmul(self, m: Tensor) -> Tensor:
        return torch.addmm(self.diagonal[:, None] * m, self.vectors, self.vectors.T @ m)

    def dense(self) -> Tensor:
        return self.vectors @ self.vectors.T + torch.diag(self.diagonal)

    def trace(self) -> float:
        return float(self.vectors.square().sum() + self.diagonal.sum())

    def scaled(self, c: float) -> SketchFactor:
        return SketchFactor(c**0.5 * self.vectors, c * self.diagonal, c * self.bound)

    def plus(self, other: Factor) -> SketchFactor:
        """The rows left out go into the diagonal, and their largest eigenvalue into the bound."""
        bound = self.bound
        if isinstance(other, SketchFactor):
            vectors, diagonal = torch.cat([self.vectors, other.vectors], 1), other.diagonal
            bound = bound + other.bound
            keep = max(self.vectors.shape[1], other.vectors.shape[1])
        elif isinstance(other, ScalarFactor):
            return SketchFactor(self.vectors, self.diagonal + other.scale, bound)
        else:
            d, u = other.eigen()
            vectors = torch.cat([self.vectors, u * d.sqrt()], 1)
            diagonal, keep = torch.zeros_like(self.diagonal), self.vectors.shape[1]
        kept, dropped, largest = truncate(vectors, keep)
        return SketchFactor(kept, self.diagonal + diagonal + dropped, bound + largest)

    def solve(self, y: Tensor, t: Tensor, pull: Tensor) -> Tensor:
        """Woodbury's identity, a k x k system for each column, in float64.

        With ``goal = pull / t``, ``(I + t S)(x - goal) = y - goal``: nothing is multiplied by t.
        """
        dtype = y.dtype
        u, v, t = self.vectors.double(), self.diagonal.double(), t.double()
        goal = torch.where(t > 0, pull.double() / t.clamp(min=torch.finfo(t.dtype).tiny), 0.0)
        y = y.double() - goal
        one = torch.eye(u.shape[1], dtype=u.dtype, device=u.device)
        columns = []
        for j in range(y.shape[1]):
            e = 1.0 / (1.0 + t[j] * v)
            eu = e[:, None] * u
            core = torch.linalg.solve(one + t[j] * (u.T @ eu), eu.T @ y[:, j])
            columns.append(e * y[:, j] - t[j] * (eu @ core))
        return (goal + torch.stack(columns, 1) if columns else y).to(dtype)


def truncate(vectors: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `keep` largest singular directions of U, as columns, in float64 on the way.

    Returns:
        (U of rank `keep`, the diagonal of what was dropped from U U^T, its largest eigenvalue)
    """
    if vectors.shape[1] <= keep:
        zero = vectors.new_zeros(vectors.shape[0])
        return vectors, zero, zero.sum()
    wide = vectors.double()
    values, turn = eigh(wide.T @ wide)
    kept = wide @ turn[:, -keep:]
    dropped = (wide.square().sum(1) - kept.square().sum(1)).clamp(min=0)
    largest = values[-keep - 1].clamp(min=0)
    return kept.to(vectors.dtype), dropped.to(vectors.dtype), largest.to(vectors.dtype)


def inner(a: Factor, b: Factor) -> float:
    """``<a, b> = tr(a b)``."""
    if isinstance(b, ScalarFactor):
        return float(b.scale) * a.trace()
    if isinstance(a, ScalarFactor):
        return inner(b, a)
    if isinstance(a, SketchFactor):
        low = float((a.vectors * b.matmul(a.vectors)).sum())
        return low + float((a.diagonal * diagonal_of(b)).sum())
    if isinstance(b, SketchFactor):
        return inner(b, a)
    return float((a.dense() * b.dense()).sum())


def factor_from(tensors: Mapping[str, Tensor], size: int) -> Factor | None:
    """The factor with these `Factor.tensors`, unchecked; None where they are those of none."""
    if tensors.keys() == ScalarFactor.parts.keys():
        return ScalarFactor(tensors[".scale"], size)
    for kind in (DenseFactor, SketchFactor):
        if tensors.keys() == kind.parts.keys():
            return kind(*(tensors[ending] for ending in kind.parts))
    return None


def diagonal_of(factor: Factor) -> Tensor:
    """The diagonal of S, [size]."""
    if isinstance(factor, SketchFactor):
        return factor.vectors.square().sum(1) + factor.diagonal
    return factor.dense().diagonal()


ENDINGS = tuple(e for kind in (DenseFactor, ScalarFactor, SketchFactor) for e in kind.parts)
"""All endings of the names of a factor's tensors."""
