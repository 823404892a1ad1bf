"""The diagonal Fisher: ``F(D) = V * D`` with one weight for each entry.

``V = E[(sum_t g_t x_t^T)^2]`` per prediction, the square being taken entry by entry on each
sequence's own gradient (the Fisher of elastic weight consolidation, arXiv 1612.00796). A
squared gradient of a whole batch's mean is something else, and no Fisher.
"""

from __future__ import annotations

import torch
from torch import Tensor

from retain.curvature.block import Block, Thin
from retain.curvature.record import Record

__all__ = ["DiagonalBlock", "DiagonalEstimator"]


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

    def to(self, device: torch.device) -> DiagonalBlock:
        return DiagonalBlock(self.values.to(device))

    def matvec(self, d: Tensor) -> Tensor:
        return self.values * d

    def thin(self, left: Tensor, right: Tensor) -> Thin:
        d = left @ right
        fd = self.values * d
        return Thin(0.5 * (d * fd).sum(), fd @ right.T, left.T @ fd)

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


class DiagonalEstimator:
    """Streams V of each layer; see `Record` for what arrives."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}

    def update(self, record: Record) -> None:
        """Takes one layer's inputs and gradients of one backward pass."""
        for x, g in zip(record.inputs, record.gradients, strict=True):  # a sequence at a time
            square = (g.T @ x).square_().mul_(record.weight)
            if record.name in self.values:
                self.values[record.name] += square
            else:
                self.values[record.name] = square

    def finish(self, predictions: int) -> dict[str, Block]:
        """The blocks; `predictions` is the number of predicted tokens that were seen."""
        return {name: DiagonalBlock(v / predictions) for name, v in self.values.items()}


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
