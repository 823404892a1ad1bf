"""Layers of like shape together: one batched product serves them all.

A model's layers repeat, and a force of 210 small products a step is bound by their calls, not by
their arithmetic. Here the factors of like layers lie behind each other in one tensor, of which each
block's own factor becomes a view, so nothing is stored twice. A unit is the layers that read one
input (q, k and v); units of one make, on one device, are stacked. A rounded stack reads whole
float32 factors from a copy in bfloat16, which takes less than half the time. Of a wide one the few
largest directions stay in float32 beside it, since rounding is relative to what is there: weights
that move where the others are small, as behind a filter, would feel little but the rounding of
the large ones.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from retain.curvature.blocks.base import Block
from retain.curvature.blocks.factor import DenseFactor, Factor, ScalarFactor, SketchFactor
from retain.curvature.blocks.kronecker import KroneckerBlock
from retain.curvature.blocks.linalg import eigh

__all__ = ["Image", "Move", "Stack", "stacks", "total"]

WIDE, FEW = 1024, 8
"""A wide matrix is read faster from its own side where there are few rows: 23 ms against 27 for 30
of 1,536 x 1,536 and 8 rows, on 2 cores."""

LARGEST, BESIDE, TIMES = 8, 8, 2
"""Directions that are not rounded, columns beside them while they are looked for, and how often the
matrix is read for it. A matrix of up to four times as many is rounded whole."""

WASTE = 2
"""How much of a stack may be padding, where its layers' ranks differ."""


class Move(NamedTuple):
    """A layer's displacement ``scaling B A - B_0 A_0``.

    Attributes:
        scaling: of the product.
        b: B, [d_out, r].
        a: A, [r, d_in].
        dtype: the block's precision.
        start: B_0, [d_out, k], and A_0, [k, d_in], in that precision; None for none.
    """

    scaling: float
    b: Tensor
    a: Tensor
    dtype: torch.dtype
    start: tuple[Tensor, Tensor] | None = None

    @property
    def rank(self) -> int:
        """That of the pair, r + k."""
        return len(self.a) + (0 if self.start is None else len(self.start[1]))

    def of(self, rows: slice) -> Move:
        """That of some rows of A and columns of B alone, without the anchor's."""
        return Move(self.scaling, self.b[:, rows], self.a[rows], self.dtype)

    def pair(self) -> tuple[Tensor, Tensor]:
        """The displacement as one product, in the block's precision."""
        left, right = self.scaling * self.b.to(self.dtype), self.a.to(self.dtype)
        if self.start is None:
            return left, right
        b0, a0 = self.start
        return torch.cat([left, -b0], 1), torch.cat([right, a0], 0)


Moves = Mapping[str, Move]


class Image(NamedTuple):
    """Of the layers that are one reader in their units: what ``F`` makes of the part of their
    displacements that does not move, ``G L R S``.

    Attributes:
        left: ``G L``, [units, d_out, k].
        right: ``R S``, [units, k, d_in].
    """

    left: Tensor
    right: Tensor


