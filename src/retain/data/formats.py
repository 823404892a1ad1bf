"""Which format a row is of, and what it says.

A row's columns decide. What a column may change is read or refused by name, see
`retain.data.columns`; the formats are listed in docs/data.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from retain.data.chat_formats import chat, orca, preference, prompt_completion, response, string_of
from retain.data.columns import check_columns
from retain.data.counts import RowCounts
from retain.data.messages import absent, native
from retain.data.rows import Answer, Content, Found, Pair, Row, Text, Tokenised
from retain.errors import SourceError

__all__ = ["content_of"]

_SINGLE = ("content", "sentence")
_PAIRS = (
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
)
_ALPACA = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{instruction}\n\n{given}### Response:\n"
)
_PAIRED = ", paired with an input that provides further context"


def content_of(
    row: Row, *, causal: bool, counts: RowCounts, template: str | None = None
) -> Content:
    """What a row says.

    Args:
        row: its columns; None and NaN count as absent.
        causal: for a decoder, else for a classifier (whose ``label`` is read apart).
        counts: told of columns that are passed over.
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
    if blank is None:
        raise _unknown(cells, row, causal)
    return blank


def _tokenised(cells: Row, row: Row, template: str | None) -> Found | None:
    return (Tokenised(dict(cells)), {"input_ids"}) if "input_ids" in cells else None


def _text(cells: Row, row: Row, template: str | None) -> Found | None:
    """``text``, the column that TRL reads by default."""
    if not isinstance(cells.get("text"), str) or "text_pair" in cells:
        return None
    pack = cells.get("pack") is True
    return Text(cells["text"], pack), {"text", "pack"} if pack else {"text"}


def _alpaca(cells: Row, row: Row, template: str | None) -> Found | None:
    """``instruction``, ``input`` (or ``context``) and ``output``, in the wording of Alpaca."""
    output = _first(cells, "output", "response")
    if "instruction" not in cells or output is None:
        return None
    given = next((k for k in ("input", "context") if cells.get(k)), None)
    prompt = _ALPACA.format(
        paired=_PAIRED if given else "",
        instruction=string_of(cells, "instruction"),
        given=f"### Input:\n{string_of(cells, given)}\n\n" if given else "",
    )
    return Answer(prompt, string_of(cells, output)), {"instruction", output, given or "input"}


def _question(cells: Row, row: Row, template: str | None) -> Found | None:
    """``question`` and ``answer``, behind a ``context`` or ``passage`` where there is one."""
    asked, told = _first(cells, "question", "query"), _first(cells, "answer", "response", "answers")
    if asked is None or told is None:
        return None
    given = next((k for k in ("context", "passage") if cells.get(k)), None)
    answer = cells[told]
    if isinstance(answer, Mapping) and "text" in answer:  # SQuAD's answers
        answer = answer["text"]
    others = False
    if isinstance(answer, list | tuple) and answer:
        others = any(other != answer[0] for other in answer)
        answer = answer[0]
    if not isinstance(answer, str):
        raise SourceError(
            "an answer is no text",
            got=f"{told}: {cells[told]!r:.60}",
            allowed="a string, or SQuAD's answers with one text or more",
            fix="write the answer as a string (true as 'yes'), or leave the row out",
        )
    head = f"{string_of(cells, given)}\n" if given else ""
    used = {asked, told} | ({given, "title"} if given else set())
    return Answer(f"{head}{string_of(cells, asked)}\n", answer, others=others), used


def _pair(cells: Row, row: Row, template: str | None) -> Found | None:
    """Two texts of a classifier, under one of the names that data sets have."""
    found = next(((a, b) for a, b in _PAIRS if a in cells and b in cells), None)
    if found is None:
        return None
    return Pair(string_of(cells, found[0]), string_of(cells, found[1])), set(found)


def _question_pair(cells: Row, row: Row, template: str | None) -> Found | None:
    """``question`` and ``answer`` as two texts of a classifier."""
    if "question" not in cells or not isinstance(cells.get("answer"), str):
        return None
    return Pair(string_of(cells, "question"), cells["answer"]), {"question", "answer"}


def _single(cells: Row, row: Row, template: str | None) -> Found | None:
    """``content`` or ``sentence``."""
    name = next((name for name in _SINGLE if isinstance(cells.get(name), str)), None)
    return None if name is None else (Text(cells[name]), {name})


def _first(cells: Row, *names: str) -> str | None:
    return next((name for name in names if name in cells), None)


_Reader = Callable[[Row, Row, str | None], Found | None]

_CAUSAL: tuple[tuple[str, bool, _Reader], ...] = (
    ("input_ids", False, _tokenised),
    ("prompt + completion", False, prompt_completion),
    ("messages", False, chat),
    ("chosen + rejected", False, preference),
    ("text", False, _text),
    ("instruction + output", True, _alpaca),
    ("system_prompt + question + response", True, orca),
    ("question + answer", True, _question),
    ("prompt + response", True, response),
    ("a pair of texts", False, _pair),
    ("one text", True, _single),
)
"""Formats in the order of TRL's SFTTrainer, then those that it does not know.

Each with whether another column of text is refused, since the format is guessed from names that
many data sets use.
"""

_CLASSIFIER: tuple[tuple[str, bool, _Reader], ...] = (
    ("input_ids", False, _tokenised),
    ("a pair of texts", False, _pair),
    ("text", True, _text),
    ("question + answer", True, _question_pair),
    ("one text", True, _single),
)


def _unknown(cells: Row, row: Row, causal: bool) -> SourceError:
    """An error for a row of no known format, with advice for what is in it."""
    named = [n for n in ("text", *_SINGLE) if n in row]
    if named:
        name = next((n for n in named if n in cells), named[0])
        value = cells.get(name)
        if _is_chat(value) and causal:
            fix = f"rename {name!r} to 'messages'"
        elif isinstance(value, list) and value and all(isinstance(v, str) for v in value):
            fix = "join the strings, or give each a row of its own"
        else:
            fix = "fill the row, or leave it out" if value is None else f"write {name} as a string"
        return SourceError(
            "a row's text is no string",
            got=f"{name} that holds {row[name]!r:.40}",
            allowed="a string",
            fix=fix,
        )
    chats = [k for k, v in cells.items() if _is_chat(v)]
    words = [k for k, v in cells.items() if isinstance(v, str)]
    fix = "rename the column that holds the text to 'text'" if words else "give a column 'text'"
    if len(cells) < len(row):
        fix = "fill the row, or leave it out"
    elif causal and "prompt" in cells:
        fix = "add the column completion, or rename prompt to text where it is the whole text"
    elif chats and causal:
        fix = f"rename {chats[0]!r} to 'messages'"
    elif len(words) > 1 and causal:
        fix += "; or that of the question to 'prompt' and that of the answer to 'completion'"
    elif len(words) > 1:
        fix += ", that of a second one to 'text_pair'"
    return SourceError(
        "the source's columns are not known",
        got=", ".join(f"{k}{'' if k in cells else ' (null)'}" for k in row)[:120] or "none",
        allowed="text, prompt + completion, messages, input_ids, or another format of docs/data.md"
        if causal
        else "text, text + text_pair or another pair of texts, or input_ids; and label",
        fix=fix,
    )


def _is_chat(value: Any) -> bool:
    """Whether a value looks like the messages of a chat."""
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, Mapping) and bool({"role", "from"} & first.keys())
