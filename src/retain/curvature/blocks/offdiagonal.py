"""What ties the blocks of two neighbouring layers: the off-diagonal of a tri-diagonal curvature.

``F_ij(D_j) = w G_ij D_j S_ij^T`` with ``G_ij = E[g_i g_j^T]`` and ``S_ij = E[x_i x_j^T]`` at equal
positions. The other half of the symmetric pair is its transpose,
``F_ji(D_i) = w G_ij^T D_i S_ij``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Link"]


@dataclass(frozen=True)
class Link:
    """The blocks (i, j) and (j, i).

    Attributes:
        inputs: S_ij, [d_in_i, d_in_j].
        outputs: G_ij, [d_out_i, d_out_j].
        weight: w, which keeps the whole chain positive semi-definite.
    """

    inputs: Tensor
    outputs: Tensor
    weight: float

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """``F_ij (left @ right)`` as thin factors, for left [d_out_j, k] and right [k, d_in_j]."""
        return self.weight * (self.outputs @ left), right @ self.inputs.T

    def backward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """``F_ji (left @ right)`` as thin factors, for left [d_out_i, k] and right [k, d_in_i]."""
        return self.weight * (self.outputs.T @ left), right @ self.inputs

    def matvec(self, d: Tensor) -> Tensor:
        """``F_ij d`` for d [d_out_j, d_in_j]."""
        return self.weight * (self.outputs @ d @ self.inputs.T)

    def transposed(self, d: Tensor) -> Tensor:
        """``F_ji d`` for d [d_out_i, d_in_i]."""
        return self.weight * (self.outputs.T @ d @ self.inputs)

    def to_dense(self) -> Tensor:
        """``w G_ij (x) S_ij`` on row-major vectors."""
        return self.weight * torch.kron(self.outputs, self.inputs)
