"""A stream of rows as a low-rank-plus-diagonal matrix: Frequent Directions with its diagonal.

For rows z_1 .. z_n the matrix wanted is ``S = sum z z^T``, [d, d], and 2k rows of d numbers are
all that is held. When they are full, they turn into their singular directions, the squared
singular values lose the (k + 1)-th of them, delta, and k rows are free again (Liberty 2013,
arXiv 1206.0594; Ghashami et al. 2016, arXiv 1501.01711). So ``E = S - U U^T`` is positive
semi-definite with ``||E||_2 <= sum delta <= tr(S) / (k + 1)``.

What was taken away is not lost but kept on the diagonal, which is streamed exactly: the result is
``U U^T + diag(E)``. It is positive semi-definite, has the exact diagonal and trace of S, and
``|| S - result ||_2 = || E - diag(E) ||_2 <= sum delta``, the bound that each sketch carries.

Cost: O(k d) a row, and memory 2 k d + d, against d^2 each for the whole factor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from retain.curvature.blocks.factor import SketchFactor, truncate
from retain.curvature.blocks.linalg import eigh

__all__ = ["sketch_finish", "sketch_update"]


def sketch_update(state: dict[str, Tensor], key: str, rows: Tensor, rank: int) -> None:
    """Takes rows, [n, d], into the tensors ``key.*`` of a state."""
    d = rows.shape[1]
    if f"{key}.buffer" not in state:
        state[f"{key}.buffer"] = rows.new_zeros(2 * rank, d)
        state[f"{key}.fill"] = torch.zeros((), dtype=torch.long)
        state[f"{key}.diagonal"] = rows.new_zeros(d, dtype=torch.float64)
        state[f"{key}.bound"] = rows.new_zeros((), dtype=torch.float64)
    buffer, fill = state[f"{key}.buffer"], int(state[f"{key}.fill"])
    state[f"{key}.diagonal"] += rows.double().square().sum(0)
    while len(rows):
        take = min(len(rows), 2 * rank - fill)
        buffer[fill : fill + take] = rows[:take]
        rows, fill = rows[take:], fill + take
        if fill == 2 * rank:
            state[f"{key}.bound"] += _shrink(buffer, rank)
            fill = rank
    state[f"{key}.fill"].fill_(fill)


def sketch_finish(
    state: dict[str, Tensor], key: str, rank: int, scale: float, dtype: torch.dtype
) -> SketchFactor:
    """The sketch of ``scale * sum z z^T``."""
    fill = int(state[f"{key}.fill"])
    root = state[f"{key}.buffer"][:fill].double().T
    kept, _, largest = truncate(root, rank)
    if kept.shape[1] < rank:  # fewer rows than the rank
        kept = torch.cat([kept, kept.new_zeros(len(kept), rank - kept.shape[1])], 1)
    left = (state[f"{key}.diagonal"] - kept.square().sum(1)).clamp(min=0)
    bound = state[f"{key}.bound"] + largest
    return SketchFactor(
        (scale**0.5 * kept).to(dtype).contiguous(),
        (scale * left).to(dtype),
        (scale * bound).to(dtype),
    )


def _shrink(buffer: Tensor, rank: int) -> Tensor:
    """Leaves k directions in a full buffer of 2k rows; returns delta."""
    wide = buffer.double() if buffer.shape[0] <= 64 else buffer
    values, turn = eigh(wide @ wide.T)
    values = values.clamp(min=0)
    delta = values[rank - 1]
    top = values[rank:]
    shrink = ((top - delta) / top.clamp(min=torch.finfo(top.dtype).tiny)).clamp(min=0).sqrt()
    buffer[:rank] = ((turn[:, rank:] * shrink).T @ wide).to(buffer.dtype)
    lost: Tensor = delta.double()
    return lost
