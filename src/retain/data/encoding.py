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
from retain.data.chats import Chats
from retain.data.counts import RowCounts
from retain.data.formats import Answer, Chat, Content, Pair, Ready, Row, Text, content_of
from retain.data.labels import target_of
from retain.data.messages import absent
from retain.data.ready import ready_causal, ready_classified
from retain.data.tokens import Ends, beginning, ends_of, plain
from retain.data.turns import shared
from retain.errors import SourceError, unknown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Loss", "encode"]

Loss = Literal["assistant", "all"]


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
            "all" every token.
        counts: told what was left out, cut or passed over; without it a warning says so.
        regression: whether a classifier's labels are values, or classes (False): classes that are
            no whole numbers are refused then. None takes both as they come.

    Raises:
        SourceError: the rows' columns are not known, a row is damaged, or nothing is left.
        ConfigError: an unknown loss.

    Warns:
        UserWarning: something was left out, cut or passed over, and `counts` is None.
    """
    if max_length < 2:
        raise SourceError("max_length is too small", got=max_length, allowed="2 or more", fix="128")
    if loss not in get_args(Loss):
        raise unknown("loss", str(loss), get_args(Loss))
    told = RowCounts() if counts is None else counts
    told.rows += len(rows)
    told.max_length = max_length
    encoder = _Encoder(tokenizer, max_length, loss, told)
    examples: list[Example] = []
    for number, row in enumerate(rows, start=1):
        try:
            if causal:
                examples += encoder.causal(row)
            else:
                examples += encoder.classified(row, regression)
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
                f"row {number} of the source cannot be used",
                got=f"{type(error).__name__}: {str(error)[:160]}",
                allowed="the formats of docs/data.md",
                fix="repair the row, or leave it out",
            ) from error
        except SourceError as error:
            raise SourceError(
                error.what, got=f"{error.got} (row {number})", allowed=error.allowed, fix=error.fix
            ) from error
    if not examples:
        raise _nothing(told, len(rows), max_length)
    if counts is None and (lines := told.lines()):
        warnings.warn("; ".join(lines), UserWarning, stacklevel=2)
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


class _Encoder:
    """Tokenises rows of one kind after another, with one tokenizer."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        max_length: int,
        loss: Loss,
        counts: RowCounts,
    ) -> None:
        self.given, self.max_length, self.loss, self.counts = tokenizer, max_length, loss, counts
        self._ends: Ends | None = None
        self._chats: Chats | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        if self.given is None:
            raise SourceError(
                "text needs a tokenizer",
                got="tokenizer=None",
                allowed="the model's tokenizer, or rows with input_ids",
                fix="pass tokenizer=..., or load the model by a name that has one",
            )
        return self.given

    @property
    def ends(self) -> Ends:
        if self._ends is None:
            self._ends = ends_of(self.tokenizer)
        return self._ends

    @property
    def chats(self) -> Chats:
        if self._chats is None:
            self._chats = Chats(self.tokenizer, self.max_length, self.counts)
        return self._chats

    def _content(self, row: Row, causal: bool) -> Content:
        template = None if self.given is None else self.chats.template
        found = content_of(row, causal=causal, counts=self.counts, template=template)
        if not isinstance(found, Ready):
            _check_text(found)
        return found

    def causal(self, row: Row) -> list[Example]:
        """A row's examples: one, or several of a packed row or a document."""
        content = self._content(row, True)
        if isinstance(content, Ready):
            return self._ready(content)
        if isinstance(content, Answer):
            self.counts.rejected_unread += not absent(row.get("rejected"))
            return self._answer(content)
        if isinstance(content, Chat):
            return self._chat(content)
        if isinstance(content, Pair):
            return self._text(Text(f"{content.first}\n{content.second}"))
        return self._text(content)

    def _text(self, content: Text) -> list[Example]:
        if not content.text.strip():
            self.counts.left_out_empty += 1
            return []
        need = None if content.pack else self.max_length
        ids, more = beginning(self.tokenizer, content.text, need)
        ids = self.ends.begun(ids)
        ids = ids if more else self.ends.ended(ids)
        if not content.pack:
            return self._cut(ids, [True] * len(ids), more)
        starts = range(0, len(ids), self.max_length)
        pieces = [ids[start : start + self.max_length] for start in starts]
        found = [_example(p, [True] * len(p)) for p in pieces if len(p) > 1]
        self.counts.left_out_empty += not found
        return found

    def _answer(self, content: Answer) -> list[Example]:
        if isinstance(content.prompt, str) and isinstance(content.completion, str):
            head, _ = beginning(self.tokenizer, content.prompt, self.max_length)
            whole = content.prompt + content.completion
            ids, more = beginning(self.tokenizer, whole, self.max_length)
            ids = self.ends.begun(ids)
            ids = ids if more else self.ends.ended(ids)
            start = shared(self.ends.begun(head), ids)
            empty = not content.completion
        else:
            assert not isinstance(content.prompt, str)
            assert not isinstance(content.completion, str)
            ids, start, more = self.chats.answer(
                content.prompt, content.completion, content.tools, content.options
            )
            empty = False
        if start >= self.max_length:
            self.counts.left_out_no_room += 1
            return []
        self.counts.completions_empty += empty
        every = self.loss == "all"
        return self._cut(ids, [every or i >= start for i in range(len(ids))], more, answer=True)

    def _chat(self, content: Chat) -> list[Example]:
        if self.loss == "all":
            ids, more = self.chats.whole(content.messages, content.tools, content.options)
            mask = [True] * len(ids)
        else:
            ids, mask, more = self.chats.turns(content.messages, content.tools, content.options)
        return self._cut(ids, mask, more, answer=True)

    def _ready(self, content: Ready) -> list[Example]:
        found: list[Example] = []
        for e in ready_causal(content.cells, self.loss):
            ids = [*e.tokens, *e.targets[-1:]]
            found += self._cut(ids, [False, *e.predict], 0)
        return found

    def _cut(
        self, ids: list[int], learned: list[bool], more: int, answer: bool = False
    ) -> list[Example]:
        """An example of the first tokens; none where nothing is to be learned."""
        size = self.max_length
        if len(ids) < 2:
            self.counts.left_out_empty += 1
            return []
        if not any(learned[1:size]):
            self.counts.left_out_unlearned += 1
            return []
        if more or len(ids) > size:
            self.counts.completions_cut += answer
            self.counts.texts_cut += not answer
            self.counts.tokens_cut += more + len(ids) - size
        return [_example(ids[:size], learned[:size])]

    def classified(self, row: Row, regression: bool | None) -> list[Example]:
        """A classifier's row."""
        content = self._content(row, False)
        target = target_of(_label(row), regression)
        size = self.max_length
        segments: list[int] = []
        if isinstance(content, Ready):
            ids, segments = ready_classified(content.cells)
            more = 0
        else:
            texts = (
                (content.first, content.second)
                if isinstance(content, Pair)
                else (content.text if isinstance(content, Text) else "",)
            )
            ids, segments, more = self._tokens(texts)
        if not ids:
            self.counts.left_out_empty += 1
            return []
        if more or len(ids) > size:
            self.counts.texts_cut += 1
            self.counts.tokens_cut += more + max(0, len(ids) - size)
        return [Example(tuple(ids[:size]), (target,), (), tuple(segments[:size]))]

    def _tokens(self, texts: tuple[str, ...]) -> tuple[list[int], list[int], int]:
        """One or two texts as the tokenizer joins and cuts them: tokens, types, tokens behind."""
        tok, size = self.tokenizer, self.max_length
        more = 0
        short = []
        for text in texts:
            room = max(4096, 16 * size)
            while len(text) > room and len(plain(tok, text[:room])) < 2 * size:
                room *= 8
            short.append(text[:room])
            more += round(max(0, len(text) - room) / 4)
        out = tok(*short, verbose=False)
        if len(out["input_ids"]) > size:
            more += len(out["input_ids"]) - size
            out = tok(*short, truncation=True, max_length=size)
        return list(out["input_ids"]), list(out.get("token_type_ids", ())), more