class Stack:
    """Units of one make.

    Args:
        units: names of the layers of each unit; all units have as many.
        blocks: theirs; their factors become views of the stack.
    """

    def __init__(
        self, units: Sequence[Sequence[str]], blocks: Mapping[str, KroneckerBlock]
    ) -> None:
        self.units = [tuple(unit) for unit in units]
        self.names = [name for unit in self.units for name in unit]
        self._inputs = _Factors([blocks[unit[0]].inputs for unit in self.units])
        self._outputs = [
            _Factors([blocks[unit[reader]].outputs for unit in self.units])
            for reader in range(len(self.units[0]))
        ]

    def rounded(self) -> Stack:
        """One that reads whole float32 factors from a copy in bfloat16, and shares all others."""
        found = copy.copy(self)
        found._inputs = self._inputs.rounded()
        found._outputs = [outputs.rounded() for outputs in self._outputs]
        return found

    def copies(self) -> list[Tensor]:
        """What a rounded stack does not share."""
        every = (self._inputs, *self._outputs)
        found = [f.tensors.get("") for f in every]
        copies = [t for t in found if t is not None and t.dtype == torch.bfloat16]
        return copies + [f.largest for f in every if f.largest is not None]

    def fits(self, moves: Moves) -> bool:
        """Whether the displacements are of about one rank, so that little of a stack is padding."""
        ranks = [moves[name].rank for name in self.names]
        return len(ranks) * max(ranks) <= WASTE * sum(ranks)

    def images(
        self, still: Mapping[str, tuple[Tensor, Tensor]]
    ) -> tuple[list[Tensor], list[Image]]:
        """What F makes of constant displacements: values to be summed, and one image a reader;
        nothing where all of them are 0.

        Args:
            still: by layer L [d_out, k] and R [k, d_in], in the block's precision.
        """
        values: list[Tensor] = []
        found: list[Image] = []
        if not any(len(still[name][1]) for name in self.names):
            return values, found
        for reader, outputs in enumerate(self._outputs):
            pairs = [still[unit[reader]] for unit in self.units]
            rank = max(len(right) for _, right in pairs)
            lefts = torch.stack([_padded(left, rank, 1) for left, _ in pairs])
            rights = torch.stack([_padded(right, rank, 0) for _, right in pairs])
            gl, rs = outputs.matmul(lefts.mT).mT, self._inputs.matmul(rights)
            values.append(0.5 * ((lefts.mT @ gl) * (rs @ rights.mT).mT).sum())
            found.append(Image(gl, rs))
        return values, found

    def pull(
        self, moves: Moves, images: Sequence[Image] = ()
    ) -> tuple[list[Tensor], dict[str, tuple[Tensor, Tensor]]]:
        """Values to be summed, and each layer's gradients in B and A.

        Args:
            moves: the displacements, or that part of them which moves.
            images: of the other part; its own value is left out.
        """
        mine = [moves[name] for name in self.names]
        most, count, readers = max(len(m.a) for m in mine), len(self.units), len(self._outputs)
        rank = most + max(m.rank - len(m.a) for m in mine)
        shape = len(mine), rank, mine[0].a.shape[1]
        if all(m.a.shape == shape[1:] for m in mine):
            rights = torch.stack([m.a for m in mine]).to(mine[0].dtype)
        else:
            rights = mine[0].a.new_zeros(shape, dtype=mine[0].dtype)
            _fill([(x[: len(m.a)], m.a) for x, m in zip(rights, mine, strict=True)])
        starts = [(x[most:], m.start[1]) for x, m in zip(rights, mine, strict=True) if m.start]
        _fill([(x[: len(a0)], a0) for x, a0 in starts])
        rights = rights.reshape(count, readers * rank, -1)
        products = self._inputs.matmul(rights)
        values: list[Tensor] = []
        out: dict[str, tuple[Tensor, Tensor]] = {}
        for reader, outputs in enumerate(self._outputs):
            span = slice(reader * rank, (reader + 1) * rank)
            names = [unit[reader] for unit in self.units]
            own = [moves[name] for name in names]
            left, scale = _lefts(own, most, rank), _scale(own)
            gl, rs = outputs.matmul(left.mT), products[:, span]
            outer, inner = left.mT @ gl.mT, rs @ rights[:, span].mT
            values.append(0.5 * (outer * inner.mT).sum())
            lefts, pulled = gl.mT @ inner, outer @ rs
            if images:
                image, own_rights = images[reader], rights[:, span]
                seen, read = left.mT @ image.left, image.right @ own_rights.mT
                values.append((seen * read.mT).sum())
                lefts, pulled = lefts + image.left @ read, pulled + seen @ image.right
            lefts = scale * lefts
            out |= {
                name: (lefts[i, :, : len(m.a)], pulled[i, : len(m.a)])
                for i, (name, m) in enumerate(zip(names, own, strict=True))
            }
        return values, out


def _lefts(moves: Sequence[Move], most: int, rank: int) -> Tensor:
    """``[scaling B, -B_0]`` of each."""
    shape, scale = (len(moves), len(moves[0].b), rank), _scale(moves)
    if all(m.b.shape == shape[1:] for m in moves):
        return torch.stack([m.b for m in moves]).to(moves[0].dtype) * scale
    left = moves[0].b.new_zeros(shape, dtype=moves[0].dtype)
    _fill([(x[:, : m.b.shape[1]], m.b) for x, m in zip(left, moves, strict=True)])
    left[:, :, :most] *= scale
    if rank > most:
        starts = [(x[:, most:], m.start[0]) for x, m in zip(left, moves, strict=True) if m.start]
        _fill([(x[:, : b0.shape[1]], b0) for x, b0 in starts])
        left[:, :, most:] *= -1
    return left


