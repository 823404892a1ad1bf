"""Forgetting of a tuned model on held-out source text."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from retain.data.draws import HELD_OUT
from retain.data.sources import Row
from retain.errors import SourceError
from retain.models.off import check_on
from retain.models.view import ModelView
from retain.retention.measure import Forgetting, Reference

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Forgetting", "Reference", "measure_forgetting"]


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
        SourceError: the text is missing or empty, or the model's tables
            have no place for it.
        ModelError: the model has no adapter or no head, or an adapter that cannot be switched off
            so that the base is what it was; see `retain.models.off`.
    """
    if isinstance(source, str) and source == "self":
        raise SourceError(
            "forgetting is measured on text that is given",
            got="'self'",
            allowed="a data set, a file or rows",
            fix="sample rows first: retain.models.generating",
        )
    check_on(model)
    view = ModelView.of(model, tokenizer)
    labels = not view.regression
    examples = view.read(source, rows, max_length=max_length, seed=seed, labels=labels)
    reference = Reference(
        model, examples, batch_size=batch_size, keep=False, progress=progress, label="forgetting"
    )
    return reference.measure(model)
