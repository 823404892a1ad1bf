"""What a row says, whatever its format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from retain.data.messages import Message
from retain.errors import SourceError

__all__ = ["Answer", "Chat", "Content", "Found", "Pair", "Ready", "Row", "Text", "check_text"]

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
    """A prompt and its completion: strings, or messages of a chat; `others` if it had others."""

    prompt: str | list[Message]
    completion: str | list[Message]
    tools: list[Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    others: bool = False


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

Found = tuple[Content, set[str]]
"""A row's content, and the columns that it is made of."""


def check_text(value: object) -> None:
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
            check_text(v)
    elif isinstance(value, list | tuple):
        for v in value:
            check_text(v)
    elif isinstance(value, Text | Pair | Answer | Chat):
        check_text(vars(value))