def _padded(part: Tensor, size: int, dim: int) -> Tensor:
    """With zeros behind it, up to a size."""
    shape = list(part.shape)
    shape[dim] = size - shape[dim]
    return torch.cat([part, part.new_zeros(shape)], dim) if shape[dim] else part


def _scale(moves: Sequence[Move]) -> Tensor | float:
    scales = [m.scaling for m in moves]
    if len(set(scales)) == 1:
        return scales[0]
    return torch.tensor(scales, dtype=moves[0].dtype).to(moves[0].b.device)[:, None, None]


def _fill(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Writes each second tensor into the first."""
    some = [(to, of) for to, of in pairs if of.numel()]
    if some:
        torch._foreach_copy_([to for to, _ in some], [of for _, of in some])


class _Factors:
    """Factors of one kind and size, behind each other."""

    def __init__(self, factors: Sequence[Factor]) -> None:
        self.kind = type(factors[0])
        self.largest: Tensor | None = None  # L, [count, size, LARGEST]: the rounded lack L L^T
        self.tensors = {
            key: torch.stack([f.tensors()[key] for f in factors]) for key in factors[0].tensors()
        }
        for i, factor in enumerate(factors):
            factor.replace({key: t[i] for key, t in self.tensors.items()})

    def rounded(self) -> _Factors:
        matrix = self.tensors.get("")
        if self.kind is not DenseFactor or matrix is None or matrix.dtype != torch.float32:
            return self
        found = copy.copy(self)
        found.tensors = {"": matrix.to(torch.bfloat16)}
        if matrix.shape[1] > 4 * LARGEST:
            found.largest = _largest(matrix)
            for rest, one, large in zip(found.tensors[""], matrix, found.largest, strict=True):
                rest.copy_(torch.addmm(one, large, large.T, alpha=-1))  # one at a time, for memory
        return found

    def matmul(self, rows: Tensor) -> Tensor:
        """``rows @ S`` of each, for rows [count, n, size]."""
        if self.kind is DenseFactor:
            matrix, narrow = self.tensors[""], rows.to(self.tensors[""].dtype)
            if matrix.shape[1] >= WIDE and rows.shape[1] <= FEW:
                found = (matrix @ narrow.mT).mT.to(rows.dtype)  # it is symmetric
            else:
                found = (narrow @ matrix).to(rows.dtype)
            if self.largest is None:
                return found
            return torch.baddbmm(found, rows @ self.largest, self.largest.mT)
        if self.kind is ScalarFactor:
            return rows * self.tensors[".scale"][:, None, None]
        vectors = self.tensors[".vectors"]
        return torch.baddbmm(rows * self.tensors[".diagonal"][:, None], rows @ vectors, vectors.mT)


def _largest(matrices: Tensor) -> Tensor:
    """L with ``L L^T`` about the largest directions of each, [count, size, LARGEST].

    From a random subspace (Halko et al. 2011, algorithm 4.4): what it misses stays in the rest.
    """
    random = torch.Generator().manual_seed(0)
    draw = torch.randn(matrices.shape[1], LARGEST + BESIDE, generator=random)
    basis = draw.to(matrices).expand(len(matrices), -1, -1)
    for _ in range(TIMES):
        basis = torch.linalg.qr(matrices @ basis)[0]
    values, vectors = eigh(basis.mT @ matrices @ basis)
    roots = values[:, None, -LARGEST:].clamp(min=0).sqrt()
    return basis @ vectors[..., -LARGEST:] * roots


def stacks(blocks: Mapping[str, Block]) -> list[Stack]:
    """Stacks of all Kronecker blocks; others are left alone.

    Args:
        blocks: by layer; their factors become views of the stacks.
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
    return [Stack(found, kronecker) for found in makes.values()]


def _make(factor: Factor) -> object:
    width = factor.vectors.shape[1] if isinstance(factor, SketchFactor) else 0
    first = next(iter(factor.tensors().values()))
    return type(factor), factor.size, width, first.dtype, first.device


def total(values: Sequence[Tensor]) -> Tensor:
    """The sum of tensors with one entry each, on the first one's device.

    Those of one device are added there first, so that a device is waited for once.
    """
    found: dict[torch.device, list[Tensor]] = {}
    for value in values:
        found.setdefault(value.device, []).append(value)
    first, *others = (torch.stack(some).sum() for some in found.values())
    for other in others:
        first = first + other.to(first.device)
    return first
