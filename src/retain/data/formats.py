"""Which format a row is of, and what it says.

A row's columns decide. What a column may change is read or refused by name, see
`retain.data.columns`; the formats are listed in docs/data.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from retain.data.columns import check_columns, strings
from retain.data.counts import RowCounts
from retain.data.messages import Message, absent, from_json, messages_of, without_none
from retain.errors import SourceError

__all__ = ["Answer", "Chat", "Content", "Pair", "Ready", "Row", "Text", "content_of"]

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Text:
    """Plain text; a document that is cut into pieces, if `pack`."""

    text: str
    pack: bool = False


@dataclass(frozen=True)
class Pair:
    """Two texts: a classifier's, or for a decoder two lines."""

    first: str
    second: str


@dataclass(frozen=True)
class Answer:
    """A prompt and its completion: strings, or messages of a chat."""

    prompt: str | list[Message]
    completion: str | list[Message]
    tools: list[Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Chat:
    """A chat; `options` go to its template."""

    messages: list[Message]
    tools: list[Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Ready:
    """A row that is tokenised already; see `retain.data.ready`."""

    cells: dict[str, Any]


Content = Text | Pair | Answer | Chat | Ready

_Found = tuple[Content, set[str]]
"""A row's content, and the columns that it is made of."""

_CHATS = ("messages", "conversations", "conversation")
_SYSTEM = ("system", "system_prompt")
_SINGLE = ("content", "sentence")
_PAIRS = (
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
)
_RESERVED = (
    "conversation", "messages", "tools", "chat_template", "tokenize", "padding", "truncation",
    "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask",
    "tokenizer_kwargs", "add_generation_prompt", "continue_final_message", "documents",
)  # fmt: skip

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
    cells = {k: v for k, v in row.items() if not absent(v)}
    for name, strict, read in _CAUSAL if causal else _CLASSIFIER:
        found = read(cells, row, template)
        if found is not None:
            content, used = found
            used = used if causal else used | {"label", "labels"}
            check_columns(cells, used, content, name, strict=strict, causal=causal, counts=counts)
            return content
    raise _unknown(cells, row, causal)


def _ready(cells: Row, row: Row, template: str | None) -> _Found | None:
    return (Ready(dict(cells)), {"input_ids"}) if "input_ids" in cells else None


def _prompt_completion(cells: Row, row: Row, template: str | None) -> _Found | None:
    if not {"prompt", "completion"} <= cells.keys():
        return None
    label = cells.get("label")
    if label is False:
        raise SourceError(
            "a completion is marked as undesired",
            got="label: false",
            allowed="completions to learn",
            fix="leave out the rows whose label is false",
        )
    used = {"prompt", "completion"} | ({"label"} if label is True else set())
    return _answered(cells, cells["prompt"], cells["completion"], used, template)


def _preference(cells: Row, row: Row, template: str | None) -> _Found | None:
    if not {"chosen", "rejected"} <= cells.keys():
        return None
    chosen, rejected, prompt = cells["chosen"], cells["rejected"], cells.get("prompt")
    if isinstance(chosen, str) and isinstance(rejected, str) and isinstance(prompt, str):
        used = {"prompt", "chosen", "rejected"}
        return _answered(cells, prompt, chosen, used, template)
    if isinstance(chosen, str) and isinstance(rejected, str):
        head = _implicit(chosen, rejected)
        return _answered(cells, chosen[:head], chosen[head:], {"chosen", "rejected"}, template)
    good, bad = (messages_of(cells[k], k, template) for k in ("chosen", "rejected"))
    used = {"chosen", "rejected"}
    if prompt is not None and not isinstance(prompt, str):
        return _answered(cells, prompt, good, used | {"prompt"}, template)
    head = next((i for i, (a, b) in enumerate(zip(good, bad, strict=False)) if a != b), 0)
    head = head or len(good) - 1  # the same chat twice: its last turn is the answer
    if head < 1:
        raise SourceError(
            "a preference pair has no prompt",
            got="chosen and rejected differ from their first message on",
            allowed="a prompt of its own, or one that both begin with",
            fix="give the prompt as a column prompt",
        )
    return _answered(cells, good[:head], good[head:], used, template)


def _implicit(chosen: str, rejected: str) -> int:
    """Length of the prompt that both answers begin with, as TRL's `extract_prompt` has it."""
    for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)):
        if a != b:
            return i - 1 if i and chosen[i - 1] == " " else i
    raise SourceError(
        "a preference pair has no prompt",
        got="one answer is the beginning of the other",
        allowed="a prompt of its own, or answers that differ",
        fix="give the prompt as a column prompt",
    )


