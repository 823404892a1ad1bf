"""What a row says, whatever its format."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["Answer", "Chat", "Content", "Found", "Message", "Pair", "Text", "Tokenised"]

Message = dict[str, Any]


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
class Chat:
    """A chat; `options` go to its template."""

    messages: list[Message]
    tools: list[Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """A prompt and its completion: strings, or messages of a chat; `others` if it had others."""

    prompt: str | list[Message]
    completion: str | list[Message]
    tools: list[Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    others: bool = False


@dataclass(frozen=True)
class Tokenised:
    """A row that is tokenised already; see `retain.data.tokenised`."""

    cells: dict[str, Any]


Content = Text | Pair | Answer | Chat | Tokenised

Found = tuple[Content, set[str]]
"""A row's content, and the columns that it is made of."""
