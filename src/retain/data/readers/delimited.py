"""Comma- and tab-separated values, with the names of the columns in the first line."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from retain.data.readers.opened import nul, open_text
from retain.data.readers.tables import check_names
from retain.data.rows import PlacedRow
from retain.errors import SourceError

__all__ = ["csv_records"]

_LARGEST = (1 << 31) - 1  # characters of a cell; the csv module stops at 131,072 by itself
_NAMES = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}


def csv_records(path: Path, tabs: bool) -> Iterator[Callable[[], PlacedRow]]:
    """The rows of a CSV or TSV file that are not blank; all cells are strings.

    Every row is checked to have as many cells as the header. Semicolons, tabs or bars are taken
    where the header has them and no comma.

    Raises:
        SourceError: the header, or a row, is not what it should be.
    """
    with open_text(path, newline="") as file:
        lines = _sound(file, path)
        first = next(lines, "")
        skipped = 0
        if first.lower().startswith("sep=") and len(first.strip()) == 5:  # Excel's word
            mark, first, skipped = first[4], next(lines, ""), 1
        else:
            mark = _delimiter(first, path, tabs)
        lines = itertools.chain([first] if first else [], lines)
        reader = csv.reader(lines, delimiter=mark, strict=True)
        line = skipped + 1
        before = csv.field_size_limit(_LARGEST)
        try:
            header = [n.strip() or f"Unnamed: {i}" for i, n in enumerate(next(reader, []))]
            check_names(header, str(path), "the first line of the file", f" in line {line}")
            while True:
                line = skipped + reader.line_num + 1
                cells = next(reader, None)
                if cells is None:
                    return
                if cells and len(cells) != len(header):
                    raise _ragged(path, line, cells, header, mark)
                if cells:
                    yield partial(_row, header, cells, line, path)
        except csv.Error as error:
            raise SourceError(
                f"line {line} of {path} cannot be read",
                got=f"no CSV ({error})",
                allowed='cells with a quotation mark inside quoted, and it doubled: "a ""b"""',
                fix=f"look at the line: sed -n {line}p {path}; from pandas "
                "frame.to_json(path, orient='records', lines=True) needs no quotes",
            ) from error
        finally:
            csv.field_size_limit(before)


def _row(header: list[str], cells: list[str], line: int, path: Path) -> PlacedRow:
    return PlacedRow(dict(zip(header, cells, strict=True)), line, "line", path)


def _sound(lines: Iterator[str], path: Path) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if "\x00" in line:
            raise nul(path, number)
        yield line


def _delimiter(header: str, path: Path, tabs: bool) -> str:
    """What stands between the cells, as the header has it."""
    bare = "".join(header.split('"')[::2])  # without what is quoted
    found = [mark for mark in _NAMES if mark in bare]
    if not tabs:
        return found[0] if found else ","
    if "\t" in found or not found or found == ["|"]:
        return "\t"
    raise SourceError(
        f"{path} has no tabs",
        got=f"{_NAMES[found[0]]} in its first line: {header.strip()[:60]}",
        allowed="tabs between the cells of a .tsv file",
        fix=f"mv {path} {path.with_name(path.name.replace('.tsv', '.csv'))}",
    )


def _ragged(path: Path, line: int, cells: list[str], header: list[str], mark: str) -> SourceError:
    return SourceError(
        f"line {line} of {path} has {len(cells)} cell{'s' * (len(cells) != 1)}",
        got=f"{mark.join(cells)[:80]!r}",
        allowed=f"{len(header)}, as in its header: {', '.join(header)[:80]}",
        fix=f"put texts that hold {_NAMES.get(mark, mark)} in quotation marks"
        if len(cells) > len(header)
        else "fill the row, or take it out",
    )