def _chat(cells: Row, row: Row, template: str | None) -> _Found | None:
    name = next((n for n in _CHATS if n in cells), None)
    if name is None:
        return None
    messages = messages_of(cells[name], name, template)
    extra, used = _extra(cells)
    return Chat(_with_system(messages, cells), *extra), used | {name, *_SYSTEM}


def _extra(cells: Row) -> tuple[tuple[list[Any] | None, dict[str, Any]], set[str]]:
    """What goes to the chat template besides messages: tools, and options."""
    tools, options = cells.get("tools"), cells.get("chat_template_kwargs")
    if tools is not None:
        found = from_json(tools, "tools", list)
        tools = without_none([from_json(t, "tools", dict) for t in found]) or None
    if options is not None:
        options = without_none(from_json(options, "chat_template_kwargs", dict))
        for key in options:
            if key in _RESERVED:
                raise SourceError(
                    "a row's chat_template_kwargs cannot set this",
                    got=key,
                    allowed="variables of the chat template, such as enable_thinking",
                    fix=f"take {key} out of chat_template_kwargs",
                )
    return (tools, options or {}), {"tools", "chat_template_kwargs"}


def _with_system(messages: list[Message], cells: Row) -> list[Message]:
    """Messages with a row's system prompt in front."""
    told = {str(cells[k]) for k in _SYSTEM if cells.get(k)}
    if not told:
        return messages
    own = {m["content"] for m in messages if m["role"] == "system"}
    if own == told:
        return messages
    if own or len(told) > 1:
        raise SourceError(
            "a chat has two system prompts",
            got=" and ".join(f"{t!r:.40}" for t in sorted(own | told)),
            allowed="one, as a column or as the first message",
            fix="take one of them out",
        )
    return [{"role": "system", "content": told.pop()}, *messages]


def _answered(
    cells: Row, prompt: Any, completion: Any, used: set[str], template: str | None
) -> _Found:
    """A prompt and its completion, of strings or of messages."""
    if isinstance(prompt, str) and isinstance(completion, str):
        return Answer(prompt, completion), used
    if isinstance(prompt, str) != isinstance(completion, str):
        raise SourceError(
            "prompt and completion are of two kinds",
            got=f"{type(prompt).__name__} and {type(completion).__name__}",
            allowed="two strings, or two lists of messages",
            fix='write the string as [{"role": ..., "content": ...}]',
        )
    chat = _with_system(messages_of(prompt, "prompt", template), cells)
    answer = messages_of(completion, "completion", template)
    extra, more = _extra(cells)
    return Answer(chat, answer, *extra), used | more | set(_SYSTEM)


def _text(cells: Row, row: Row, template: str | None) -> _Found | None:
    if not isinstance(cells.get("text"), str) or "text_pair" in cells:
        return None
    return Text(cells["text"], bool(cells.get("pack"))), {"text", "pack"}


def _alpaca(cells: Row, row: Row, template: str | None) -> _Found | None:
    output = next((k for k in ("output", "response") if k in cells), None)
    if "instruction" not in cells or output is None:
        return None
    given = next((k for k in ("input", "context") if cells.get(k)), None)
    prompt = _ALPACA.format(
        paired=_PAIRED if given else "",
        instruction=_string(cells, "instruction"),
        given=f"### Input:\n{_string(cells, given)}\n\n" if given else "",
    )
    return Answer(prompt, _string(cells, output)), {"instruction", output, given or "input"}


def _orca(cells: Row, row: Row, template: str | None) -> _Found | None:
    if "system_prompt" not in row or not {"question", "response"} <= cells.keys():
        return None
    system = _string(cells, "system_prompt") if cells.get("system_prompt") else ""
    chat = [{"role": "system", "content": system}] if system else []
    chat.append({"role": "user", "content": _string(cells, "question")})
    answer = [{"role": "assistant", "content": _string(cells, "response")}]
    return Answer(chat, answer), {"system_prompt", "question", "response"}


def _question(cells: Row, row: Row, template: str | None) -> _Found | None:
    asked = next((k for k in ("question", "query") if k in cells), None)
    told = next((k for k in ("answer", "response", "answers") if k in cells), None)
    if asked is None or told is None:
        return None
    given = next((k for k in ("context", "passage") if cells.get(k)), None)
    answer = cells[told]
    if isinstance(answer, Mapping) and "text" in answer:  # SQuAD's answers
        answer = answer["text"]
    answer = answer.tolist() if hasattr(answer, "tolist") else answer
    if isinstance(answer, list | tuple) and answer:
        answer = answer[0]
    if not isinstance(answer, str):
        raise SourceError(
            "an answer is no text",
            got=f"{told}: {cells[told]!r:.60}",
            allowed="a string, or SQuAD's answers with one text or more",
            fix="write the answer as a string (true as 'yes'), or leave the row out",
        )
    head = f"{_string(cells, given)}\n" if given else ""
    used = {asked, told} | ({given, "title"} if given else set())
    return Answer(f"{head}{_string(cells, asked)}\n", answer), used


