"""The diagonal Fisher: ``F(D) = V * D`` with one weight for each entry.

``V = E[(sum_t g_t x_t^T)^2]`` per prediction, the square being taken entry by entry on each
sequence's own gradient (the Fisher of elastic weight consolidation, arXiv 1612.00796). A
squared gradient of a whole batch's mean is something else, and no Fisher.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from retain.curvature.blocks.base import Block, Merged, Reader, Thin
from retain.curvature.blocks.estimator import Estimator, calibration
from retain.curvature.blocks.linalg import check_nonnegative
from retain.curvature.blocks.observation import Observation
from retain.curvature.blocks.structure import Structure

__all__ = ["STRUCTURE", "DiagonalBlock", "DiagonalEstimator", "squares"]

_CHUNK = 1 << 23
"""Most entries of gradient matrices that are held at a time."""


class DiagonalBlock(Block):
    """F(D) = V * D, entry by entry.

    Args:
        values: V, [d_out, d_in], none below zero.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.shape = (values.shape[0], values.shape[1])

    def tensors(self) -> dict[str, Tensor]:
        return {"values": self.values}

    @classmethod
    def unpack(cls, read: Reader, shape: tuple[int, int]) -> DiagonalBlock:
        return cls(read.tensor("values", 2))

    def check(self, where: str, sound: set[int]) -> None:
        check_nonnegative(f"{where}/values", self.values)

    def matvec(self, d: Tensor) -> Tensor:
        return self.values * d

    def thin(self, left: Tensor, right: Tensor) -> Thin:
        fd = (left @ right).mul_(self.values)
        fd_r = fd @ right.T
        return Thin(0.5 * (left * fd_r).sum(), fd_r, left.T @ fd)

    def prox(self, d: Tensor, tau: float) -> Tensor:
        return d / (1.0 + tau * self.values)

    def prox_left(self, b: Tensor, c: Tensor, b0: Tensor, a0: Tensor, tau: float) -> Tensor:
        return _solve_rows(self.values, b, c, b0 @ a0, tau)

    def prox_right(self, a: Tensor, c: Tensor, b0: Tensor, a0: Tensor, tau: float) -> Tensor:
        return _solve_rows(self.values.T, a.T, c.T, (b0 @ a0).T, tau).T

    def to_dense(self) -> Tensor:
        return torch.diag(self.values.reshape(-1))

    def trace(self) -> float:
        return float(self.values.sum())

    def scaled(self, c: float, made: dict[int, Tensor] | None = None) -> DiagonalBlock:
        return DiagonalBlock(c * self.values)

    @classmethod
    def merge(cls, a: Sequence[DiagonalBlock], b: Sequence[DiagonalBlock]) -> Merged:
        return Merged([cls(x.values + y.values) for x, y in zip(a, b, strict=True)])


class DiagonalEstimator(Estimator):
    """Streams V of each layer."""

    def update(self, seen: Observation) -> None:
        made = seen.matrices_if_made
        parts = squares(seen.gradients, seen.inputs)
        for square in parts if made is None else [made.square().sum(0)]:
            self.add(seen.name, square.mul_(seen.weight))

    def finish(self, predictions: int, traces: Mapping[str, float]) -> dict[str, Block]:
        blocks: dict[str, Block] = {}
        for name in self.layout.shared:
            v = self.state[name]
            blocks[name] = DiagonalBlock(v * calibration(float(v.sum()), traces[name]))
        return blocks


def squares(g: Tensor, x: Tensor) -> Iterator[Tensor]:
    """Parts of ``sum over sequences of (sum_t g_t x_t^T)^2``, [d_out, d_in] each."""
    rows = max(1, _CHUNK // (g.shape[-1] * x.shape[-1]))
    for some_g, some_x in zip(g.split(rows), x.split(rows), strict=True):
        yield (some_g.mT @ some_x).square_().sum(0)


def _solve_rows(values: Tensor, b: Tensor, c: Tensor, d0: Tensor, tau: float) -> Tensor:
    """Solves ``x_i (I + tau c diag(v_i) c^T) = b_i + tau (v_i * d0_i) c^T`` for each row i.

    One r x r system a row, in float64: its smallest eigenvalue is 1, so it is sound for any tau.
    """
    c, dtype = c.double(), b.dtype
    identity = torch.eye(c.shape[0], dtype=c.dtype, device=c.device)
    rows = []
    chunk = max(1, (1 << 24) // max(1, c.numel()))
    for v, y, d in zip(values.split(chunk), b.split(chunk), d0.split(chunk), strict=True):
        v = v.double()
        system = identity + tau * ((v[:, None, :] * c) @ c.T)
        right = y.double() + tau * ((v * d.double()) @ c.T)
        factor = torch.linalg.cholesky(system)
        rows.append(torch.cholesky_solve(right[:, :, None], factor)[:, :, 0])
    return torch.cat(rows).to(dtype)


STRUCTURE = Structure(DiagonalBlock, DiagonalEstimator, entries=True)
