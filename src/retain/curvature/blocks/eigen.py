"""EK-FAC: K-FAC's eigenvectors with the Fisher's own diagonal in that basis.

With ``S = U_S diag(.) U_S^T`` and ``G = U_G diag(.) U_G^T`` from K-FAC, the block is
``F(D) = U_G (E * (U_G^T D U_S)) U_S^T`` where ``E = E[(U_G^T J U_S)^2]``, entry by entry, with J a
sequence's own gradient (George et al. 2018, arXiv 1806.03884). Of all operators that are diagonal
in this basis it is the nearest to the Fisher in the Frobenius norm, so never farther than K-FAC,
and its trace is true by itself. It reads the source twice: for the basis, then for E.

A sum has the eigenvectors of the summed factors, and its exact diagonal in that basis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from retain.curvature.blocks.base import Block, Merged, Reader, Thin
from retain.curvature.blocks.diagonal import DiagonalBlock, squares
from retain.curvature.blocks.estimator import calibration
from retain.curvature.blocks.kronecker import KroneckerEstimator
from retain.curvature.blocks.linalg import check_basis, eigh
from retain.curvature.blocks.observation import Observation
from retain.curvature.blocks.ranks import SOURCE
from retain.curvature.blocks.structure import Ranks, Structure

if TYPE_CHECKING:
    from retain.models.skeleton import Outline

__all__ = ["STRUCTURE", "EigenBlock", "EigenEstimator"]


class EigenBlock(Block):
    """F(D) = U_G (E * (U_G^T D U_S)) U_S^T.

    Args:
        inputs: U_S, [d_in, d_in], orthogonal; may be shared by several blocks.
        outputs: U_G, [d_out, d_out], orthogonal.
        values: E, [d_out, d_in], none below zero.
    """

    def __init__(self, inputs: Tensor, outputs: Tensor, values: Tensor) -> None:
        self.inputs, self.outputs, self.inner = inputs, outputs, DiagonalBlock(values)
        self.shape = self.inner.shape

    @property
    def values(self) -> Tensor:
        """E, [d_out, d_in]."""
        return self.inner.values

    def tensors(self) -> dict[str, Tensor]:
        return {"inputs": self.inputs, "outputs": self.outputs, "values": self.values}

    @classmethod
    def unpack(cls, read: Reader, shape: tuple[int, int]) -> EigenBlock:
        return cls(*(read.tensor(name, 2) for name in ("inputs", "outputs", "values")))

    def check(self, where: str, sound: set[int]) -> None:
        for name, basis in (("inputs", self.inputs), ("outputs", self.outputs)):
            if id(basis) not in sound:
                sound.add(id(basis))
                check_basis(f"{where}/{name}", basis)
        self.inner.check(where, sound)
        if self.shape != (len(self.outputs), len(self.inputs)):
            raise ValueError(f"{where}/values of the shape {list(self.shape)}, not of its bases")

    def matvec(self, d: Tensor) -> Tensor:
        return self._back(self.values * self._into(d))

    def thin(self, left: Tensor, right: Tensor) -> Thin:
        value, dl, dr = self.inner.thin(self.outputs.T @ left, right @ self.inputs)
        return Thin(value, self.outputs @ dl, dr @ self.inputs.T)

    def prox(self, d: Tensor, tau: float) -> Tensor:
        return self._back(self.inner.prox(self._into(d), tau))

    def prox_left(self, b: Tensor, c: Tensor, b0: Tensor, a0: Tensor, tau: float) -> Tensor:
        u, v = self.outputs, self.inputs
        return u @ self.inner.prox_left(u.T @ b, c @ v, u.T @ b0, a0 @ v, tau)

    def prox_right(self, a: Tensor, c: Tensor, b0: Tensor, a0: Tensor, tau: float) -> Tensor:
        u, v = self.outputs, self.inputs
        return self.inner.prox_right(a @ v, u.T @ c, u.T @ b0, a0 @ v, tau) @ v.T

    def to_dense(self) -> Tensor:
        basis = torch.kron(self.outputs, self.inputs)
        return (basis * self.values.reshape(-1)) @ basis.T

    def trace(self) -> float:
        return float(self.values.sum())

    def scaled(self, c: float, made: dict[int, Tensor] | None = None) -> EigenBlock:
        return EigenBlock(self.inputs, self.outputs, c * self.values)

    @property
    def shared(self) -> object:
        return self.inputs

    @classmethod
    def merge(cls, a: Sequence[EigenBlock], b: Sequence[EigenBlock]) -> Merged:
        sides = [_turned(x[0].inputs, sum(z.values.sum(0) for z in x)) for x in (a, b)]
        v = eigh(sides[0] + sides[1])[1].contiguous()
        blocks, lost, norm = [], 0.0, 0.0
        for x, y in zip(a, b, strict=True):
            sides = [_turned(z.outputs, z.values.sum(1)) for z in (x, y)]
            u = eigh(sides[0] + sides[1])[1].contiguous()
            values = _seen_in(u, v, x) + _seen_in(u, v, y)
            blocks.append(cls(v, u, values))
            between = (x.values * _seen_in(x.outputs, x.inputs, y)).sum()
            size = x.values.square().sum() + y.values.square().sum() + 2 * between
            norm += float(size)
            lost += max(float(size - values.square().sum()), 0.0)
        return Merged(blocks, lost, norm)

    def _into(self, d: Tensor) -> Tensor:
        return self.outputs.T @ d @ self.inputs

    def _back(self, d: Tensor) -> Tensor:
        return self.outputs @ d @ self.inputs.T


def _turned(basis: Tensor, values: Tensor | int) -> Tensor:
    return (basis * values) @ basis.T


def _seen_in(u: Tensor, v: Tensor, block: EigenBlock) -> Tensor:
    """The block's diagonal in the basis ``u (x) v``, [d_out, d_in]."""
    return (u.T @ block.outputs).square() @ block.values @ (block.inputs.T @ v).square()


