"""Layers of like shape together: one batched product serves them all.

A model's layers repeat, and a force of 210 small products a step is bound by their calls, not by
their arithmetic. Here the factors of like layers lie behind each other in one tensor, of which each
block's own factor becomes a view, so nothing is stored twice. A unit is the layers that read one
input (q, k and v); units of one make are stacked. A rounded stack is a copy in bfloat16 instead,
which is read in less than half the time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from retain.curvature.blocks.base import Block
from retain.curvature.blocks.factor import DenseFactor, Factor, ScalarFactor, SketchFactor
from retain.curvature.blocks.kronecker import KroneckerBlock

__all__ = ["Stack", "stacks"]

WIDE, FEW = 1024, 8
"""A wide matrix is read faster from its own side where there are few rows: 23 ms against 27 for 30
of 1,536 x 1,536 and 8 rows, on 2 cores."""

Thins = Mapping[str, tuple[Tensor, Tensor]]


class Stack:
    """Units of one make.

    Args:
        units: names of the layers of each unit; all units have as many.
        blocks: theirs.
        rounded: whole float32 factors are copied to bfloat16.
    """

    def __init__(
        self,
        units: Sequence[Sequence[str]],
        blocks: Mapping[str, KroneckerBlock],
        rounded: bool = False,
    ) -> None:
        self.units = [tuple(unit) for unit in units]
        self.names = [name for unit in self.units for name in unit]
        self._inputs = _Factors([blocks[unit[0]].inputs for unit in self.units], rounded)
        self._outputs = [
            _Factors([blocks[unit[reader]].outputs for unit in self.units], rounded)
            for reader in range(len(self.units[0]))
        ]

    def tensors(self) -> list[Tensor]:
        """All factors."""
        return [t for factors in (self._inputs, *self._outputs) for t in factors.tensors.values()]

    def fits(self, thins: Thins) -> bool:
        """Whether all displacements have one rank."""
        return len({len(thins[name][1]) for name in self.names}) == 1

    def thin(self, thins: Thins) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
        """The summed value, and each layer's gradients in left and right; see `Block.thin`."""
        count, readers, rank = len(self.units), len(self._outputs), len(thins[self.names[0]][1])
        rights = torch.stack([thins[name][1] for name in self.names])
        rights = rights.reshape(count, readers * rank, -1)
        products = self._inputs.matmul(rights)
        value = rights.new_zeros(())
        out: dict[str, tuple[Tensor, Tensor]] = {}
        for reader, outputs in enumerate(self._outputs):
            span = slice(reader * rank, (reader + 1) * rank)
            names = [unit[reader] for unit in self.units]
            left = torch.stack([thins[name][0].T for name in names])
            gl, rs = outputs.matmul(left), products[:, span]
            outer, inner = left @ gl.mT, rs @ rights[:, span].mT
            value = value + 0.5 * (outer * inner.mT).sum()
            lefts, pulled = gl.mT @ inner, outer @ rs
            out |= {name: (lefts[i], pulled[i]) for i, name in enumerate(names)}
        return value, out


class _Factors:
    """Factors of one kind and size, behind each other."""

    def __init__(self, factors: Sequence[Factor], rounded: bool) -> None:
        self.kind = type(factors[0])
        if rounded and isinstance(factors[0], DenseFactor):
            wholes = [f.dense() for f in factors]
            if wholes[0].dtype == torch.float32:
                self.tensors = {"": torch.stack([w.to(torch.bfloat16) for w in wholes])}
                return
        self.tensors = {
            key: torch.stack([f.tensors()[key] for f in factors]) for key in factors[0].tensors()
        }
        for i, factor in enumerate(factors):
            factor.replace({key: t[i] for key, t in self.tensors.items()})

    def matmul(self, rows: Tensor) -> Tensor:
        """``rows @ S`` of each, for rows [count, n, size]."""
        if self.kind is DenseFactor:
            matrix, dtype = self.tensors[""], rows.dtype
            rows = rows.to(matrix.dtype)
            if matrix.shape[1] >= WIDE and rows.shape[1] <= FEW:
                return (matrix @ rows.mT).mT.to(dtype)  # it is symmetric
            return (rows @ matrix).to(dtype)
        if self.kind is ScalarFactor:
            return rows * self.tensors[".scale"][:, None, None]
        vectors = self.tensors[".vectors"]
        return torch.baddbmm(rows * self.tensors[".diagonal"][:, None], rows @ vectors, vectors.mT)


def stacks(blocks: Mapping[str, Block], *, rounded: bool = False) -> list[Stack]:
    """Stacks of all Kronecker blocks; others are left alone.

    Args:
        blocks: by layer. Unless `rounded`, their factors become views of the stacks.
        rounded: see `Stack`.
    """
    units: dict[int, list[str]] = {}
    kronecker = {n: b for n, b in blocks.items() if isinstance(b, KroneckerBlock)}
    for name, block in kronecker.items():
        units.setdefault(id(block.inputs), []).append(name)
    makes: dict[object, list[list[str]]] = {}
    for unit in units.values():
        first = kronecker[unit[0]].inputs
        make = (_make(first), *(_make(kronecker[name].outputs) for name in unit))
        makes.setdefault(make, []).append(unit)
    return [Stack(found, kronecker, rounded) for found in makes.values()]


def _make(factor: Factor) -> object:
    width = factor.vectors.shape[1] if isinstance(factor, SketchFactor) else 0
    dtype = next(iter(factor.tensors().values())).dtype
    return type(factor), factor.size, width, dtype
