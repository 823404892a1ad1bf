"""The identity: ``F(D) = c D`` with one number c for the whole model, plain L2.

c is the mean of the Fisher's diagonal over all layers, so that a strength means the same
number of nats here as in the other structures, for a displacement of no particular direction.
"""

from __future__ import annotations

import torch
from torch import Tensor

from retain.curvature.block import Block, Thin
from retain.curvature.record import Record

__all__ = ["IdentityBlock", "IdentityEstimator"]


class IdentityBlock(Block):
    """F(D) = c D.

    Args:
        scale: c, a tensor with one entry.
        shape: (d_out, d_in).
    """

    def __init__(self, scale: Tensor, shape: tuple[int, int]) -> None:
        self.scale, self.shape = scale, shape

    def tensors(self) -> dict[str, Tensor]:
        return {"scale": self.scale}

    def to(self, device: torch.device) -> IdentityBlock:
        return IdentityBlock(self.scale.to(device), self.shape)

    def matvec(self, d: Tensor) -> Tensor:
        return self.scale * d

    def thin(self, left: Tensor, right: Tensor) -> Thin:
        outer, inner = left.T @ left, right @ right.T
        c = self.scale
        return Thin(0.5 * (c * outer * inner).sum(), c * (left @ inner), c * (outer @ right))

    def prox(self, d: Tensor, tau: float) -> Tensor:
        return d / (1.0 + tau * self.scale)

    def prox_left(self, b: Tensor, c: Tensor, b0: Tensor, a0: Tensor, tau: float) -> Tensor:
        t, c = tau * float(self.scale), c.double()
        values, vectors = torch.linalg.eigh(c @ c.T)
        y = b.double() + t * b0.double() @ (a0.double() @ c.T)
        inner = (y @ vectors) / (1.0 + t * values.clamp(min=0))
        solution: Tensor = (inner @ vectors.T).to(b.dtype)
        return solution

    def prox_right(self, a: Tensor, c: Tensor, b0: Tensor, a0: Tensor, tau: float) -> Tensor:
        return self.prox_left(a.T, c.T, a0.T, b0.T, tau).T

    def to_dense(self) -> Tensor:
        return torch.eye(self.shape[0] * self.shape[1]).to(self.scale) * self.scale

    def trace(self) -> float:
        return float(self.scale) * self.shape[0] * self.shape[1]


class IdentityEstimator:
    """Streams the true trace of each layer; see `Record` for what arrives."""

    def __init__(self) -> None:
        self.traces: dict[str, float] = {}
        self.like: dict[str, tuple[Tensor, tuple[int, int]]] = {}

    def update(self, record: Record) -> None:
        """Takes one layer's inputs and gradients of one backward pass."""
        name, x, g = record.name, record.inputs, record.gradients
        self.traces[name] = self.traces.get(name, 0.0) + float(record.traces.sum()) * record.weight
        self.like[name] = (x.new_zeros(()), (g.shape[-1], x.shape[-1]))

    def finish(self, predictions: int) -> dict[str, Block]:
        """The blocks; `predictions` is the number of predicted tokens that were seen."""
        entries = sum(shape[0] * shape[1] for _, shape in self.like.values())
        mean = sum(self.traces.values()) / predictions / entries
        return {n: IdentityBlock(z + mean, shape) for n, (z, shape) in self.like.items()}