class EigenEstimator(KroneckerEstimator):
    """Streams K-FAC's factors, and in a second pass E in their eigenvectors."""

    passes: ClassVar[int] = 2

    def update(self, seen: Observation) -> None:
        name = seen.name
        if f"basis/outputs/{name}" not in self.state:
            super().update(seen)
            return
        made, first = seen.source.made, self.layout.shared[name]
        if "rotated" not in made:
            made["rotated"] = seen.inputs @ self.state[f"basis/inputs/{first}"]
        g = seen.gradients @ self.state[f"basis/outputs/{name}"]
        for square in squares(g, made["rotated"]):
            self.add(f"values/{name}", square.mul_(seen.weight))

    def end_pass(self, number: int) -> None:
        if number:
            return
        for key in [k for k in self.state if k.startswith(("inputs/", "outputs/"))]:
            self.state[f"basis/{key}"] = self.factor(key, 1.0).eigen()[1].contiguous()

    def finish(self, predictions: int, traces: Mapping[str, float]) -> dict[str, Block]:
        blocks: dict[str, Block] = {}
        for name, first in self.layout.shared.items():
            e = self.state[f"values/{name}"]
            blocks[name] = EigenBlock(
                self.state[f"basis/inputs/{first}"],
                self.state[f"basis/outputs/{name}"],
                e * calibration(float(e.sum()), traces[name]),
            )
        return blocks


def _between_passes(model: Outline, rank: Ranks) -> int:
    """Each factor's eigenvectors, ``4.5 d^3`` (Golub and Van Loan 2013, section 8.3), spread over
    the source's tokens; in the second pass each factor once more, which turns inputs, gradients.
    """
    sides = [d_in for name, (_, d_in) in model.layers.items() if model.shared[name] == name]
    sides += [d_out for d_out, _ in model.layers.values()]
    return sum(d * d for d in sides) + sum(9 * d**3 for d in sides) // (2 * SOURCE)


STRUCTURE = Structure(
    EigenBlock,
    EigenEstimator,
    inputs="shared",
    outputs=True,
    entries=True,
    sketches=False,
    extra_work=_between_passes,
)
