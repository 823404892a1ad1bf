"""JSON Lines, and JSON documents: an array of rows, rows under one key, or objects in a row."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

from retain.data.readers.opened import decoded, open_bytes, open_text
from retain.data.rows import PlacedRow, as_row
from retain.documents import once
from retain.errors import SourceError

__all__ = ["json_records", "line_records"]

_CHUNK = 1 << 16
_ROWS = (
    "text", "content", "sentence", "messages", "conversations", "conversation", "prompt",
    "completion", "input_ids", "chosen", "rejected", "instruction", "question", "premise",
    "sentence1", "dialog", "dialogue", "output", "response", "label",
)  # fmt: skip
"""Keys of a row: an object that has one of them is a row, and not a cover of rows."""

Record = Callable[[], PlacedRow]
Values = Iterable[tuple[int, Any]]
"""Values, each with the line where it begins."""


def line_records(path: Path) -> Iterator[Record]:
    """The lines of a file of JSON Lines that are not blank; only those wanted are parsed."""
    with open_bytes(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.isspace():
                yield partial(_line, path, number, line)


def _line(path: Path, number: int, line: bytes) -> PlacedRow:
    """A line as a row; raises `SourceError` for what is no JSON object."""
    text = decoded(line, path, number == 1)
    try:
        value = _DECODER.decode(text)
    except ValueError as error:
        raise _broken_line(path, number, text, error) from error
    except RecursionError as error:
        raise SourceError(
            f"line {number} of {path} is nested too deeply",
            got="more brackets inside one another than can be read",
            allowed="rows of a few levels",
            fix=f"take the line out: sed -i {number}d {path}",
        ) from error
    if isinstance(value, list) and any(isinstance(v, dict) for v in value):
        raise _array(path, number, value, f"arrays belong into a .json: mv {path} {_as_json(path)}")
    return as_row(value, number, "line", path)


def _broken_line(path: Path, number: int, text: str, error: ValueError) -> SourceError:
    column = f", column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
    reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
    fix = f"look at the line: sed -n {number}p {path}; repair it or take it out"
    if text.strip() in {"{", "[", "[{"}:
        fix = f"objects over several lines belong into a .json: mv {path} {_as_json(path)}"
    elif "Extra data" in reason and text.rstrip().endswith(","):
        fix = f"take the commas behind the objects away: sed -i 's/,\\r*$//' {path}"
    elif "Extra data" in reason:
        fix = "begin a new line for each object"
    return SourceError(
        f"line {number} of {path} cannot be read",
        got=f"no JSON ({reason}{column}): {text.strip()[:60]!r}",
        allowed="one JSON object a line",
        fix=fix,
    )


def _as_json(path: Path) -> Path:
    """The file's name with .json in the place of .jsonl or .ndjson."""
    kind = next(s for s in reversed(path.suffixes) if s.lower() in {".jsonl", ".ndjson"})
    head, _, tail = path.name.rpartition(kind)
    return path.with_name(f"{head}.json{tail}")


def _array(path: Path, line: int, value: list[Any], fix: str) -> SourceError:
    return SourceError(
        f"line {line} of {path} is an array of rows",
        got=f"{len(value)} rows in one value",
        allowed="one object a line, one object after the other, or one array in a .json",
        fix=fix,
    )


def json_records(path: Path) -> Iterator[Record]:
    """The rows of a file named .json, read piece by piece: elements are parsed one by one.

    Raises:
        SourceError: the file is no JSON, or nothing in it looks like rows.
    """
    with open_text(path) as file:
        for number, (line, value) in enumerate(_values(_Parser(file, path), path), start=1):
            yield partial(_value, path, number, line, value)


def _value(path: Path, number: int, line: int, value: Any) -> PlacedRow:
    if isinstance(value, list) and any(isinstance(v, dict) for v in value):
        raise _array(path, line, value, "write one object a line")
    return as_row(value, number, "row", path)


def _values(parser: _Parser, path: Path) -> Values:
    if parser.peek() == "[":
        yield from parser.array()
        if parser.peek():
            raise parser.broken("something follows the array")
    elif parser.peek():
        first = parser.next()
        if parser.peek():  # JSON Lines, or objects one after the other
            yield first
            while parser.peek():
                yield parser.next()
        else:
            yield from _covered(*first, path)


def _covered(line: int, value: Any, path: Path) -> Values:
    """The rows of a file that is one object."""
    if not isinstance(value, dict):
        return [(line, value)]
    cells = list(value.values())
    frame = cells and all(isinstance(cell, dict) and "0" in cell for cell in cells)
    if frame or {"columns", "data"} <= set(value):
        raise SourceError(
            f"{path} holds columns, not rows",  # as pandas writes a frame without 'records'
            got=f"an object of {', '.join(map(str, list(value)[:6]))}",
            allowed="an array of objects, or JSON Lines",
            fix="from pandas: frame.to_json(path, orient='records', lines=True)",
        )
    covers = {
        key: rows
        for key, rows in value.items()
        if isinstance(rows, list) and rows and all(isinstance(r, dict) for r in rows)
    }
    if not covers or any(key in value for key in _ROWS):
        return [(line, value)]
    name, rows = next(iter(covers.items()))
    if len(covers) == 1:
        return ((line, row) for row in rows)
    raise SourceError(
        f"{path} holds several lists of rows",
        got=", ".join(covers),
        allowed="one list of rows in a file",
        fix="pick one: from Python "
        f"json.load(open({path.name!r}))[{name!r}] is a list that can be given",
    )


_DECODER = json.JSONDecoder(object_pairs_hook=once)


class _Parser:
    """The values of a JSON text one by one, with no more of it in memory than one needs."""

    def __init__(self, file: IO[str], path: Path) -> None:
        self._file, self._path = file, path
        self._text, self._at, self._line, self._done = "", 0, 1, False

    def _fill(self) -> None:
        self._line = self._here(self._at)
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
            raise self.broken("the file ends too early")
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
                if end < len(self._text) or self._done:
                    line, self._at = self._here(self._at), end
                    return line, value
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos > len(self._text) - 16
                if self._done or not cut:
                    raise self.broken(error.msg, error.pos) from error
            except ValueError as error:
                raise self.broken(str(error)) from error
            self._fill()

    def array(self) -> Values:
        """The elements of an array."""
        self._at += 1
        if self.peek() == "]":
            self._at += 1
            return
        sign = ","
        while sign == ",":
            yield self.next()
            sign = self.peek()
            if sign not in {",", "]"}:
                raise self.broken("a comma or ] is missing")
            self._at += 1

    def broken(self, reason: str, place: int | None = None) -> SourceError:
        """The error for what is no JSON at a place; by default where the parser is."""
        place = self._at if place is None else place
        line, piece = self._here(place), self._text[max(0, place - 20) : place + 40]
        return SourceError(
            f"line {line} of {self._path} cannot be read",
            got=f"no JSON ({reason})" + (f": {piece!r}" if piece else ""),
            allowed="an array of objects, or one object after the other",
            fix=f"look at the line: sed -n {line}p {self._path}; repair it",
        )