def _example(ids: list[int], learned: list[bool]) -> Example:
    return Example(tuple(ids[:-1]), tuple(ids[1:]), tuple(learned[1:]))


def _label(row: Row) -> object:
    """A classifier's label: of the column ``label``, or ``labels``.

    Raises:
        SourceError: both, and they differ.
    """
    found = [row[name] for name in ("label", "labels") if row.get(name) is not None]
    if len(found) > 1 and found[0] != found[1]:
        raise SourceError(
            "a row has two labels",
            got=f"label {found[0]!r:.40} and labels {found[1]!r:.40}",
            allowed="one of the two columns",
            fix="take one of them out",
        )
    return found[0] if found else None


def _check_text(value: object) -> None:
    """Refuses text that no tokenizer takes.

    Raises:
        SourceError: half of a pair of surrogates.
    """
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise SourceError(
                "a text holds half a character (a lone surrogate)",
                got=f"{value[error.start]!r} at character {error.start + 1}",
                allowed="whole characters",
                fix="mend it: text.encode('utf-8', 'replace').decode()",
            ) from error
    elif isinstance(value, dict):
        for v in value.values():
            _check_text(v)
    elif isinstance(value, list | tuple):
        for v in value:
            _check_text(v)
    elif isinstance(value, Text | Pair | Answer | Chat):
        _check_text(vars(value))
