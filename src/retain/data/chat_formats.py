"""Formats of prompts and chats: how each is told by its columns, and read."""

from __future__ import annotations

from typing import Any

from retain.data.messages import from_json, messages_of, without_none
from retain.data.rows import Answer, Chat, Found, Message, Row
from retain.errors import SourceError

__all__ = ["chat", "orca", "preference", "prompt_completion", "response", "string_of"]

_CHATS = ("messages", "conversations", "conversation")
_SYSTEM = ("system", "system_prompt")
_RESERVED = {
    "conversation", "messages", "tools", "chat_template", "tokenize", "padding", "truncation",
    "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask",
    "tokenizer_kwargs", "add_generation_prompt", "continue_final_message", "documents",
}  # fmt: skip


def string_of(cells: Row, name: str) -> str:
    """A column's text; raises `SourceError` for what is no string."""
    value = cells[name]
    if not isinstance(value, str):
        raise SourceError(
            f"a row's {name} is no string",
            got=f"{type(value).__name__}: {value!r:.60}",
            allowed="text",
            fix=f"write {name} as a string",
        )
    return value


def prompt_completion(cells: Row, row: Row, template: str | None) -> Found | None:
    """``prompt`` and ``completion``, of strings or of messages."""
    if not {"prompt", "completion"} <= cells.keys():
        return None
    wished = {"true": True, "false": False}.get(str(cells.get("label")).lower())  # as CSV has them
    if wished is False:
        raise SourceError(
            "a completion is marked as undesired",
            got="label: false",
            allowed="completions to learn",
            fix="leave out the rows whose label is false",
        )
    used = {"prompt", "completion"} | ({"label"} if wished else set())
    return _answered(cells, cells["prompt"], cells["completion"], used, template)


def response(cells: Row, row: Row, template: str | None) -> Found | None:
    """``prompt`` and ``response``."""
    if not {"prompt", "response"} <= cells.keys():
        return None
    return _answered(cells, cells["prompt"], cells["response"], {"prompt", "response"}, template)


def chat(cells: Row, row: Row, template: str | None) -> Found | None:
    """``messages``, or ShareGPT's ``conversations``."""
    name = next((n for n in _CHATS if n in cells), None)
    if name is None:
        return None
    messages = messages_of(cells[name], name, template)
    extra, used = _extra(cells)
    return Chat(_with_system(messages, cells), *extra), used | {name, *_SYSTEM}


def orca(cells: Row, row: Row, template: str | None) -> Found | None:
    """``system_prompt``, ``question`` and ``response``, as OpenOrca has them: a chat."""
    if "system_prompt" not in row or not {"question", "response"} <= cells.keys():
        return None
    return _instructed(cells, "question", "response")


def preference(cells: Row, row: Row, template: str | None) -> Found | None:
    """``chosen`` and ``rejected``, with or without ``prompt``: the chosen answer."""
    used = {"chosen", "rejected"}
    if not used <= cells.keys():
        return None
    chosen, rejected, prompt = cells["chosen"], cells["rejected"], cells.get("prompt")
    texts = isinstance(chosen, str) and isinstance(rejected, str)
    asked = next((k for k in ("question", "instruction", "query", "input") if k in cells), None)
    if texts and isinstance(prompt, str):
        return _answered(cells, prompt, chosen, used | {"prompt"}, template)
    if texts and asked in ("question", "input") and any(k in row for k in _SYSTEM):
        content, more = _instructed(cells, asked, "chosen")
        return content, used | more
    if texts and asked is not None:
        raise SourceError(
            "a preference pair has its prompt under another name",
            got=f"{asked} beside chosen and rejected",
            allowed="prompt, chosen and rejected",
            fix=f"rename {asked!r} to 'prompt'",
        )
    if not texts:
        chosen, rejected = (messages_of(cells[k], k, template) for k in ("chosen", "rejected"))
        if prompt is not None and not isinstance(prompt, str):
            return _answered(cells, prompt, chosen, used | {"prompt"}, template)
    head = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), 0)
    if texts and chosen[:head].endswith(" "):  # as TRL's `extract_prompt` has it
        head -= 1
    if not texts:
        head = head or len(chosen) - 1  # the same chat twice: its last turn is the answer
    if head < 1 and (not texts or chosen.startswith(rejected) or rejected.startswith(chosen)):
        raise SourceError(
            "a preference pair has no prompt",
            got="answers that differ from the start, or one that is the beginning of the other",
            allowed="a prompt of its own, or one that both begin with",
            fix="give the prompt as a column prompt",
        )
    return _answered(cells, chosen[:head], chosen[head:], used, template)


def _instructed(cells: Row, asked: str, told: str) -> Found:
    """A system prompt, a question and an answer, each a column of text: a chat."""
    chat = _with_system([{"role": "user", "content": string_of(cells, asked)}], cells)
    answer = [{"role": "assistant", "content": string_of(cells, told)}]
    return Answer(chat, answer), {asked, told, *_SYSTEM}


def _answered(
    cells: Row, prompt: Any, completion: Any, used: set[str], template: str | None
) -> Found:
    """A prompt and its completion, of strings or of messages."""
    if isinstance(prompt, str) and isinstance(completion, str):
        return Answer(prompt, completion), used
    for name, value in (("prompt", prompt), ("completion", completion)):
        if not isinstance(value, str | list | tuple):
            string_of({name: value}, name)
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


def _extra(cells: Row) -> tuple[tuple[list[Any] | None, dict[str, Any]], set[str]]:
    """What goes to the chat template besides messages: tools, and options."""
    names = ("tools", "chat_template_kwargs")
    tools, options = (cells.get(n) for n in names)
    tools, options = (None if isinstance(v, str) and not v.strip() else v for v in (tools, options))
    if tools is not None:
        found = from_json(tools, "tools", list)
        tools = without_none([from_json(t, "tools", dict) for t in found]) or None
    if options is not None:
        options = without_none(from_json(options, "chat_template_kwargs", dict))
        for key in options.keys() & _RESERVED:
            raise SourceError(
                "a row's chat_template_kwargs cannot set this",
                got=key,
                allowed="variables of the chat template, such as enable_thinking",
                fix=f"take {key} out of chat_template_kwargs",
            )
    return (tools, options or {}), set(names)


def _with_system(messages: list[Message], cells: Row) -> list[Message]:
    """Messages with a row's system prompt in front."""
    told = {str(cells[k]) for k in _SYSTEM if cells.get(k)}
    own = {m["content"] for m in messages if m["role"] == "system"}
    if not told or own == told:
        return messages
    if own or len(told) > 1:
        raise SourceError(
            "a chat has two system prompts",
            got=" and ".join(f"{t!r:.40}" for t in sorted(own | told)),
            allowed="one, as a column or as the first message",
            fix="take one of them out",
        )
    return [{"role": "system", "content": told.pop()}, *messages]
