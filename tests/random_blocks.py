"""Random blocks of every structure, small enough for dense matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from retain.curvature.blocks.base import Block
from retain.curvature.blocks.diagonal import DiagonalBlock
from retain.curvature.blocks.eigen import EigenBlock
from retain.curvature.blocks.factor import DenseFactor, Factor, ScalarFactor, SketchFactor
from retain.curvature.blocks.identity import IdentityBlock
from retain.curvature.blocks.kronecker import KroneckerBlock

__all__ = ["BLOCKS", "F64", "IN", "OUT", "SIDES", "Random", "dense_quadratic", "vec"]

F64 = torch.float64
OUT, IN = 7, 5
SIDES = {
    "dense-dense": ("dense", "dense"),
    "sketch-sketch": ("sketch", "sketch"),
    "sketch-dense": ("sketch", "dense"),
    "dense-sketch": ("dense", "sketch"),
    "dense-scalar": ("dense", "scalar"),
    "sketch-scalar": ("sketch", "scalar"),
    "scalar-dense": ("scalar", "dense"),
}
"""Kronecker products: the kinds of their (inputs, outputs)."""

BLOCKS = ("identity", "diagonal", "ekfac", *SIDES)


class Random:
    """Draws of one seed."""

    def __init__(self, seed: int, dtype: torch.dtype = F64) -> None:
        self.generator, self.dtype = torch.Generator().manual_seed(seed), dtype

    def matrix(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=F64).to(self.dtype)

    def psd(self, size: int, rank: int) -> Tensor:
        root = torch.randn(size, rank, generator=self.generator, dtype=F64)
        whole = root @ root.T / size
        return ((whole + whole.T) / 2).to(self.dtype)  # not every processor's product is symmetric

    def basis(self, size: int) -> Tensor:
        square = torch.randn(size, size, generator=self.generator, dtype=F64)
        return torch.linalg.qr(square)[0].to(self.dtype)

    def factor(self, kind: str, size: int, *, flat: bool = False) -> Factor:
        if kind == "dense":
            return DenseFactor(self.psd(size, max(1, size // 2) if flat else size + 3))
        if kind == "scalar":
            return ScalarFactor(self.matrix().abs() + 0.1, size)
        vectors = self.matrix(size, 1 if flat else max(1, size // 2))
        diagonal = self.matrix(size).square()
        if flat:
            diagonal[size // 2 :] = 0
        return SketchFactor(vectors, diagonal, self.matrix().abs())

    def block(
        self, structure: str, d_out: int = OUT, d_in: int = IN, *, flat: bool = False
    ) -> Block:
        """A random block; a `flat` one has directions that cost nothing (not the identity)."""
        if structure == "identity":
            return IdentityBlock(self.matrix().abs() + 0.1, (d_out, d_in))
        if structure in SIDES:
            inputs, outputs = SIDES[structure]
            return KroneckerBlock(
                self.factor(inputs, d_in, flat=flat), self.factor(outputs, d_out, flat=flat)
            )
        values = self.matrix(d_out, d_in).square()
        if flat:
            values[: d_out // 2] = 0
            values[:, d_in // 2 :] = 0
        if structure == "diagonal":
            return DiagonalBlock(values)
        return EigenBlock(self.basis(d_in), self.basis(d_out), values)


def vec(d: Tensor) -> Tensor:
    return d.reshape(-1)


def dense_quadratic(full: Tensor, d: Tensor) -> Tensor:
    return 0.5 * vec(d) @ full @ vec(d)