def _response(cells: Row, row: Row, template: str | None) -> _Found | None:
    if not {"prompt", "response"} <= cells.keys():
        return None
    return _answered(cells, cells["prompt"], cells["response"], {"prompt", "response"}, template)


def _pair(cells: Row, row: Row, template: str | None) -> _Found | None:
    for a, b in _PAIRS:
        if a in cells and b in cells:
            return Pair(_string(cells, a), _string(cells, b)), {a, b}
    return None


def _qa_pair(cells: Row, row: Row, template: str | None) -> _Found | None:
    if not {"question", "answer"} <= cells.keys():
        return None
    return Pair(_string(cells, "question"), _string(cells, "answer")), {"question", "answer"}


def _single(cells: Row, row: Row, template: str | None) -> _Found | None:
    for name in _SINGLE:
        if isinstance(cells.get(name), str):
            return Text(cells[name]), {name}
    return None


def _string(cells: Row, name: str) -> str:
    value = cells[name]
    if not isinstance(value, str):
        raise SourceError(
            f"a row's {name} is no string",
            got=f"{type(value).__name__}: {value!r:.60}",
            allowed="text",
            fix=f"write {name} as a string",
        )
    return value


_Reader = Callable[[Row, Row, str | None], _Found | None]

_CAUSAL: tuple[tuple[str, bool, _Reader], ...] = (
    ("input_ids", False, _ready),
    ("prompt + completion", False, _prompt_completion),
    ("messages", False, _chat),
    ("chosen + rejected", False, _preference),
    ("text", False, _text),
    ("instruction + output", True, _alpaca),
    ("system_prompt + question + response", True, _orca),
    ("question + answer", True, _question),
    ("prompt + response", True, _response),
    ("a pair of texts", False, _pair),
    ("one text", True, _single),
)
"""Formats in the order of TRL's SFTTrainer, then those that it does not know.

Each with whether another column of text is refused, since the format is guessed from names that
many data sets use.
"""

_CLASSIFIER: tuple[tuple[str, bool, _Reader], ...] = (
    ("input_ids", False, _ready),
    ("a pair of texts", False, _pair),
    ("text", True, _text),
    ("question + answer", True, _qa_pair),
    ("one text", True, _single),
)


def _unknown(cells: Row, row: Row, causal: bool) -> SourceError:
    """An error for a row of no known format, with advice for what is in it."""
    known = [n for n in ("text", *_SINGLE) if n in row]
    if (known and known[0] in cells) or (known and not cells):
        name = known[0]
        value = cells.get(name)
        if isinstance(value, list) and _chatty(value) and causal:
            fix = f"rename {name!r} to 'messages'"
        elif isinstance(value, list) and value and all(isinstance(v, str) for v in value):
            fix = "join the strings, or give each a row of its own"
        else:
            fix = "fill the row, or leave it out"
        return SourceError(
            "a row's text is no string",
            got=f"{name} that holds {row[name]!r:.40}",
            allowed="a string",
            fix=fix,
        )
    allowed = (
        "text, prompt + completion, messages, input_ids, or another format of docs/data.md"
        if causal
        else "text, text + text_pair or another pair of texts, or input_ids; and label"
    )
    if not cells:
        fix = "fill the row, or leave it out"
    elif causal and "prompt" in cells:
        fix = "add the column completion, or rename prompt to text where it is the whole text"
    else:
        chat = next((k for k, v in cells.items() if isinstance(v, list) and _chatty(v)), None)
        words = next((k for k, v in cells.items() if isinstance(v, str)), None)
        if chat is not None and causal:
            fix = f"rename {chat!r} to 'messages'"
        elif words is not None:
            fix = "rename the column that holds the text to 'text'"
        else:
            fix = "give the rows a column 'text'"
    return SourceError(
        "the source's columns are not known",
        got=", ".join(map(str, row))[:120] or "none",
        allowed=allowed,
        fix=fix,
    )


def _chatty(value: list[Any]) -> bool:
    return bool(value) and isinstance(value[0], Mapping) and bool(strings(value[0]))
