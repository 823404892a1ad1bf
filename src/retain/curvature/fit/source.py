"""The rows that a curvature is measured on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retain.curvature.fit.checkpoint import kept_rows
from retain.data.batches import Batch, Example, collate
from retain.data.sources import Row
from retain.errors import SourceError
from retain.models.generating import sample_rows
from retain.models.view import ModelView

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["glance", "source_examples"]


def source_examples(
    model: Any,
    source: str | Path | Iterable[Row] | Sequence[Example],
    tokenizer: PreTrainedTokenizerBase | None,
    causal: bool,
    rows: int,
    max_length: int,
    batch_size: int,
    seed: int,
    partial: str | Path | None,
    progress: bool,
    regression: bool | None = None,
) -> Sequence[Example]:
    """Tokenised rows of a source, at most `rows` of them, drawn by `seed`; see `fit_curvature`.

    A classifier's labels are values where `regression` says so; by default, where its head does.

    Raises:
        SourceError: text that is missing, empty or smaller than one batch; or ``"self"`` for a
            model that cannot write; or rows that its tables have no place for.
    """
    view = ModelView.of(model, tokenizer)
    if isinstance(source, str) and source == "self":
        if not causal:
            raise SourceError(
                "only a causal model can sample its own text",
                got="source='self'",
                allowed="a data set or a file",
                fix="give source text with the classifier's fields",
            )
        length: dict[str, Any] = {"max_length": max_length, "seed": seed, "progress": progress}
        what = [view.fingerprint, rows, max_length, seed]
        source = kept_rows(
            partial, what, lambda: sample_rows(view.model, view.tokenizer, count=rows, **length)
        )
    found = view.read(
        source, rows, max_length=max_length, seed=seed, values=regression, labels=False
    )  # a text that is one row gives many
    if len(found) < batch_size:
        raise SourceError(
            "the source is smaller than one batch",
            got=f"{len(found)} sequences, batch size {batch_size}",
            allowed=f"at least {batch_size} sequences",
            fix="give more text, or a smaller batch size",
        )
    return found


def glance(example: Example, pad: int) -> Batch:
    """A few tokens, enough to see which layers read what."""
    some = replace(
        example,
        tokens=example.tokens[:8],
        targets=example.targets[:8] if example.predict else example.targets,
        predict=example.predict and (True,) * len(example.predict[:8]),
        segments=example.segments[:8],
    )
    return collate([some], pad, [0])
