"""Rows to tokens: what `retain train`, a fit's source and a measurement's text are made of.

Tokens and what is learned of them are those of TRL's SFTTrainer on the same rows, but that no token
that begins or ends a text is written twice. docs/data.md lists the formats.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Literal, get_args

from retain.data.batches import Example
from retain.data.chats import Chats
from retain.data.classifier import ClassifierRows
from retain.data.counts import RowCounts
from retain.data.formats import content_of
from retain.data.messages import absent
from retain.data.rows import (
    Answer,
    Chat,
    Pair,
    Passage,
    Row,
    Text,
    Tokenised,
    check_characters,
    place_of,
)
from retain.data.tokenised import tokenised_causal
from retain.data.tokens import Ends, beginning, ends_of, need
from retain.data.turns import shared
from retain.errors import RetainWarning, SourceError, unknown
from retain.extras import classes_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Loss", "encode"]

Loss = Literal["assistant", "source", "all"]

_DAMAGED = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What a row of wrong values may raise wherever it is read; and what a template raises."""


def encode(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    max_length: int,
    causal: bool,
    loss: Loss = "assistant",
    counts: RowCounts | None = None,
    regression: bool | None = None,
    origins: list[int] | None = None,
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
        origins: to it is added, of each example, the number of the row that it is of, from 0.

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
    reader: _CausalRows | ClassifierRows = (
        _CausalRows(tokenizer, max_length, loss, told)
        if causal
        else ClassifierRows(tokenizer, max_length, regression, told)
    )
    examples: list[Example] = []
    for number, row in enumerate(rows, start=1):
        try:
            found = reader.read(row)
        except SourceError as error:
            got = f"{error.got} ({place_of(row, number)})"
            raise SourceError(error.what, got=got, allowed=error.allowed, fix=error.fix) from error
        except (*_DAMAGED, *classes_of("jinja2", "TemplateError")) as error:
            raise SourceError(
                f"{place_of(row, number)} cannot be used",
                got=f"{type(error).__name__}: {str(error)[:160]}",
                allowed="the formats of docs/data.md",
                fix="repair the row, or leave it out",
            ) from error
        examples += found
        if origins is not None:
            origins += [number - 1] * len(found)
    if not examples:
        raise _nothing(told, len(rows))
    if counts is None and (lines := told.lines()):
        warnings.warn("; ".join(lines), RetainWarning, stacklevel=2)
    return examples


def _nothing(counts: RowCounts, rows: int) -> SourceError:
    """The error where no row is left, by what most of them lack."""
    length = f"max_length={counts.max_length}"
    if counts.left_out_no_room:
        return SourceError(
            "no completion is left to predict",
            got=f"{counts.left_out_no_room} of {rows} rows have a prompt that fills {length}",
            allowed="prompts shorter than max_length",
            fix="raise max_length",
        )
    if counts.left_out_unlearned:
        return SourceError(
            "nothing in the source is to be learned",
            got=f"{counts.left_out_unlearned} of {rows} rows without a turn of the assistant "
            f"within {length}, or with labels that are all -100",
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


class _CausalRows:
    """Tokenises a decoder's rows, one after another; see `encode`."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        max_length: int,
        loss: str,
        counts: RowCounts,
    ) -> None:
        self.tokenizer, self.size, self.loss, self.counts = tokenizer, max_length, loss, counts

    @cached_property
    def ends(self) -> Ends:
        return ends_of(need(self.tokenizer))

    @cached_property
    def chats(self) -> Chats:
        return Chats(need(self.tokenizer), self.size, self.counts)

    def read(self, row: Row) -> list[Example]:
        """A row's examples: one, none, or several of a packed row or a document.

        Raises:
            SourceError: a row of no known format, or a damaged one.
        """
        template = None if self.tokenizer is None else self.chats.template
        content = content_of(row, causal=True, counts=self.counts, template=template)
        if isinstance(content, Tokenised):
            texts = tokenised_causal(content.cells, self.loss)
            return [example for ids, learned in texts for example in self._cut(ids, learned, 0)]
        check_characters(vars(content))
        if isinstance(content, Pair):
            content = Text(f"{content.first}\n{content.second}")
        if isinstance(content, Chat):
            return self._chat(content)
        if isinstance(content, Answer):
            self.counts.rejected_unread += not absent(row.get("rejected"))
            self.counts.answers_unread += content.others
            return self._answer(content)
        if isinstance(row, Passage):
            return self._passage(content.text, row.begins)
        return self._text(content)

    def _whole(self, text: str, count: int | None) -> tuple[list[int], int]:
        """A text's tokens with what begins and ends it, and how many more there are about."""
        ids, more = beginning(need(self.tokenizer), text, count)
        ids = self.ends.begun(ids)
        return ids if more else self.ends.ended(ids), more

    def _text(self, content: Text) -> list[Example]:
        if not content.text.strip():
            self.counts.left_out_empty += 1
            return []
        ids, more = self._whole(content.text, None if content.pack else self.size)
        if not content.pack:
            return self._cut(ids, [True] * len(ids), more)
        pieces = [ids[start : start + self.size] for start in range(0, len(ids), self.size)]
        found = [_example(p, [True] * len(p)) for p in pieces if len(p) > 1]
        self.counts.left_out_empty += not found
        return found

    def _passage(self, text: str, begins: bool) -> list[Example]:
        """The first piece of a passage; nothing is lost, as the text goes on by itself."""
        ids, _ = beginning(need(self.tokenizer), text, self.size)
        ids = (self.ends.begun(ids) if begins else ids)[: self.size]
        self.counts.left_out_empty += len(ids) < 2
        return [_example(ids, [True] * len(ids))] if len(ids) > 1 else []

    def _answer(self, content: Answer) -> list[Example]:
        empty = False
        if isinstance(content.prompt, str) and isinstance(content.completion, str):
            head, _ = beginning(need(self.tokenizer), content.prompt, self.size)
            ids, more = self._whole(content.prompt + content.completion, self.size)
            start = shared(self.ends.begun(head), ids)
            empty = not content.completion
        else:
            assert not isinstance(content.prompt, str)
            assert not isinstance(content.completion, str)
            chat = Chat(content.prompt, content.tools, content.options)
            ids, start, more = self.chats.answer(chat, content.completion)
        every = self.loss == "all"
        if start >= self.size and not every:
            self.counts.left_out_no_room += 1
            return []
        self.counts.completions_empty += empty
        return self._cut(ids, [every or i >= start for i in range(len(ids))], more, answer=True)

    def _chat(self, chat: Chat) -> list[Example]:
        answered = any(message.get("role") == "assistant" for message in chat.messages)
        whole = self.loss == "source" and not answered
        self.counts.chats_unanswered += whole
        ids, mask, more = self.chats.read(chat, assistant=not (whole or self.loss == "all"))
        return self._cut(ids, mask, more, answer=True)

    def _cut(
        self, ids: list[int], learned: list[bool], more: int, answer: bool = False
    ) -> list[Example]:
        """An example of the first tokens; none where nothing is to be learned."""
        if len(ids) < 2:
            self.counts.left_out_empty += 1
            return []
        if not any(learned[1 : self.size]):
            self.counts.left_out_unlearned += 1
            return []
        if more or len(ids) > self.size:
            self.counts.completions_cut += answer
            self.counts.texts_cut += not answer
            self.counts.tokens_cut += more + len(ids) - self.size
        return [_example(ids[: self.size], learned[: self.size])]


def _example(ids: list[int], learned: list[bool]) -> Example:
    first, *rest = learned
    return Example(tuple(ids[:-1]), tuple(ids[1:]), tuple(rest), prompted=not first)
