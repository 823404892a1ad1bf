"""What one pass tells of one layer."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["LayerInput", "Observation"]


@dataclass
class LayerInput:
    """A layer's input in one batch, which several layers may read.

    Attributes:
        inputs: x, [batch, seq, d_in]; zero at padded positions.
        counts: how many positions of each sequence are not padded.
        made: what an estimator has made of the inputs, for the next layer that reads them.
    """

    inputs: Tensor
    counts: tuple[int, ...]
    made: dict[str, Tensor] = field(default_factory=dict)

    @property
    def positions(self) -> int:
        """How many positions are not padded."""
        return sum(self.counts)

    @cached_property
    def gram(self) -> Tensor:
        """``x x^T`` of each sequence, [batch, seq, seq]."""
        return self.inputs @ self.inputs.mT


@dataclass(frozen=True)
class Observation:
    """Inputs and output gradients of one layer in one backward pass.

    Attributes:
        name: the layer.
        source: its input.
        gradients: g, [batch, seq, d_out]: the gradient, at the layer's output, of the sum over a
            sequence's predictions of the log-likelihood of their labels; zero where padded. Where
            there is no backward pass, the layer's outputs y.
        weight: of this pass in the expectation over labels.
        first: whether this is the first pass over this batch (the inputs are the same in all).
    """

    name: str
    source: LayerInput
    gradients: Tensor
    weight: float
    first: bool

    @property
    def inputs(self) -> Tensor:
        """x, [batch, seq, d_in]."""
        return self.source.inputs

    @cached_property
    def grams(self) -> tuple[Tensor, Tensor]:
        """``x x^T`` and ``g g^T`` of each sequence, [batch, seq, seq] each."""
        return self.source.gram, self.gradients @ self.gradients.mT

    @cached_property
    def matrices(self) -> Tensor:
        """``sum_t g_t x_t^T`` of each sequence, [batch, d_out, d_in]."""
        return self.gradients.mT @ self.inputs

    @cached_property
    def traces(self) -> Tensor:
        """``|| sum_t g_t x_t^T ||^2`` of each sequence, [batch].

        By whichever way is cheaper: the Gram matrices over positions,
        ``sum_{t,t'} (x_t . x_t') (g_t . g_t')``, or the gradient matrix itself.
        """
        x, g = self.inputs, self.gradients
        seq, d_in, d_out = x.shape[1], x.shape[2], g.shape[2]
        if seq * (d_in + d_out) <= d_in * d_out:
            gram_x, gram_g = self.grams
            return (gram_x * gram_g).sum((1, 2))
        return self.matrices.flatten(1).square().sum(1)

    @property
    def matrices_if_made(self) -> Tensor | None:
        """`matrices` if it has been computed already, as for a small layer's traces."""
        return self.__dict__.get("matrices")

    def of(self, chosen: tuple[int, ...]) -> Observation:
        """The observation of these sequences alone."""
        rows = torch.tensor(chosen, device=self.gradients.device)
        x = self.inputs[rows]
        source = LayerInput(x, tuple(self.source.counts[i] for i in chosen))
        if "gram" in self.source.__dict__:
            source.__dict__["gram"] = self.source.gram[rows]
        found = replace(self, source=source, gradients=self.gradients[rows])
        if "matrices" in self.__dict__:
            found.__dict__["matrices"] = self.matrices[rows]
        return found
