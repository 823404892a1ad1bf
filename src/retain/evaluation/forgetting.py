"""Forgetting of a tuned model on held-out source text, and its loss on answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from retain.data.batches import Batch, batches
from retain.data.draws import HELD_OUT, sample
from retain.data.sources import Row, encode, read_rows
from retain.errors import SourceError
from retain.models.adapter import adapter_off
from retain.models.heads import forward_logits, is_causal, pad_id
from retain.models.kinds import check_labels, is_regression, row_label
from retain.models.modes import evaluating
from retain.models.off import check_on
from retain.models.sizes import check_sizes
from retain.retention.measure import Forgetting, Reference, Total, predictions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Forgetting", "Reference", "answer_loss", "measure_forgetting"]


def measure_forgetting(
    model: nn.Module,
    source: str | Path | Iterable[Row],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    rows: int = 64,
    max_length: int = 128,
    batch_size: int = 8,
    seed: int = HELD_OUT,
    progress: bool = False,
) -> Forgetting:
    """KL, perplexities and flips of a tuned model against its base, on held-out source text.

    Args:
        model: a PEFT model; its base is itself with the adapter off.
        source: held-out text, as for `retain.fit_curvature` (but not ``"self"``).
        tokenizer: for text.
        rows: rows that are read at most, drawn from all.
        max_length: tokens of a row that are read at most.
        batch_size: rows a pass.
        seed: of the draw; by default another than that of `retain.fit_curvature`, so that of one
            long text other parts are read.
        progress: show a bar.

    Raises:
        SourceError: the text is missing, empty or smaller than one batch, or the model's tables
            have no place for it.
        ModelError: the model has no adapter or no head, or an adapter that cannot be switched off
            so that the base is what it was; see `retain.models.off`.
    """
    if isinstance(source, str) and source == "self":
        raise SourceError(
            "forgetting is measured on text that is given",
            got="'self'",
            allowed="a data set, a file or rows",
            fix="sample rows first: retain.models.sample",
        )
    causal, regression = is_causal(model), is_regression(model)
    check_on(model)
    tokenizer = tokenizer or getattr(model, "retain_tokenizer", None)
    found = read_rows(source, rows, seed=seed, max_length=max_length)
    check_labels(model, () if causal else (row_label(row) for row in found))
    every = encode(
        found, tokenizer, max_length=max_length, causal=causal, loss="source",
        regression=regression,
    )  # fmt: skip
    examples = sample(every, rows, seed)
    check_sizes(model, examples, tokenizer, labels=not regression)
    pad = pad_id(model)
    device = next(model.parameters()).device
    total = Total(regression)
    padded = list(batches(examples, min(batch_size, len(examples)), pad))
    for batch in tqdm(padded, desc="forgetting", unit="batch", disable=not progress):
        batch = batch.to(device)
        with adapter_off(model):
            base = predictions(model, batch)
        total.add(batch, base, predictions(model, batch))
    return total.result()


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
