"""Which format a row is of, and what it says.

A row's columns decide. What a column may change is read or refused by name, see
`retain.data.columns`; the formats are listed in docs/data.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from retain.data.chat_formats import chat, orca, preference, prompt_completion, response
from retain.data.columns import check_columns
from retain.data.contents import Content, Found, Ready, Row, Text
from retain.data.counts import RowCounts
from retain.data.messages import absent, native
from retain.data.text_formats import (
    SINGLE,
    alpaca,
    pair,
    question,
    question_pair,
    single,
    text,
)
from retain.errors import SourceError

__all__ = ["content_of"]


def content_of(
    row: Row, *, causal: bool, counts: RowCounts, template: str | None = None
) -> Content:
    """What a row says.

    Args:
        row: its columns; None and NaN count as absent.
        causal: for a decoder, else for a classifier (whose ``label`` is read apart).
        counts: where columns that are passed over are counted.
        template: the tokenizer's chat template.

    Raises:
        SourceError: no known format, or a column that would be lost.
    """
    if not isinstance(row, Mapping):
        raise SourceError(
            "a row is no object with columns",
            got=f"{type(row).__name__}: {row!r:.40}",
            allowed="a dictionary a row, or a string",
            fix='write rows as {"text": "..."}',
        )
    cells = {k: v for k, given in row.items() if not absent(v := native(given))}
    blank: Content | None = None
    for name, strict, read in _CAUSAL if causal else _CLASSIFIER:
        found = read(cells, row, template)
        if found is None:
            continue
        content, used = found
        if blank is None and isinstance(content, Text) and not content.text.strip():
            blank = content  # some data sets have an empty text beside what it could be made of
            continue
        used = used if causal else used | {"label", "labels"}
        check_columns(cells, used, content, name, strict=strict, causal=causal, counts=counts)
        return content
    if blank is not None:
        return blank
    raise _unknown(cells, row, causal)


def _ready(cells: Row, row: Row, template: str | None) -> Found | None:
    return (Ready(dict(cells)), {"input_ids"}) if "input_ids" in cells else None


_Reader = Callable[[Row, Row, str | None], Found | None]

_CAUSAL: tuple[tuple[str, bool, _Reader], ...] = (
    ("input_ids", False, _ready),
    ("prompt + completion", False, prompt_completion),
    ("messages", False, chat),
    ("chosen + rejected", False, preference),
    ("text", False, text),
    ("instruction + output", True, alpaca),
    ("system_prompt + question + response", True, orca),
    ("question + answer", True, question),
    ("prompt + response", True, response),
    ("a pair of texts", False, pair),
    ("one text", True, single),
)
"""Formats in the order of TRL's SFTTrainer, then those that it does not know.

Each with whether another column of text is refused, since the format is guessed from names that
many data sets use.
"""

_CLASSIFIER: tuple[tuple[str, bool, _Reader], ...] = (
    ("input_ids", False, _ready),
    ("a pair of texts", False, pair),
    ("text", True, text),
    ("question + answer", True, question_pair),
    ("one text", True, single),
)


def _unknown(cells: Row, row: Row, causal: bool) -> SourceError:
    """An error for a row of no known format, with advice for what is in it."""
    named = [n for n in ("text", *SINGLE) if n in row]
    if named:
        name = next((n for n in named if n in cells), named[0])
        return SourceError(
            "a row's text is no string",
            got=f"{name} that holds {row[name]!r:.40}",
            allowed="a string",
            fix=_advice(name, cells.get(name), causal),
        )
    chats = [k for k, v in cells.items() if _is_chat(v)]
    words = [k for k, v in cells.items() if isinstance(v, str)]
    if len(cells) < len(row):
        fix = "fill the row, or leave it out"
    elif causal and "prompt" in cells:
        fix = "add the column completion, or rename prompt to text where it is the whole text"
    elif chats and causal:
        fix = f"rename {chats[0]!r} to 'messages'"
    elif len(words) > 1:
        fix = (
            "rename the column that holds the text to 'text'; or that of the question to 'prompt' "
            "and that of the answer to 'completion'"
            if causal
            else "rename the column that holds the text to 'text', that of a second one to "
            "'text_pair'"
        )
    elif words:
        fix = "rename the column that holds the text to 'text'"
    else:
        fix = "give the rows a column 'text'"
    return SourceError(
        "the source's columns are not known",
        got=", ".join(f"{k}{'' if k in cells else ' (null)'}" for k in row)[:120] or "none",
        allowed="text, prompt + completion, messages, input_ids, or another format of docs/data.md"
        if causal
        else "text, text + text_pair or another pair of texts, or input_ids; and label",
        fix=fix,
    )


def _advice(name: str, value: Any, causal: bool) -> str:
    """What to do with a text that is no string."""
    if _is_chat(value) and causal:
        return f"rename {name!r} to 'messages'"
    if isinstance(value, list) and value and all(isinstance(v, str) for v in value):
        return "join the strings, or give each a row of its own"
    if absent(value):
        return "fill the row, or leave it out"
    return f"write {name} as a string"


def _is_chat(value: Any) -> bool:
    """Whether a value looks like the messages of a chat."""
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, Mapping) and bool({"role", "from"} & first.keys())
