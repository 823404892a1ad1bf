"""The identity: ``F(D) = c D`` with one number c for the whole model, plain L2.

c is the mean of the Fisher's diagonal over all layers, so that a strength means the same
number of nats here as in the other structures, for a displacement of no particular direction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from retain.curvature.blocks.base import Block, MoveFactor, Thin
from retain.curvature.blocks.eigh import eigh
from retain.curvature.blocks.estimator import Estimator, Fitted
from retain.curvature.blocks.factor import Factor
from retain.curvature.blocks.observation import Record

__all__ = ["IdentityBlock", "IdentityEstimator"]


class IdentityBlock(Block):
    """F(D) = c D.

    Args:
        scale: c, a tensor with one entry.
        shape: (d_out, d_in).
    """

    def __init__(self, scale: Tensor, shape: tuple[int, int]) -> None:
        self.scale, self.shape = scale, shape

    def factors(self) -> dict[str, Factor]:
        return {}

    def tensors(self) -> dict[str, Tensor]:
        return {"scale": self.scale}

    def moved(self, move: MoveFactor, tensor: Callable[[Tensor], Tensor]) -> IdentityBlock:
        return IdentityBlock(tensor(self.scale), self.shape)

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
        values, vectors = eigh(c @ c.T)
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

    def scaled(self, c: float) -> IdentityBlock:
        return IdentityBlock(c * self.scale, self.shape)


class IdentityEstimator(Estimator):
    """Needs the traces alone, which are gathered in any case."""

    def update(self, record: Record) -> None:
        if record.name not in self.state:
            shape = (record.gradients.shape[-1], record.inputs.shape[-1])
            self.state[record.name] = record.gradients.new_tensor(shape)

    def finish(self, predictions: int, traces: Mapping[str, float]) -> Fitted:
        shapes = {n: (int(t[0]), int(t[1])) for n, t in self.state.items()}
        mean = sum(traces.values()) / sum(a * b for a, b in shapes.values())
        like = next(iter(self.state.values()))
        scale = like.new_tensor(mean)  # one tensor: a fit's size does not grow with the layers
        return Fitted({n: IdentityBlock(scale, shapes[n]) for n in self.layout.shared})
