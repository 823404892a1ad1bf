"""Rows: columns by name, where they come from (so that an error names the line), what they say."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from retain.errors import SourceError

__all__ = [
    "Answer", "Chat", "Content", "Found", "Message", "Pair", "Passage", "PlacedRow", "Row", "Text",
    "Tokenised", "as_row", "check_characters", "place_of",
]  # fmt: skip

Row = Mapping[str, Any]

_LABELS = frozenset({"label", "labels"})


class PlacedRow(dict[str, Any]):
    """A row, and the place that it was read from.

    Attributes:
        number: of the row or of its first line, counted from 1.
        unit: what the number counts: "row" or "line".
        path: of the file; None for rows that were given.
    """

    __slots__ = ("number", "path", "unit")

    def __init__(self, fields: Row, number: int, unit: str = "row", path: Path | None = None):
        super().__init__(fields)
        self.number, self.unit, self.path = number, unit, path

    def __reduce__(self) -> Any:
        return type(self), (dict(self), self.number, self.unit, self.path)

    @property
    def place(self) -> str:
        """Such as ``line 7 of train.jsonl``."""
        return f"{self.unit} {self.number}" + (f" of {self.path.name}" if self.path else "")


class Passage(PlacedRow):
    """A piece of a longer text, of which only the first tokens are wanted."""

    __slots__ = ()

    @property
    def begins(self) -> bool:
        """Whether the text begins here."""
        return self.number == 0


def place_of(row: Row, number: int) -> str:
    """Where a row stands in its source; ``row NUMBER`` if it does not say."""
    return str(getattr(row, "place", f"row {number}"))


def as_row(value: object, number: int, unit: str = "row", path: Path | None = None) -> PlacedRow:
    """A mapping or a text as a row; a row that has a place already keeps it.

    NaN is what pandas has where a value is missing, so it counts as None; but not as a label,
    where it may also be the result of a wrong computation.

    Raises:
        SourceError: the value is neither, its keys are not all strings, or half a character.
    """
    if isinstance(value, PlacedRow):
        return value
    if isinstance(value, str):
        value = {"text": value}
    where = f"{unit} {number}" + ("" if path is None else f" of {path}")
    if not isinstance(value, Mapping):
        raise SourceError(
            f"{where} is neither a mapping nor a text",
            got="None" if value is None else f"{_kind(value)}: {value!r:.60}",
            allowed="a dictionary such as {'text': ...}, or a string",
            fix=_mend(value),
        )
    if not all(isinstance(key, str) for key in value):
        raise SourceError(
            f"{where} has a key that is no string",
            got=repr(next(key for key in value if not isinstance(key, str))),
            allowed="names of columns as keys",
            fix="give {'text': ...} for each row",
        )
    check_characters(value, where)
    row = PlacedRow(value, number, unit, path)
    for key, found in value.items():
        if isinstance(found, float) and math.isnan(found) and key not in _LABELS:
            row[key] = None
    return row


def check_characters(value: object, where: str = "a text") -> None:
    r"""Raises `SourceError` for half a character, however deep in a value.

    Such as ``\ud83d`` alone: JSON can write it, nothing reads it.
    """
    inner: Iterable[object] = ()
    if isinstance(value, str):
        try:
            if not value.isascii():
                value.encode()
        except UnicodeEncodeError as error:
            raise SourceError(
                f"{where} holds half a character (a lone surrogate)",
                got=f"{value[error.start]!r} at character {error.start + 1}",
                allowed="whole characters: an emoji is two such halves in JSON",
                fix="text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace'), or take "
                "the row out",
            ) from error
    elif isinstance(value, Mapping):
        inner = [*value.keys(), *value.values()]
    elif isinstance(value, list | tuple) and not isinstance(next(iter(value), 0), int | float):
        inner = value  # and no list of tokens
    for each in inner:
        check_characters(each, where)


def _kind(value: object) -> str:
    name = type(value).__name__
    return f"an {name}" if name[0] in "aeiouAEIOU" else f"a {name}"


def _mend(value: object) -> str:
    if isinstance(value, bytes | bytearray):
        return "decode it: row.decode('utf-8')"
    if isinstance(value, tuple | list) and value:
        if len(value) == 2 and isinstance(value[0], str):
            return "rows = [{'text': text, 'label': label} for text, label in rows]"
        if all(isinstance(v, int) for v in value):
            return "rows = [{'input_ids': ids} for ids in rows]"
        if all(isinstance(v, Mapping) for v in value):
            return "rows = [{'messages': chat} for chat in rows]"
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "leave the row out"
    return "give {'text': ...} for each row"


# --- what a row says, whatever its format

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
