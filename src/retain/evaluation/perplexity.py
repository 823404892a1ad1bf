"""Perplexity of a causal model on text: exp of its mean loss in nats per predicted token.

Which tokens count:

- every token of a row but its first, which nothing predicts (a tokenizer's beginning-of-text
  token, where it has one, is that first);
- without a stride, a row is cut at `max_length` tokens, and what is behind is not read. Only the
  pieces of a plain text file are all read: each piece of `max_length` tokens is a row of its own;
- with a stride, rows are not cut: windows of `max_length` tokens move on by `stride`, and a token
  counts once, in the first window that holds it. Those after the first window see at least
  ``max_length - stride`` tokens before them.

The mean is over tokens, not over rows. It is not a perplexity per word: models with different
tokenizers cannot be compared by it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from retain.data.batches import Example
from retain.data.draws import sample
from retain.data.sources import Row, encode, read_rows
from retain.errors import ConfigError
from retain.evaluation.forgetting import answer_loss
from retain.models.view import ModelView

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Perplexity", "measure_perplexity"]

_WHOLE = 1 << 40  # no row is longer
_WINDOWS = 8
"""Lengths of a window that a passage of a text file has at least, about, where windows move on."""


@dataclass(frozen=True)
class Perplexity:
    """What was measured.

    Attributes:
        value: perplexity; inf beyond what a float holds.
        loss: its logarithm, nats per predicted token.
        tokens: predicted tokens.
        rows: rows that were read.
    """

    value: float
    loss: float
    tokens: int
    rows: int


def measure_perplexity(
    model: nn.Module,
    source: str | Path | Iterable[Row],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    rows: int | None = None,
    max_length: int = 256,
    stride: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> Perplexity:
    """Perplexity on rows of text; see the module for the tokens that count.

    Args:
        model: a causal model, as it is (an adapter stays on).
        source: text, as for `retain.fit_curvature` (but not ``"self"``).
        tokenizer: for text.
        rows: rows that are read at most, drawn from all; of a plain text file, passages.
        max_length: tokens of a row, or of a window.
        stride: tokens between the beginnings of two windows; None cuts rows instead.
        batch_size: rows, or windows, a pass.
        seed: of the draw.

    Raises:
        ConfigError: the model is not causal, or a stride that does not fit.
        SourceError: the text is missing, empty or damaged, or the model's tables have no place for
            it.
    """
    view = ModelView.of(model, tokenizer)
    if not view.causal:
        raise ConfigError(
            "perplexity is of causal models",
            got="a classifier",
            allowed="a model with a language-model head",
            fix="load it without num_labels",
        )
    if stride is not None and not 0 < stride < max_length:
        raise ConfigError(
            "a stride that does not fit",
            got=stride,
            allowed=f"1 to {max_length - 1}, less than max_length",
            fix=f"{max(1, max_length // 2)}",
        )
    needed = max_length if stride is None else _WINDOWS * max_length
    found = read_rows(source, rows, seed=seed, max_length=needed)
    whole = encode(
        found,
        view.tokenizer,
        max_length=max_length if stride is None else _WHOLE,
        causal=True,
        loss="source",
    )
    examples = read = sample(whole, rows, seed)
    if stride is not None:
        examples = [w for e in examples for w in _windows(e, max_length, stride)]
    view.check(examples)
    loss = answer_loss(model, view.batches(examples, batch_size))
    tokens = sum(e.predictions for e in examples)
    return Perplexity(math.exp(loss) if loss < 700 else math.inf, loss, tokens, len(read))


def _windows(row: Example, length: int, stride: int) -> list[Example]:
    """A row of n tokens as windows of `length` tokens; each of its predictions counts in one."""
    n, done, start, windows = len(row.tokens) + 1, 1, 0, []  # `done` tokens need no prediction
    while done < n:
        end = min(start + length, n)
        span = slice(start, end - 1)  # the last token of a window is only predicted
        counts = tuple(k + 1 >= done and row.predict[k] for k in range(start, end - 1))
        if any(counts):
            windows.append(Example(row.tokens[span], row.targets[span], counts))
        done, start = end, start + stride
    return windows
