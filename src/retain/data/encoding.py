"""Rows to tokens: what `retain train`, a fit's source and a measurement's text are made of.

Tokens and what is learned of them are those of TRL's SFTTrainer on the same rows, but that no token
that begins or ends a text is written twice. docs/data.md lists the formats.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, get_args

from jinja2 import TemplateError

from retain.data.batches import Example
from retain.data.causal_rows import CausalRows
from retain.data.class_rows import ClassRows
from retain.data.contents import Row
from retain.data.counts import RowCounts
from retain.data.placed import place_of
from retain.errors import RetainWarning, SourceError, unknown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Loss", "encode"]

Loss = Literal["assistant", "source", "all"]


def encode(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    max_length: int,
    causal: bool,
    loss: Loss = "assistant",
    counts: RowCounts | None = None,
    regression: bool | None = None,
) -> list[Example]:
    """Tokenises rows, cut to `max_length` tokens; rows of which nothing is learned are left out.

    Args:
        rows: dictionaries; see docs/data.md for their columns.
        tokenizer: of the model; None will do for rows with ``input_ids``.
        max_length: tokens of a row at most.
        causal: for a decoder, else for a classifier.
        loss: "assistant" learns the assistant's turns of a chat and the completions of prompts,
            "all" every token. "source" is for text that the model is held to or measured on: as
            "assistant", and of a chat without an assistant's turn every token.
        counts: told what was left out, cut or passed over; without it a warning says so.
        regression: whether a classifier's labels are values, or classes (False): classes that are
            no whole numbers are refused then. None takes both as they come.

    Raises:
        SourceError: the rows' columns are not known, a row is damaged, or nothing is left.
        ConfigError: an unknown loss.

    Warns:
        RetainWarning: something was left out, cut or passed over, and `counts` is None.
    """
    if max_length < 2:
        raise SourceError("max_length is too small", got=max_length, allowed="2 or more", fix="128")
    if loss not in get_args(Loss):
        raise unknown("loss", str(loss), get_args(Loss))
    told = RowCounts() if counts is None else counts
    told.rows += len(rows)
    told.max_length = max_length
    reader: CausalRows | ClassRows = (
        CausalRows(tokenizer, max_length, loss, told)
        if causal
        else ClassRows(tokenizer, max_length, regression, told)
    )
    examples: list[Example] = []
    for number, row in enumerate(rows, start=1):
        try:
            examples += reader.read(row)
        except (
            ValueError,
            TypeError,
            KeyError,
            IndexError,
            AttributeError,
            OverflowError,
            RecursionError,
            TemplateError,
        ) as error:
            raise SourceError(
                f"{place_of(row, number)} cannot be used",
                got=f"{type(error).__name__}: {str(error)[:160]}",
                allowed="the formats of docs/data.md",
                fix="repair the row, or leave it out",
            ) from error
        except SourceError as error:
            raise SourceError(
                error.what,
                got=f"{error.got} ({place_of(row, number)})",
                allowed=error.allowed,
                fix=error.fix,
            ) from error
    if not examples:
        raise _nothing(told, len(rows), max_length)
    if counts is None and (lines := told.lines()):
        warnings.warn("; ".join(lines), RetainWarning, stacklevel=2)
    return examples


def _nothing(counts: RowCounts, rows: int, max_length: int) -> SourceError:
    """The error where no row is left, by what most of them lack."""
    if counts.left_out_no_room:
        return SourceError(
            "no completion is left to predict",
            got=f"{counts.left_out_no_room} of {rows} rows have a prompt that fills "
            f"max_length={max_length}",
            allowed="prompts shorter than max_length",
            fix="raise max_length",
        )
    if counts.left_out_unlearned:
        return SourceError(
            "nothing in the source is to be learned",
            got=f"{counts.left_out_unlearned} of {rows} rows without a turn of the assistant "
            f"within max_length={max_length}, or with labels that are all -100",
            allowed="chats with a turn of the assistant, or labels",
            fix="give chats with answers, raise max_length, or learn every turn with loss='all' "
            "(--loss all)",
        )
    return SourceError(
        "the source holds no text to predict",
        got=f"{rows} rows, all shorter than 2 tokens",
        allowed="at least one row of 2 tokens",
        fix="give more text",
    )
