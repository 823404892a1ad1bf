"""Runs batches through a model and routes what the hooks see to an estimator."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from retain.curvature.block import Block
from retain.curvature.labels import cotangents
from retain.curvature.record import Record
from retain.data.batches import Batch
from retain.errors import CurvatureError
from retain.models.heads import forward_logits
from retain.types import Fisher

__all__ = ["Estimator", "Gather"]


class Estimator(Protocol):
    """What turns a stream of records into blocks."""

    def update(self, record: Record) -> None:
        """Takes one layer's inputs and gradients of one backward pass."""

    def finish(self, predictions: int) -> dict[str, Block]:
        """The blocks; `predictions` is the number of predicted tokens that were seen."""


class Gather:
    """One pass over a source."""

    def __init__(
        self, model: nn.Module, layers: Mapping[str, nn.Module], estimator: Estimator
    ) -> None:
        self.model, self.estimator = model, estimator
        self.predictions = 0
        self.largest: dict[str, float] = dict.fromkeys(layers, 0.0)
        self.moments: list[tuple[list[float], int]] = []  # a sequence's draws of the trace
        self._batch: Batch | None = None
        self._weight, self._first = 1.0, True
        self._fired: set[str] = set()
        self._traces: Tensor | None = None

    def batch(self, batch: Batch, fisher: Fisher, samples: int, seed: int) -> None:
        """Forward once, and backward once for each cotangent."""
        self._batch, self._first = batch, True
        with torch.enable_grad():
            logits = forward_logits(self.model, batch)
            passes = cotangents(
                logits, batch.lengths, batch.targets, batch.rows, fisher, samples, seed
            )
            draws: list[list[float]] = []
            for cotangent, self._weight in passes:
                self._fired.clear()
                self._traces = None
                logits.backward(cotangent.to(logits.dtype), retain_graph=True)
                self._first = False
                if self._traces is not None and fisher != "exact":
                    draws.append(self._traces.tolist())
        if draws:
            each = zip(*draws, strict=True)
            self.moments += [(list(d), n) for d, n in zip(each, batch.lengths, strict=True)]
        self.predictions += sum(batch.lengths)

    def receive(self, name: str, x: Tensor, g: Tensor) -> None:
        """Takes one layer's inputs and output gradients from the hooks."""
        batch = self._batch
        assert batch is not None
        if name in self._fired:
            raise CurvatureError(
                "a layer is used twice in one pass",
                got=name,
                allowed="once",
                fix="leave that layer out of the adapter's target_modules",
            )
        self._fired.add(name)
        wide = torch.promote_types(x.dtype, torch.float32)
        mask = batch.mask
        rows = mask.shape[0]
        if x.dim() == 2 and x.shape[0] == rows:  # after pooling: one position a sequence
            x, g, mask = x[:, None], g[:, None], mask.new_ones(rows, 1)
        x = x.reshape(*mask.shape, -1).to(wide) * mask[..., None]
        g = g.reshape(*mask.shape, -1).to(wide) * mask[..., None]
        record = Record(name, x, g, int(mask.sum()), self._weight, self._first)
        largest = float(g.abs().max())
        if not math.isfinite(largest):
            raise CurvatureError(
                "the model's gradients are not finite",
                got=f"NaN or infinity at {name}",
                allowed="finite numbers",
                fix="check the model's weights, or load it with dtype='float32'",
            )
        self.largest[name] = max(self.largest[name], largest)
        traces = record.traces
        self._traces = traces if self._traces is None else self._traces + traces
        self.estimator.update(record)

    def error(self) -> float:
        """Relative standard error of the trace.

        Over sequences, each with the mean of its draws (the ratio estimator); with a single
        sequence, over its draws. NaN where one draw of one sequence is all there is, and 0 where
        nothing is drawn.
        """
        if not self.moments:
            return 0.0
        if len(self.moments) == 1:
            draws = torch.tensor(self.moments[0][0], dtype=torch.float64)
            if len(draws) < 2:
                return math.nan
            return float(draws.std() / len(draws) ** 0.5 / draws.mean())
        t = torch.tensor([sum(d) / len(d) for d, _ in self.moments], dtype=torch.float64)
        n = torch.tensor([length for _, length in self.moments], dtype=torch.float64)
        spread = ((t - t.sum() / n.sum() * n) ** 2).sum() / (len(t) - 1) * len(t)
        return float(spread.sqrt() / t.sum())

    def dead(self) -> list[str]:
        """Layers that got no gradient at all."""
        return [name for name, value in self.largest.items() if value == 0.0]
