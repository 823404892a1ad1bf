"""The identity: ``F(D) = c D`` with one number c for the whole model, plain L2.

c is the mean of the Fisher's diagonal over all layers, so that a strength means the same
number of nats here as in the other structures, for a displacement of no particular direction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from retain.curvature.blocks.base import Block, Merged, Reader, Thin
from retain.curvature.blocks.estimator import Estimator
from retain.curvature.blocks.linalg import check_nonnegative, eigh
from retain.curvature.blocks.observation import Observation
from retain.curvature.blocks.structure import Structure

__all__ = ["STRUCTURE", "IdentityBlock", "IdentityEstimator"]


class IdentityBlock(Block):
    """F(D) = c D.

    Args:
        scale: c, a tensor with one entry; all layers share it.
        shape: (d_out, d_in).
    """

    def __init__(self, scale: Tensor, shape: tuple[int, int]) -> None:
        self.scale, self.shape = scale, shape

    def tensors(self) -> dict[str, Tensor]:
        return {"scale": self.scale}

    @classmethod
    def unpack(cls, read: Reader, shape: tuple[int, int]) -> IdentityBlock:
        return cls(read.tensor("scale", 0), shape)

    def check(self, where: str, sound: set[int]) -> None:
        check_nonnegative(f"{where}/scale", self.scale)

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

    def scaled(self, c: float, made: dict[int, Tensor] | None = None) -> IdentityBlock:
        known = {} if made is None else made
        return type(self)(known.setdefault(id(self.scale), c * self.scale), self.shape)

    @classmethod
    def merge(cls, a: Sequence[IdentityBlock], b: Sequence[IdentityBlock]) -> Merged:
        scale = a[0].scale + b[0].scale
        return Merged([cls(scale, block.shape) for block in a])

    @property
    def shared(self) -> object:
        return self.scale


class IdentityEstimator(Estimator):
    """Needs the traces alone, which are gathered in any case."""

    same: ClassVar[tuple[str, ...]] = ("",)

    def update(self, seen: Observation) -> None:
        if seen.name not in self.state:
            shape = (seen.gradients.shape[-1], seen.inputs.shape[-1])
            self.state[seen.name] = seen.gradients.new_tensor(shape)

    def finish(self, predictions: int, traces: Mapping[str, float]) -> dict[str, Block]:
        shapes = {n: (int(t[0]), int(t[1])) for n, t in self.state.items()}
        mean = sum(traces.values()) / sum(a * b for a, b in shapes.values())
        like = next(iter(self.state.values()))
        scale = like.new_tensor(mean)  # one tensor: a fit's size does not grow with the layers
        return {n: IdentityBlock(scale, shapes[n]) for n in self.layout.shared}


STRUCTURE = Structure(IdentityBlock, IdentityEstimator, scalars="one")
