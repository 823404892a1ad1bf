"""Where the assistant speaks in a chat's text, for a template that does not say it.

The chat is written up to each turn of the assistant and up to the one before, and compared with the
whole. A template that writes earlier turns otherwise once others follow cannot be read in this way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from typing import Any

from retain.data.rows import Message
from retain.errors import SourceError

__all__ = ["Write", "assistant_spans", "shared", "untold"]

Write = Callable[[list[Message], bool], str]
"""Writes messages as text; with True, up to where the assistant's answer begins."""

_SEEN = 32  # characters at the end of an answer that must lie in its turn


def shared(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Length of the common beginning."""
    if b[: len(a)] == a:
        return len(a)
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def assistant_spans(
    messages: list[Message], text: str, write: Write, specials: Iterable[str]
) -> list[tuple[int, int]]:
    """(start, stop) of each of the assistant's turns, its end token and line break with it.

    Args:
        messages: the chat.
        text: as it is written.
        write: the template.
        specials: tokens such as the end token, that a template may write behind any last message.

    Raises:
        SourceError: the template does not write a turn alike wherever the chat ends.
    """
    ends = sorted(specials, key=len, reverse=True)
    found = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        upto = write(messages[: i + 1], False)
        start, stop = _start(messages, i, upto, write, ends), _length(upto, text, ends)
        said = "".join(str(message.get("content", "")).split())[-_SEEN:]
        if start is None or stop is None or said not in "".join(text[start:stop].split()):
            raise untold(f"the assistant's turn, message {i + 1}, is written otherwise alone")
        found.append((start, stop))
    return found


def _start(
    messages: list[Message], i: int, upto: str, write: Write, ends: Sequence[str]
) -> int | None:
    """Where the assistant's own words begin in the text of a chat up to its turn."""
    before = write(messages[:i], False) if i else ""
    common = _length(before, upto, ends)
    if common is None:
        return None
    if i:
        asked = write(messages[:i], True)
        if asked != before:
            return max(common, shared(asked, upto))
    # No generation prompt: what is alike before any answer is the template's.
    probes = [write([*messages[:i], {"role": "assistant", "content": c}], False) for c in "0Z"]
    return max(common, min(shared(*probes), shared(probes[0], upto)))


def _length(text: str, longer: str, ends: Sequence[str]) -> int | None:
    """Length of a text with which a longer one begins, but for special tokens at its end."""
    while not longer.startswith(text):
        last = next((e for e in ends if e and text.endswith(e)), None)
        if last is None:
            return None
        text = text.removesuffix(last)
    return len(text)


def untold(why: str) -> SourceError:
    """The error for a template of which the assistant's part cannot be told."""
    all_turns = "learn every turn with loss='all' (--loss all)"
    known = find_spec("trl") is not None
    return SourceError(
        "the chat template does not tell which tokens are the assistant's",
        got=why,
        allowed="a template with {% generation %} marks, one that TRL knows, or one that writes "
        "each turn alike",
        fix=all_turns if known else f"pip install trl, which knows many templates; or {all_turns}",
    )
