"""EK-FAC: K-FAC's eigenvectors with the Fisher's own diagonal in that basis.

With ``S = U_S diag(.) U_S^T`` and ``G = U_G diag(.) U_G^T`` from K-FAC, the block is
``F(D) = U_G (E * (U_G^T D U_S)) U_S^T`` where ``E = E[(U_G^T J U_S)^2]``, entry by entry, with J a
sequence's own gradient (George et al. 2018, arXiv 1806.03884). Of all operators that are diagonal
in this basis it is the nearest to the Fisher in the Frobenius norm, so never farther than K-FAC,
and its trace is true by itself. It reads the source twice: for the basis, then for E.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from retain.curvature.blocks.base import Block, MoveFactor, Thin
from retain.curvature.blocks.diagonal import DiagonalBlock, squares
from retain.curvature.blocks.estimator import Fitted, calibration
from retain.curvature.blocks.factor import Factor
from retain.curvature.blocks.kronecker import KroneckerEstimator
from retain.curvature.blocks.observation import Record

__all__ = ["EigenBlock", "EigenEstimator"]


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

    def factors(self) -> dict[str, Factor]:
        return {}

    def tensors(self) -> dict[str, Tensor]:
        return {"inputs": self.inputs, "outputs": self.outputs, "values": self.values}

    def moved(self, move: MoveFactor, tensor: Callable[[Tensor], Tensor]) -> EigenBlock:
        return EigenBlock(tensor(self.inputs), tensor(self.outputs), tensor(self.values))

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

    def scaled(self, c: float) -> EigenBlock:
        return EigenBlock(self.inputs, self.outputs, c * self.values)

    def _into(self, d: Tensor) -> Tensor:
        return self.outputs.T @ d @ self.inputs

    def _back(self, d: Tensor) -> Tensor:
        return self.outputs @ d @ self.inputs.T


class EigenEstimator(KroneckerEstimator):
    """Streams K-FAC's factors, and in a second pass E in their eigenvectors."""

    passes: ClassVar[int] = 2

    def update(self, record: Record) -> None:
        name = record.name
        if f"basis/outputs/{name}" not in self.state:
            super().update(record)
            return
        kept, first = record.source.kept, self.layout.shared[name]
        if "rotated" not in kept:
            kept["rotated"] = record.inputs @ self.state[f"basis/inputs/{first}"]
        g = record.gradients @ self.state[f"basis/outputs/{name}"]
        for square in squares(g, kept["rotated"]):
            self.add(f"values/{name}", square.mul_(record.weight))

    def turn(self, number: int) -> None:
        if number:
            return
        for side in ("inputs", "outputs"):
            for name in [k.removeprefix(f"{side}/") for k in self.state if k.startswith(side)]:
                basis = self.factor(f"{side}/{name}", 1.0).eigen()[1].contiguous()
                self.state[f"basis/{side}/{name}"] = basis

    def finish(self, predictions: int, traces: Mapping[str, float]) -> Fitted:
        blocks: dict[str, Block] = {}
        for name, first in self.layout.shared.items():
            e = self.state[f"values/{name}"]
            blocks[name] = EigenBlock(
                self.state[f"basis/inputs/{first}"],
                self.state[f"basis/outputs/{name}"],
                e * calibration(float(e.sum()), traces[name]),
            )
        return Fitted(blocks)
