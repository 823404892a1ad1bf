"""What is measured of a model: how far it has moved from its base, and its curvature on rows.

The base is always the same model with its adapter switched off, so an untouched adapter
measures exactly zero: the two forward passes are then the same arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from retain.curvature.curvature import Curvature
from retain.curvature.fit.fit import fit_curvature
from retain.data.batches import Batch, Example, batches
from retain.models.adapter import adapter_off
from retain.models.heads import divergence, forward_logits, pad_id
from retain.models.kinds import is_regression
from retain.models.modes import evaluating
from retain.retention.method import Context
from retain.types import Structure

__all__ = ["Forgetting", "Reference", "Total", "fit_rows", "predictions"]


@dataclass(frozen=True)
class Forgetting:
    """What was measured; all per prediction on held-out source text.

    Attributes:
        kl: ``KL(base || tuned)`` in nats per token.
        kl_interval: its 95 % interval, from the spread over sequences.
        ppl_base: perplexity of the base, over predictions with a label; NaN where none has one, and
            of a regression.
        ppl: perplexity of the tuned model.
        flips: share of predictions whose most likely label changed; NaN of a regression.
        tokens: predictions.
    """

    kl: float
    kl_interval: tuple[float, float]
    ppl_base: float
    ppl: float
    flips: float
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """As plain data for JSON."""
        return asdict(self)


class Reference:
    """The base's predictions on held-out text, kept so that they are computed once.

    Args:
        model: the model with its adapter.
        examples: held-out examples.
        batch_size: rows a pass.
        base: inside it the model is the base; without its adapter, by default.
        progress: show a bar.
        label: of the bar.

    The log-probabilities are kept in float32, ``4 * vocabulary`` bytes a token; for a large
    vocabulary keep the text short (2,000 tokens of SmolLM2 take 400 MB).
    """

    def __init__(
        self,
        model: nn.Module,
        examples: Sequence[Example],
        *,
        batch_size: int = 8,
        base: Callable[[nn.Module], AbstractContextManager[object]] = adapter_off,
        progress: bool = False,
        label: str = "base predictions",
    ) -> None:
        pad = pad_id(model)
        device = next(model.parameters()).device
        self.batches = [b.to(device) for b in batches(examples, batch_size, pad)]
        with base(model):
            bar = tqdm(self.batches, desc=label, unit="batch", disable=not progress)
            self.base = [predictions(model, batch) for batch in bar]

    def measure(self, model: nn.Module) -> Forgetting:
        """Compares the tuned model (the adapter on) with the base."""
        total = Total(is_regression(model))
        for batch, base in zip(self.batches, self.base, strict=True):
            total.add(batch, base, predictions(model, batch))
        return total.result()


def predictions(model: nn.Module, batch: Batch) -> Tensor:
    """Log-probabilities, or a regression's outputs: [predictions, classes], at least float32."""
    with evaluating(model), torch.no_grad():
        logits = forward_logits(model, batch)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide if is_regression(model) else wide.log_softmax(-1)


class Total:
    """Sums over batches of `predictions`.

    Args:
        regression: they are values.
    """

    def __init__(self, regression: bool) -> None:
        self.regression = regression
        self.kl: list[float] = []  # of each sequence
        self.sizes: list[int] = []
        self.loss_base = self.loss = self.flips = 0.0
        self.labelled = 0

    def add(self, batch: Batch, base: Tensor, tuned: Tensor) -> None:
        kl = divergence(base, tuned, self.regression)
        self.kl += [float(part.double().sum()) for part in kl.split(batch.lengths)]
        self.sizes += batch.lengths
        if self.regression:
            self.flips = math.nan
            return
        rows = torch.nonzero(batch.targets >= 0)[:, 0]
        where = rows, batch.targets[rows]
        self.labelled += len(rows)
        self.loss_base -= float(base[where].double().sum())
        self.loss -= float(tuned[where].double().sum())
        self.flips += float((base.argmax(-1) != tuned.argmax(-1)).sum())

    def result(self) -> Forgetting:
        n, rows = sum(self.sizes), len(self.sizes)
        kl = sum(self.kl) / n
        spread = sum((k - kl * s) ** 2 for k, s in zip(self.kl, self.sizes, strict=True))
        half = 1.96 * math.sqrt(spread * rows / max(1, rows - 1)) / n
        interval = (max(0.0, kl - half), kl + half)
        known = self.labelled
        ppl = [_exp(x / known) if known else math.nan for x in (self.loss_base, self.loss)]
        return Forgetting(kl, interval, ppl[0], ppl[1], self.flips / n, n)


def fit_rows(
    context: Context, rows: Sequence[Example], structure: Structure, seed: int, **options: Any
) -> Curvature:
    """The curvature of all these rows at the model's present weights.

    Args:
        context: of the run.
        rows: tokenised.
        structure: see `retain.types.Structure`.
        seed: of label draws.
        **options: of `retain.fit_curvature`.
    """
    return fit_curvature(
        context.adapter.model,
        list(rows),
        structure,
        rows=len(rows),
        max_length=max(len(e.tokens) for e in rows) + 1,
        batch_size=min(context.batch_size, len(rows)),
        seed=seed,
        progress=context.progress,
        **options,
    )


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf
