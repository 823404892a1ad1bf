"""The rows that a curvature is measured on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retain.curvature.fit.checkpoint import kept_rows
from retain.data.batches import Batch, Example, collate
from retain.data.draws import sample
from retain.data.sources import Row, encode, read_rows
from retain.errors import SourceError
from retain.models.fingerprint import fingerprint
from retain.models.generating import sample_rows
from retain.models.heads import check_labels, is_regression, row_label
from retain.models.sizes import check_sizes

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
    tokenizer = tokenizer or getattr(model, "retain_tokenizer", None)
    if isinstance(source, str) and source == "self":
        if not causal:
            raise SourceError(
                "only a causal model can sample its own text",
                got="source='self'",
                allowed="a data set or a file",
                fix="give source text with the classifier's fields",
            )
        what = [fingerprint(model), rows, max_length, seed]
        source = kept_rows(
            partial,
            what,
            lambda: sample_rows(
                model, tokenizer, count=rows, max_length=max_length, seed=seed, progress=progress
            ),
        )
    found: Sequence[Example]
    if isinstance(source, list | tuple) and source and isinstance(source[0], Example):
        found = sample(source, rows, seed)
    else:
        read: list[Row] = read_rows(
            source,  # type: ignore[arg-type]
            rows,
            seed=seed,
            max_length=max_length,
        )
        check_labels(model, () if causal else (row_label(row) for row in read))
        if regression is None:
            regression = not causal and is_regression(model)
        every = encode(
            read, tokenizer, max_length=max_length, causal=causal, loss="source",
            regression=regression,
        )  # fmt: skip
        found = sample(every, rows, seed)  # a text that is one row gives many
    check_sizes(model, found, tokenizer, labels=False)
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
