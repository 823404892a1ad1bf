"""Tokenised examples and padded batches.

A causal model's example of tokens s_0 .. s_n is kept as inputs s_0 .. s_{n-1} and targets
s_1 .. s_n: the last token predicts nothing, so it is never fed. ``predict`` marks the targets
that count (all of a text; the completion of a prompt). A classifier's example has one target,
its label (a class, or the value of a regression), and ``predict`` is empty.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import compress

import torch
from torch import Tensor

from retain.errors import SourceError

__all__ = ["Batch", "Example", "batches", "check_fills", "collate", "rows_digest"]


@dataclass(frozen=True)
class Example:
    """One tokenised row.

    Attributes:
        tokens: input ids.
        targets: the next token at each position (causal), or the one label: a class (-1 for none),
            or the value of a regression (NaN for none).
        predict: which positions' targets count; empty for classification.
        segments: BERT's token types, where the tokenizer gives them.
        prompted: whether the first token is not learned but given, which `predict`, of the tokens
            behind it, does not tell. Known of rows of text that were encoded for a decoder.
    """

    tokens: tuple[int, ...]
    targets: tuple[int | float, ...]
    predict: tuple[bool, ...] = ()
    segments: tuple[int, ...] = ()
    prompted: bool = field(default=False, compare=False, kw_only=True)

    @property
    def predictions(self) -> int:
        """How many predictions the example asks for."""
        return sum(self.predict) if self.predict else 1

    @property
    def wanted(self) -> list[int | float]:
        """The targets that count."""
        return list(compress(self.targets, self.predict)) if self.predict else list(self.targets)

    @property
    def content(self) -> bytes:
        """What tells it from other rows, for a digest."""
        return repr((self.tokens, self.targets, self.predict, self.segments)).encode()

    def cut(self, tokens: int) -> Example:
        """Its first tokens; a row of classification keeps its label."""
        n, causal = tokens, bool(self.predict)
        targets = self.targets[:n] if causal else self.targets
        return Example(
            self.tokens[:n], targets, self.predict[:n], self.segments[:n], prompted=self.prompted
        )


@dataclass(frozen=True)
class Batch:
    """A padded batch.

    Attributes:
        inputs: arguments of the model: ``input_ids`` and ``attention_mask``, [batch, seq].
        predict: [batch, seq], true where a target counts; None for classification.
        targets: [predictions], row after row; whole numbers, or real ones of a regression.
        lengths: predictions of each row.
        rows: the number of each row in its source.
    """

    inputs: dict[str, Tensor]
    predict: Tensor | None
    targets: Tensor
    lengths: list[int]
    rows: list[int] = field(default_factory=list)

    @property
    def mask(self) -> Tensor:
        """[batch, seq], true where a token is no padding."""
        return self.inputs["attention_mask"].bool()

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        return Batch(
            {k: v.to(device) for k, v in self.inputs.items()},
            None if self.predict is None else self.predict.to(device),
            self.targets.to(device),
            self.lengths,
            self.rows,
        )


def collate(
    examples: Sequence[Example], pad: int, rows: Sequence[int] = (), multiple: int = 1
) -> Batch:
    """Pads examples on the right to the longest of them (rounded up to a `multiple`)."""
    longest = max(len(e.tokens) for e in examples)
    width = -(-longest // multiple) * multiple

    def padded(parts: Iterable[Sequence[int]], value: int = 0) -> Tensor:
        return torch.tensor([[*part, *[value] * (width - len(part))] for part in parts])

    inputs = {
        "input_ids": padded((e.tokens for e in examples), pad),
        "attention_mask": padded([1] * len(e.tokens) for e in examples),
    }
    if any(e.segments for e in examples):
        inputs["token_type_ids"] = padded(e.segments for e in examples)
    causal = bool(examples[0].predict)
    return Batch(
        inputs,
        padded(e.predict for e in examples).bool() if causal else None,
        torch.tensor([target for e in examples for target in e.wanted]),
        [e.predictions for e in examples],
        list(rows),
    )


def by_length(examples: Sequence[Example]) -> list[int]:
    """Their numbers, those of short ones first."""
    return sorted(range(len(examples)), key=lambda i: (len(examples[i].tokens), i))


def rows_digest(examples: Iterable[Example]) -> str:
    """What tells rows, and their order, from others."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(example.content)
    return digest.hexdigest()


def check_fills(count: int, size: int, option: str = "batch_size=") -> None:
    """Refuses to train on rows that fill no batch.

    Raises:
        SourceError: there are fewer than `size`; `option` is how a size is given.
    """
    if count < size:
        raise SourceError(
            "the training data are smaller than one batch",
            got=f"{count} examples, batch size {size}",
            allowed=f"at least {size} examples",
            fix=f"{option}{count}" if count else "give some rows",
        )


def batches(
    examples: Sequence[Example], size: int, pad: int, *, multiple: int = 1
) -> Iterator[Batch]:
    """Batches of examples of like length, so that little is padding.

    Raises:
        SourceError: fewer examples than fill one batch, or none.
    """
    if size < 1 or len(examples) < size:
        raise SourceError(
            "the source is smaller than one batch" if examples else "the source is empty",
            got=f"{len(examples)} examples, batch size {size}",
            allowed=f"at least {max(size, 1)} examples and a batch size of at least 1",
            fix="give more text, or a smaller batch size",
        )
    order = by_length(examples)
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        yield collate([examples[i] for i in rows], pad, rows, multiple)
