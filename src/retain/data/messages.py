"""Messages of a chat as data sets write them: checked, and in one form."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from retain.data.rows import Message
from retain.errors import SourceError

__all__ = ["absent", "from_json", "messages_of", "native", "without_none"]

_SPEAKERS = {
    "human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant",
    "bot": "assistant", "model": "assistant", "observation": "tool", "function_response": "tool",
}  # fmt: skip
"""ShareGPT's names of the speakers, as chat templates have them."""

_CALL = "function_call"
"""ShareGPT's speaker of calls of tools, which are JSON text."""

_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
_WEIGHTS = ("weight", "train", "trainable", "loss", "mask", "masked")
_MEDIA = ("images", "image", "audio", "audios", "video", "videos")


def absent(value: Any) -> bool:
    """Whether a value stands for none: None, NaN, and what pandas has for them."""
    if value is None or type(value).__name__ in {"NAType", "NaTType"}:
        return True
    return isinstance(value, float) and math.isnan(value)


def native(value: Any) -> Any:
    """A value of Python's own in place of numpy's or torch's."""
    return value.tolist() if hasattr(value, "tolist") else value


def without_none(value: Any) -> Any:
    """A value without the keys whose value is none: Arrow fills these in where rows differ."""
    value = native(value)
    if isinstance(value, Mapping):
        return {k: without_none(v) for k, v in value.items() if not absent(v)}
    if isinstance(value, list | tuple):
        return [without_none(v) for v in value]
    return value


def from_json(value: Any, name: str, kind: type | tuple[type, ...]) -> Any:
    """A column's value, from JSON where it is a string; `SourceError` for one of another kind."""
    found, why = value, ""
    if isinstance(found, str):
        try:
            found = json.loads(found)
        except (ValueError, RecursionError) as error:
            why = str(error)[:80] or "JSON that is too deep"
    found = list(found) if isinstance(found, tuple) else found
    if why or not isinstance(found, kind):
        an_object = "an object" if kind is dict else "a list"
        raise SourceError(
            f"{name} cannot be read",
            got=f"{value!r:.60} ({why or type(found).__name__})",
            allowed=f"{name} as {an_object}, or as JSON text of one",
            fix="repair the row; a column of plain text is named text",
        )
    return found


def messages_of(value: Any, name: str, template: str | None = None) -> list[Message]:
    """A chat's messages, each with a ``role`` and strings as ``content``.

    ShareGPT's ``from`` and ``value`` become ``role`` and ``content``, its speakers ``user`` and
    ``assistant``. Text parts of a content are joined, as templates write them.

    Args:
        value: a list of messages, or JSON text of one.
        name: of its column.
        template: the chat template; a role that stands in it in quotes is known too.

    Raises:
        SourceError: no such list, no or an unknown role, or a content that is no text.
    """
    found = from_json(value, name, list)
    if not found or isinstance(found[0], list | tuple):
        raise SourceError(
            "a chat is a list of chats" if found else "a chat is empty",
            got=f"{name} with {len(found)} lists" if found else f"{name}: []",
            allowed="one message or more, and one chat a row",
            fix="give each chat a row of its own" if found else f"leave out rows without {name}",
        )
    return [_message(m, f"message {i} of {name}", template) for i, m in enumerate(found, start=1)]


def _message(value: Any, where: str, template: str | None) -> Message:
    if not isinstance(value, Mapping):
        raise SourceError(
            f"{where} is no message",
            got=f"{value!r:.60}",
            allowed='objects such as {"role": "user", "content": "..."}',
            fix="for plain text name the column text",
        )
    message: Message = without_none(value)
    for old, new in (("from", "role"), ("value", "content")):
        if old in message and new not in message:
            message[new] = message.pop(old)
    role = message.get("role")
    role = _SPEAKERS.get(role, role) if isinstance(role, str) else role
    if role == _CALL and not _known(role, template):
        role = "assistant"
        message["tool_calls"] = _calls(message.pop("content", None), where)
    if not isinstance(role, str) or not _known(role, template):
        raise SourceError(
            f"{where} has {'no' if role is None else 'an unknown'} role",
            got=f"keys {', '.join(map(str, value)) or 'none'}" if role is None else f"{role!r:.40}",
            allowed=f"{', '.join(_ROLES[:5])}; ShareGPT's human and gpt",
            fix='write messages as {"role": "user", "content": "..."}',
        )
    message["role"] = role
    for key in _WEIGHTS:
        given = message.pop(key, None)
        learned = given == (0 if key.startswith("mask") else 1)
        if given is not None and role == "assistant" and not learned:
            raise SourceError(
                f"{where} is not to be learned by its {key!r}, which cannot be done here",
                got=f"{key}: {given!r:.20}",
                allowed="every turn of the assistant is learned",
                fix="cut the chat before that turn, or give prompt and completion",
            )
    media = next((key for key in _MEDIA if message.get(key)), None)
    if media is not None:
        raise _no_text(where, media)
    if isinstance(message.get("tool_calls"), str):
        calls = message.pop("tool_calls")
        if calls.strip():
            message["tool_calls"] = from_json(calls, f"tool_calls of {where}", list)
    content = _content(message, where)
    if content is not None:
        message["content"] = content
    return message


def _calls(value: Any, where: str) -> list[Any]:
    """Calls of tools, of JSON text of one or of a list of them, as chat templates have them."""
    found = from_json(value, f"the function call of {where}", (dict, list))
    return [
        call if not isinstance(call, dict) or "function" in call
        else {"type": "function", "function": call}
        for call in (found if isinstance(found, list) else [found])
    ]  # fmt: skip


def _known(role: str, template: str | None) -> bool:
    return role in _ROLES or any(f"{q}{role}{q}" in (template or "") for q in "'\"")


def _content(message: Message, where: str) -> str | None:
    """A message's text; None where it only calls tools or thinks."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        texts = []
        for part in content:
            text = part if isinstance(part, str) else None
            if isinstance(part, dict) and part.get("type", "text") in ("text", "input_text"):
                text = part.get("text")
            if not isinstance(text, str):
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                raise _no_text(where, f"a part of type {kind!r:.30}")
            texts.append(text)
        return "".join(texts)
    calls = any(message.get(k) for k in ("tool_calls", "function_call", "reasoning_content"))
    if content is None and calls:
        return None
    raise SourceError(
        f"{where} says nothing" if content is None else f"{where} has a content that is no text",
        got=f"{message['role']} without content or tool_calls"
        if content is None
        else f"{type(content).__name__}: {content!r:.60}",
        allowed="content as a string or a list of text parts, or tool_calls",
        fix='leave the message out, or give it "content": "..."',
    )


def _no_text(where: str, got: str) -> SourceError:
    return SourceError(
        f"{where} has a part that is no text",
        got=got,
        allowed='text, or parts such as {"type": "text", "text": "..."}',
        fix="leave out rows with images or sound",
    )
