"""What one backward pass tells of one layer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

__all__ = ["Record"]


@dataclass(frozen=True)
class Record:
    """Inputs and output gradients of one layer in one backward pass.

    Attributes:
        name: the layer.
        inputs: x, [batch, seq, d_in]; zero at padded positions.
        gradients: g, [batch, seq, d_out]: the gradient, at the layer's output, of the sum over a
            sequence's predictions of the log-likelihood of their labels; zero where padded.
        positions: how many positions are not padded.
        weight: of this pass in the expectation over labels.
        first: whether this is the first pass over this batch (the inputs are the same in all).
    """

    name: str
    inputs: Tensor
    gradients: Tensor
    positions: int
    weight: float
    first: bool

    @cached_property
    def traces(self) -> Tensor:
        """``|| sum_t g_t x_t^T ||^2`` of each sequence, [batch].

        By whichever way is cheaper: the Gram matrices over positions,
        ``sum_{t,t'} (x_t . x_t') (g_t . g_t')``, or the gradient matrix itself.
        """
        x, g = self.inputs, self.gradients
        seq, d_in, d_out = x.shape[1], x.shape[2], g.shape[2]
        if seq * (d_in + d_out) <= d_in * d_out:
            return ((x @ x.mT) * (g @ g.mT)).sum((1, 2))
        return (g.mT @ x).square().sum((1, 2))
