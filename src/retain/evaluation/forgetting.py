"""How far a tuned model has moved from its base, measured on held-out source text.

The base is always the same model with its adapter switched off, so an untouched adapter
measures exactly zero: the two forward passes are then the same arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from retain.data.batches import Batch, Example, batches
from retain.data.sources import Row, encode, read_rows
from retain.errors import SourceError
from retain.models.adapter import adapter_off
from retain.models.heads import forward_logits, is_causal
from retain.models.modes import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Forgetting", "Reference", "answer_loss", "measure_forgetting"]


@dataclass(frozen=True)
class Forgetting:
    """What was measured; all per prediction on held-out source text.

    Attributes:
        kl: ``KL(base || tuned)`` in nats per token.
        kl_interval: its 95 % interval, from the spread over sequences.
        ppl_base: perplexity of the base.
        ppl: perplexity of the tuned model.
        flips: share of predictions whose most likely label changed.
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
        progress: bool = False,
        label: str = "base predictions",
    ) -> None:
        pad = getattr(model.config, "pad_token_id", None) or 0
        device = next(model.parameters()).device
        self.batches = [b.to(device) for b in batches(examples, batch_size, pad)]
        with adapter_off(model):
            bar = tqdm(self.batches, desc=label, unit="batch", disable=not progress)
            self.base = [_log_probabilities(model, batch) for batch in bar]

    def measure(self, model: nn.Module) -> Forgetting:
        """Compares the tuned model (the adapter on) with the base."""
        total = _Total()
        for batch, base in zip(self.batches, self.base, strict=True):
            total.add(batch, base, _log_probabilities(model, batch))
        return total.result()


def measure_forgetting(
    model: nn.Module,
    source: str | Path | Iterable[Row],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    rows: int = 64,
    max_length: int = 128,
    batch_size: int = 8,
    progress: bool = False,
) -> Forgetting:
    """KL, perplexities and flips of a tuned model against its base, on held-out source text.

    Args:
        model: a PEFT model; its base is itself with the adapter off.
        source: held-out text, as for `retain.fit_curvature` (but not ``"self"``).
        tokenizer: for text.
        rows: rows that are read at most.
        max_length: tokens of a row that are read at most.
        batch_size: rows a pass.
        progress: show a bar.

    Raises:
        SourceError: the text is missing, empty or smaller than one batch.
        ModelError: the model has no adapter or no head.
    """
    if isinstance(source, str) and source == "self":
        raise SourceError(
            "forgetting is measured on text that is given",
            got="'self'",
            allowed="a data set, a file or rows",
            fix="sample rows first: retain.models.sample",
        )
    found = read_rows(source, rows)
    examples = encode(found, tokenizer, max_length=max_length, causal=is_causal(model))[:rows]
    pad = getattr(model.config, "pad_token_id", None) or 0
    device = next(model.parameters()).device
    total = _Total()
    every = list(batches(examples, min(batch_size, len(examples)), pad))
    for batch in tqdm(every, desc="forgetting", unit="batch", disable=not progress):
        batch = batch.to(device)
        with adapter_off(model):
            base = _log_probabilities(model, batch)
        total.add(batch, base, _log_probabilities(model, batch))
    return total.result()


def _log_probabilities(model: nn.Module, batch: Batch) -> Tensor:
    """[predictions, classes] in float32 at least."""
    with evaluating(model), torch.no_grad():
        logits = forward_logits(model, batch)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


class _Total:
    """Sums over batches."""

    def __init__(self) -> None:
        self.kl: list[float] = []  # of each sequence
        self.sizes: list[int] = []
        self.loss_base = self.loss = self.flips = 0.0

    def add(self, batch: Batch, base: Tensor, tuned: Tensor) -> None:
        kl = (base.exp() * (base - tuned)).sum(-1)
        self.kl += [float(part.double().sum()) for part in kl.split(batch.lengths)]
        self.sizes += batch.lengths
        where = torch.arange(len(batch.targets), device=base.device), batch.targets
        self.loss_base -= float(base[where].double().sum())
        self.loss -= float(tuned[where].double().sum())
        self.flips += float((base.argmax(-1) != tuned.argmax(-1)).sum())

    def result(self) -> Forgetting:
        n, rows = sum(self.sizes), len(self.sizes)
        kl = sum(self.kl) / n
        spread = sum((k - kl * s) ** 2 for k, s in zip(self.kl, self.sizes, strict=True))
        half = 1.96 * math.sqrt(spread * rows / max(1, rows - 1)) / n
        interval = (max(0.0, kl - half), kl + half)
        return Forgetting(
            kl, interval, _exp(self.loss_base / n), _exp(self.loss / n), self.flips / n, n
        )


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def answer_loss(model: nn.Module, batches: Sequence[Batch]) -> float:
    """Mean cross-entropy in nats per predicted token."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    with evaluating(model), torch.no_grad():
        for batch in batches:
            logits: Tensor = forward_logits(model, batch).float()
            total += (
                nn.functional.cross_entropy(logits, batch.targets, reduction="sum").double().cpu()
            )
            count += len(batch.targets)
    return float(total) / count
