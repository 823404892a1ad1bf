"""JSON documents: an array of rows, rows under one key, one object, or objects in a row."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from retain.data.filetypes.lines import once
from retain.data.filetypes.opened import open_text
from retain.data.placed import PlacedRow, as_row
from retain.errors import SourceError

__all__ = ["Documents"]

_CHUNK = 1 << 16
_ROWS = (
    "text", "content", "sentence", "messages", "conversations", "conversation", "prompt",
    "completion", "input_ids", "chosen", "rejected", "instruction", "question", "premise",
    "sentence1", "dialog", "dialogue", "output", "response", "label",
)  # fmt: skip
"""Keys of a row: an object that has one of them is a row, and not a cover of rows."""

Record = tuple[int, int, Any]


class Documents:
    """A file named .json, read piece by piece: an array's elements are parsed one by one.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def records(self) -> Iterator[Record]:
        """The rows, each with its number and the line where it begins.

        Raises:
            SourceError: the file is no JSON, or nothing in it looks like rows.
        """
        with open_text(self.path) as file:
            values = _Values(file, self.path)
            first = values.peek()
            if first == "[":
                yield from _numbered(values.array())
                values.end()
            elif first:
                line, value = values.next()
                if values.peek():  # JSON Lines, or objects one after the other
                    yield 1, line, value
                    for number, (line, value) in enumerate(values.rest(), start=2):
                        yield number, line, value
                else:
                    yield from self._covered(line, value)

    def row(self, record: Record) -> PlacedRow:
        """A record as a row."""
        number, line, value = record
        if isinstance(value, list) and any(isinstance(v, dict) for v in value):
            raise SourceError(
                f"line {line} of {self.path} is an array of rows",
                got=f"{len(value)} rows in row {number}",
                allowed="one array in a file, or one object after the other",
                fix="write one object a line",
            )
        return as_row(value, number, "row", self.path)

    def _covered(self, line: int, value: Any) -> Iterator[Record]:
        """The rows of a file that is one object."""
        if isinstance(value, dict) and _is_frame(value):
            raise SourceError(
                f"{self.path} holds columns, not rows",
                got=f"an object of {', '.join(map(str, list(value)[:6]))}",
                allowed="an array of objects, or JSON Lines",
                fix="from pandas: frame.to_json(path, orient='records', lines=True)",
            )
        if not isinstance(value, dict) or any(key in value for key in _ROWS):
            yield 1, line, value
            return
        covers = {
            key: rows
            for key, rows in value.items()
            if isinstance(rows, list) and rows and all(isinstance(r, dict) for r in rows)
        }
        if len(covers) == 1:
            (rows,) = covers.values()
            yield from _numbered((line, row) for row in rows)
            return
        if covers:
            name = next(iter(covers))
            raise SourceError(
                f"{self.path} holds several lists of rows",
                got=", ".join(covers),
                allowed="one list of rows in a file",
                fix="pick one: from Python "
                f"json.load(open({self.path.name!r}))[{name!r}] is a list that can be given",
            )
        yield 1, line, value


def _is_frame(value: dict[str, Any]) -> bool:
    """Whether an object is a data frame as pandas writes it without orient='records'."""
    if {"columns", "data"} <= set(value):
        return True
    cells = list(value.values())
    return bool(cells) and all(isinstance(cell, dict) and "0" in cell for cell in cells)


def _numbered(values: Iterator[tuple[int, Any]]) -> Iterator[Record]:
    return ((number, line, value) for number, (line, value) in enumerate(values, start=1))


class _Values:
    """The values of a JSON text one by one, with no more of it in memory than one needs."""

    def __init__(self, file: IO[str], path: Path) -> None:
        self._file, self._path = file, path
        self._text, self._at, self._line, self._done = "", 0, 1, False
        self._decoder = json.JSONDecoder(object_pairs_hook=once)

    def _fill(self) -> None:
        self._line += self._text.count("\n", 0, self._at)
        rest = self._text[self._at :]
        more = self._file.read(max(_CHUNK, len(rest)))  # doubles, so that long values are cheap
        self._text, self._at, self._done = rest + more, 0, not more

    def _here(self, place: int) -> int:
        return self._line + self._text.count("\n", 0, place)

    def peek(self) -> str:
        """The next character that is no white space; "" at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in " \t\r\n":
                self._at += 1
            if self._at < len(self._text) or self._done:
                return self._text[self._at : self._at + 1]
            self._fill()

    def next(self) -> tuple[int, Any]:
        """The next value, and the line where it begins."""
        if not self.peek():
            raise self._broken("the file ends too early", self._at)
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos > len(self._text) - 16
                if self._done or not cut:
                    raise self._broken(error.msg, error.pos) from error
            except ValueError as error:
                raise self._broken(str(error), self._at) from error
            else:
                if end < len(self._text) or self._done:
                    line = self._here(self._at)
                    self._at = end
                    return line, value
            self._fill()

    def rest(self) -> Iterator[tuple[int, Any]]:
        """All values that follow, one after the other."""
        while self.peek():
            yield self.next()

    def array(self) -> Iterator[tuple[int, Any]]:
        """The elements of an array."""
        self._at += 1
        if self.peek() == "]":
            self._at += 1
            return
        while True:
            yield self.next()
            sign = self.peek()
            if sign not in {",", "]"}:
                raise self._broken("a comma or ] is missing", self._at)
            self._at += 1
            if sign == "]":
                return

    def end(self) -> None:
        """Raises `SourceError` unless the file ends here."""
        if self.peek():
            raise self._broken("something follows the array", self._at)

    def _broken(self, reason: str, place: int) -> SourceError:
        line = self._here(place)
        piece = self._text[max(0, place - 20) : place + 40]
        return SourceError(
            f"line {line} of {self._path} cannot be read",
            got=f"no JSON ({reason})" + (f": {piece!r}" if piece else ""),
            allowed="an array of objects, or one object after the other",
            fix=f"look at the line: sed -n {line}p {self._path}; repair it",
        )
