"""A classifier's rows as tokens, each with its label: a class, or the value of a regression."""

from __future__ import annotations

import math
from operator import index
from typing import TYPE_CHECKING, Any

from retain.data.batches import Example
from retain.data.counts import RowCounts
from retain.data.formats import content_of
from retain.data.messages import native
from retain.data.rows import Pair, Row, Text, Tokenised, check_characters
from retain.data.tokenised import tokenised_classified
from retain.data.tokens import need, plain, room_for
from retain.errors import SourceError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["UNLABELLED", "ClassifierRows", "target_of"]

UNLABELLED = -1
"""The target of a classifier's row without a label; a regression's is NaN."""

_MOST = 2**31
_NONE = (-1, -100)  # GLUE's test rows have -1, and PyTorch passes over -100


class ClassifierRows:
    """Tokenises a classifier's rows, one after another; see `retain.data.encoding.encode`."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        max_length: int,
        regression: bool | None,
        counts: RowCounts,
    ) -> None:
        self.tokenizer, self.max_length, self.counts = tokenizer, max_length, counts
        self.regression = regression

    def read(self, row: Row) -> list[Example]:
        """A row's example, or none.

        Raises:
            SourceError: a row of no known format, a damaged one, or a label that is no number.
        """
        content = content_of(row, causal=False, counts=self.counts)
        labels = [v for k in ("label", "labels") if (v := native(row.get(k))) is not None]
        if len(labels) > 1 and labels[0] != labels[1]:
            raise SourceError(
                "a row has two labels",
                got=f"label {labels[0]!r:.40} and labels {labels[1]!r:.40}",
                allowed="one of the two columns",
                fix="take one of them out",
            )
        target = target_of(labels[0] if labels else None, self.regression)
        more, size = 0, self.max_length
        if isinstance(content, Tokenised):
            ids, segments = tokenised_classified(content.cells)
        else:
            check_characters(vars(content))
            assert isinstance(content, Text | Pair)
            if isinstance(content, Pair):
                ids, segments, more = self._tokens(content.first, content.second)
            else:
                ids, segments, more = self._tokens(content.text)
        if not ids:
            self.counts.left_out_empty += 1
            return []
        if more or len(ids) > size:
            self.counts.texts_cut += 1
            self.counts.tokens_cut += more + max(0, len(ids) - size)
        return [Example(tuple(ids[:size]), (target,), (), tuple(segments[:size]))]

    def _tokens(self, *texts: str) -> tuple[list[int], list[int], int]:
        """One or two texts as the tokenizer joins and cuts them: tokens, types, tokens behind."""
        tok, size = need(self.tokenizer), self.max_length
        more, short = 0, []
        for text in texts:
            room = room_for(size)
            while len(text) > room and len(plain(tok, text[:room])) < 2 * size:
                room *= 8
            short.append(text[:room])
            more += round(max(0, len(text) - room) / 4)
        out = tok(*short, verbose=False)
        if len(out["input_ids"]) > size:
            more += len(out["input_ids"]) - size
            out = tok(*short, truncation=True, max_length=size)
        return list(out["input_ids"]), list(out.get("token_type_ids", ())), more


def target_of(label: Any, regression: bool | None) -> int | float:
    """A label as a target.

    Args:
        label: a number, or one written as text (as CSV files have it); None or "" for none.
        regression: whether it is a value (any finite number) or a class (a whole number from 0;
            -1 and -100 mean none). None takes whole numbers as classes and others as values.

    Raises:
        SourceError: anything else.
    """
    label = native(label)
    if label is None or (isinstance(label, str) and not label.strip()):
        return math.nan if regression else UNLABELLED
    number = _number(label)
    if number is None or not abs(number) < math.inf:
        raise _refused(label, number, regression)
    if regression:
        return float(number)
    if number in _NONE:
        return UNLABELLED
    if isinstance(number, float) and not number.is_integer() and regression is None:
        return number
    if number % 1 or (number < 0 and regression is False) or abs(number) >= _MOST:
        raise _refused(label, number, regression)
    return int(number)


def _number(label: Any) -> int | float | None:
    """The number that a label is, exactly; None for what is no number."""
    if isinstance(label, float):
        return label
    if isinstance(label, str):
        text = label.strip()
        for kind in (int, float) if text.isascii() and "_" not in text else ():
            try:
                return kind(text)
            except ValueError:
                continue
        return None
    try:
        return None if isinstance(label, bool) else index(label)
    except TypeError:
        return None


def _refused(label: Any, number: float | None, regression: bool | None) -> SourceError:
    fix = "repair the label, or leave the row out"
    if isinstance(label, bool):
        fix = "write false as 0 and true as 1"
    elif isinstance(label, list | tuple):
        fix = "give one label a row: rows of several labels cannot be learned here"
    elif isinstance(label, str) and number is None:
        fix = "number the classes from 0, in the order of the model's config.id2label"
    elif number is not None and abs(number) < _MOST and number % 1:
        fix = "number the classes from 0, or load the model with num_labels=1 for a regression"
    classes = "a whole number from 0, or -1 for none"
    allowed = {True: "a finite number", False: classes, None: f"{classes}; or a real number"}
    return SourceError(
        "a label cannot be read", got=f"label {label!r:.60}", allowed=allowed[regression], fix=fix
    )
