"""What one pass tells of one layer."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["Record", "Source"]


@dataclass
class Source:
    """A layer's input in one batch, which several layers may read.

    Attributes:
        inputs: x, [batch, seq, d_in]; zero at padded positions.
        counts: how many positions of each sequence are not padded.
    """

    inputs: Tensor
    counts: tuple[int, ...]
    kept: dict[str, Tensor] = field(default_factory=dict)
    """What an estimator has made of the inputs, for the next layer that reads them."""

    @property
    def positions(self) -> int:
        """How many positions are not padded."""
        return sum(self.counts)

    @cached_property
    def gram(self) -> Tensor:
        """``x x^T`` of each sequence, [batch, seq, seq]."""
        return self.inputs @ self.inputs.mT


@dataclass(frozen=True)
class Record:
    """Inputs and output gradients of one layer in one backward pass.

    Attributes:
        name: the layer.
        source: its input.
        gradients: g, [batch, seq, d_out]: the gradient, at the layer's output, of the sum over a
            sequence's predictions of the log-likelihood of their labels; zero where padded. Where
            there is no backward pass, the layer's outputs y.
        weight: of this pass in the expectation over labels.
        first: whether this is the first pass over this batch (the inputs are the same in all).
        chosen: the sequences that enter the products, or None for all.
    """

    name: str
    source: Source
    gradients: Tensor
    weight: float
    first: bool
    chosen: tuple[int, ...] | None = field(default=None)

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

    def made(self, what: str) -> Tensor | None:
        """One of the products above if it has been computed already."""
        return self.__dict__.get(what)

    def narrowed(self) -> Record:
        """The record of the chosen sequences alone."""
        if self.chosen is None:
            return self
        rows = torch.tensor(self.chosen, device=self.gradients.device)
        x = self.inputs[rows]
        source = Source(x, tuple(self.source.counts[i] for i in self.chosen))
        if "gram" in self.source.__dict__:
            source.__dict__["gram"] = self.source.gram[rows]
        found = replace(self, source=source, gradients=self.gradients[rows], chosen=None)
        if "matrices" in self.__dict__:
            found.__dict__["matrices"] = self.matrices[rows]
        return found
