"""What is measured of a model: how far it has moved from its base.

The base is always the same model with its adapter switched off, so an untouched adapter
measures exactly zero: the two forward passes are then the same arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from retain.data.batches import Batch, Example
from retain.intervals import t_quantile
from retain.models.forward import divergence, log_probabilities
from retain.models.off import adapter_off
from retain.models.view import ModelView

__all__ = ["Forgetting", "Reference"]


@dataclass(frozen=True)
class Forgetting:
    """What was measured; all per prediction on held-out source text.

    Attributes:
        kl: ``KL(base || tuned)`` in nats per token.
        kl_interval: its 95 % interval, from the spread over sequences (Student's t); of a single
            sequence it has no width.
        ppl_base: perplexity of the base on labelled predictions; NaN of none, and of a regression.
        ppl: perplexity of the tuned model.
        flips: share of predictions whose most likely label changed; NaN of a regression.
        tokens: predictions.
        sequences: the nats and the predictions of each sequence, the same order for one text.
    """

    kl: float
    kl_interval: tuple[float, float]
    ppl_base: float
    ppl: float
    flips: float
    tokens: int
    sequences: tuple[tuple[float, int], ...] = field(default=(), repr=False)

    def bound(self, confidence: float) -> float:
        """The one-sided upper bound of the divergence on text like this, in nats per token.

        Student's t over the sequences: ``kl + t(n - 1) · s / sqrt(n)``, where a sequence counts by
        its predictions. Few sequences that are skewed hold it somewhat less often than it says.

        Args:
            confidence: with which the divergence is below it, from 0.5.

        Returns:
            Infinity of a single sequence, which has no spread.
        """
        count = len(self.sequences)
        if count < 2:
            return math.inf
        return self.kl + t_quantile(count - 1, 2 * confidence - 1) * _error(self.kl, self.sequences)

    def to_dict(self) -> dict[str, Any]:
        """As plain data for JSON, without the single sequences."""
        return {name: value for name, value in asdict(self).items() if name != "sequences"}


class Reference:
    """The base's predictions on held-out text, which tuned models are compared with.

    Args:
        model: the model with its adapter.
        examples: held-out examples.
        batch_size: rows a pass, at most.
        base: inside what it gives the model is the base; its adapter off by default.
        keep: the base's predictions, so that they are computed once: log-probabilities in float32,
            ``4 * vocabulary`` bytes a token (2,000 tokens of SmolLM2 take 400 MB).
        progress: show a bar.
        label: of the bar.
    """

    def __init__(
        self,
        model: nn.Module,
        examples: Sequence[Example],
        *,
        batch_size: int = 8,
        base: Callable[[], AbstractContextManager[object]] | None = None,
        keep: bool = True,
        progress: bool = False,
        label: str = "base predictions",
    ) -> None:
        self.batches = ModelView(model).batches(examples, batch_size)
        self._base = base
        self._bar: dict[str, Any] = {"desc": label, "unit": "batch", "disable": not progress}
        self._kept = list(self._pairs(model)) if keep else []

    @property
    def rows(self) -> int:
        """How many rows it measures on."""
        return sum(len(batch.lengths) for batch in self.batches)

    def measure(self, model: nn.Module) -> Forgetting:
        """Compares the tuned model (the adapter on) with the base."""
        regression = ModelView(model).regression
        kl: list[float] = []  # of each sequence
        loss_base = loss = flips = 0.0
        labelled = 0
        for batch, base in self._kept or self._pairs(model):
            tuned = _predictions(model, batch)
            apart = divergence(base, tuned, regression)
            kl += [float(part.double().sum()) for part in apart.split(batch.lengths)]
            if regression:
                continue
            targets = batch.targets.to(base.device)
            rows = torch.nonzero(targets >= 0)[:, 0]
            where = rows, targets[rows]
            labelled += len(rows)
            loss_base -= float(base[where].double().sum())
            loss -= float(tuned[where].double().sum())
            flips += float((base.argmax(-1) != tuned.argmax(-1)).sum())
        sizes = [n for batch in self.batches for n in batch.lengths]
        tokens, sequences = sum(sizes), tuple(zip(kl, sizes, strict=True))
        mean = sum(kl) / tokens
        half = t_quantile(max(1, len(sequences) - 1)) * _error(mean, sequences)
        return Forgetting(
            kl=mean,
            kl_interval=(max(0.0, mean - half), mean + half),
            ppl_base=_perplexity(loss_base, labelled),
            ppl=_perplexity(loss, labelled),
            flips=math.nan if regression else flips / tokens,
            tokens=tokens,
            sequences=sequences,
        )

    def _pairs(self, model: nn.Module) -> Iterator[tuple[Batch, Tensor]]:
        """Each batch with the base's predictions."""
        for batch in tqdm(self.batches, **self._bar):
            with adapter_off(model) if self._base is None else self._base():
                base = _predictions(model, batch)
            yield batch, base


def _error(mean: float, sequences: Sequence[tuple[float, int]]) -> float:
    """The standard error of the nats per prediction of some sequences."""
    count = len(sequences)
    spread = sum((nats - mean * n) ** 2 for nats, n in sequences)
    return math.sqrt(spread * count / max(1, count - 1)) / sum(n for _, n in sequences)


def _predictions(model: nn.Module, batch: Batch) -> Tensor:
    """Log-probabilities, or a regression's outputs: [predictions, classes], at least float32."""
    view = ModelView(model)
    with view.evaluating(), torch.no_grad():
        logits = view.logits(batch)
    return log_probabilities(logits, view.regression)


def _perplexity(loss: float, count: int) -> float:
    if not count:
        return math.nan
    return math.exp(loss / count) if loss / count < 700 else math.inf
