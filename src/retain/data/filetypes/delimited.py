"""Comma- and tab-separated values, with the names of the columns in the first line."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from retain.data.filetypes.opened import open_text
from retain.data.placed import PlacedRow
from retain.errors import SourceError

__all__ = ["Delimited"]

_LARGEST = (1 << 31) - 1  # characters of a cell; the csv module stops at 131,072 by itself
_NAMES = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}

Record = tuple[int, list[str]]


class Delimited:
    """A CSV or TSV file. Every row is checked to have as many cells as the header.

    Semicolons, tabs or bars are taken where the header has them and no comma.

    Args:
        path: of the file.
        tabs: whether it is a TSV file.
    """

    def __init__(self, path: Path, tabs: bool) -> None:
        self.path, self.tabs = path, tabs
        self.header: list[str] = []

    def records(self) -> Iterator[Record]:
        """The rows that are not blank, each with the line where it begins.

        Raises:
            SourceError: the header, or a row, is not what it should be.
        """
        with open_text(self.path, newline="") as file:
            lines = self._sound(file)
            first = next(lines, "")
            skipped = 0
            if first.lower().startswith("sep=") and len(first.strip()) == 5:  # Excel's word
                mark, first, skipped = first[4], next(lines, ""), 1
            else:
                mark = self._delimiter(first)
            reader = csv.reader(_chained(first, lines), delimiter=mark, strict=True)
            line = skipped + 1
            before = csv.field_size_limit(_LARGEST)
            try:
                self.header = self._names(next(reader, []), line)
                while True:
                    line = skipped + reader.line_num + 1
                    cells = next(reader, None)
                    if cells is None:
                        return
                    if not cells:
                        continue
                    if len(cells) != len(self.header):
                        raise self._ragged(line, cells, mark)
                    yield line, cells
            except csv.Error as error:
                raise SourceError(
                    f"line {line} of {self.path} cannot be read",
                    got=f"no CSV ({error})",
                    allowed='cells with a quotation mark inside quoted, and it doubled: "a ""b"""',
                    fix=f"look at the line: sed -n {line}p {self.path}; from pandas "
                    "frame.to_json(path, orient='records', lines=True) needs no quotes",
                ) from error
            finally:
                csv.field_size_limit(before)

    def row(self, record: Record) -> PlacedRow:
        """A record as a row; all cells are strings."""
        line, cells = record
        return PlacedRow(dict(zip(self.header, cells, strict=True)), line, "line", self.path)

    def _sound(self, lines: Iterator[str]) -> Iterator[str]:
        for number, line in enumerate(lines, start=1):
            if "\x00" in line:
                raise SourceError(
                    f"line {number} of {self.path} holds a NUL byte",
                    got="binary data, or a file that was damaged",
                    allowed="text in UTF-8",
                    fix=f"look at the line: sed -n {number}p {self.path} | cat -v; "
                    "then remove the byte",
                )
            yield line

    def _delimiter(self, header: str) -> str:
        """What stands between the cells, as the header has it."""
        bare = "".join(header.split('"')[::2])  # without what is quoted
        if not self.tabs:
            return next((mark for mark in (",", ";", "\t", "|") if mark in bare), ",")
        other = next((mark for mark in (",", ";") if mark in bare), None)
        if "\t" in bare or other is None:
            return "\t"
        raise SourceError(
            f"{self.path} has no tabs",
            got=f"{_NAMES[other]} in its first line: {header.strip()[:60]}",
            allowed="tabs between the cells of a .tsv file",
            fix=f"mv {self.path} {self.path.with_name(self.path.name.replace('.tsv', '.csv'))}",
        )

    def _names(self, header: list[str], line: int) -> list[str]:
        """The names of the columns, without blanks around them."""
        names = [name.strip() or f"Unnamed: {place}" for place, name in enumerate(header)]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise SourceError(
                f"{self.path} has two columns of one name",
                got=f"{twice} in line {line}",
                allowed="each column's name once",
                fix="rename one of them in the first line",
            )
        return names

    def _ragged(self, line: int, cells: list[str], mark: str) -> SourceError:
        more = len(cells) > len(self.header)
        return SourceError(
            f"line {line} of {self.path} has {len(cells)} cell{'s' * (len(cells) != 1)}",
            got=f"{mark.join(cells)[:80]!r}",
            allowed=f"{len(self.header)}, as in its header: {', '.join(self.header)[:80]}",
            fix=f"put texts that hold {_NAMES.get(mark, mark)} in quotation marks"
            if more
            else "fill the row, or take it out",
        )


def _chained(first: str, rest: Iterator[str]) -> Iterator[str]:
    if first:
        yield first
    yield from rest
