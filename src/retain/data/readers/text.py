"""Plain text: a file is one long text, or, where few rows are wanted, passages drawn from it.

A file is divided into blocks of one length, moved to the next end of a paragraph, line or word, so
that the blocks make up the whole text and share nothing. Of the blocks that are drawn only the
first tokens are used, so a draw needs the memory of what is drawn, however large the file.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from retain.data.readers.opened import COMPRESSIONS, decoded, open_bytes, size_of
from retain.data.rows import Passage, PlacedRow

__all__ = ["Text", "block_length"]

_LEAST, _MOST = 2 << 10, 32 << 10
"""Bytes of a block where the length of a row in tokens is not known."""
_LOW, _HIGH = 8, 16
"""Bytes a token, where it is: text has about 4, code with its indentation up to 8."""
_BREAKS = (re.compile(rb"\n[ \t\r]*\n\s*"), re.compile(rb"\n\s*"), re.compile(rb"\s+"))
_CHUNK = 1 << 20


def block_length(size: int, limit: int, max_length: int | None) -> int:
    """Bytes of a block of a text of `size` bytes, of which `limit` blocks are wanted.

    Of each `max_length` tokens will be used, if that is known.
    """
    least, most = (_LEAST, _MOST) if max_length is None else (_LOW * max_length, _HIGH * max_length)
    return max(least, min(most, size // (2 * limit)))  # there is something to choose from


class Text:
    """A file of plain text in blocks; at first in one."""

    def __init__(self, path: Path) -> None:
        self.path, self.size = path, size_of(path)
        self._count = min(1, self.size)

    def whole(self) -> list[PlacedRow]:
        """The text as one row, which is packed into rows of tokens; none if it is blank."""
        with open_bytes(self.path) as file:
            text = _text(file.read(), self.path, True)
        row = PlacedRow({"text": text, "pack": True}, 1, "row", self.path)
        return [row] if text.strip() else []

    def divide(self, length: int) -> None:
        """Sets the bytes of a block: so many, or more, so that all are alike."""
        self._count = max(min(1, self.size), self.size // length)

    def __len__(self) -> int:
        return self._count

    def take(self, places: Sequence[int]) -> list[PlacedRow]:
        """The blocks at sorted places that are not blank, as rows."""
        rows: list[PlacedRow] = []
        length = self.size // max(1, self._count)
        with open_bytes(self.path) as file:
            at = 0  # of the file
            held, begin = b"", 0  # what was read last, and where it begins
            for place in places:
                start, end = (i * self.size // self._count for i in (place, place + 1))
                held, begin = held[start - begin :], start
                if not held:
                    at = _forward(file, self.path, at, start)
                more = file.read(end - start + length - len(held))  # and the next one's break
                held, at = held + more, at + len(more)
                first = 0 if place == 0 else _break(held, length)
                last = end - start
                last += 0 if place + 1 == self._count else _break(held[last:], length)
                text = _text(held[first:last], self.path, place == 0)
                if text.strip():
                    rows.append(Passage({"text": text}, start + first, "byte", self.path))
        return rows


def _break(block: bytes, length: int) -> int:
    """Where a text may be parted, in the first quarter of a block."""
    inside = block[: max(1, length // 4)]  # so that what is left of a block is long enough
    for found in (pattern.search(inside) for pattern in _BREAKS):
        if found is not None and found.end() < len(inside):
            return found.end()
    return next((i for i, byte in enumerate(inside) if byte & 0xC0 != 0x80), 0)


def _text(raw: bytes, path: Path, first: bool) -> str:
    return decoded(raw, path, first).replace("\r\n", "\n").replace("\r", "\n")


def _forward(file: IO[bytes], path: Path, at: int, to: int) -> int:
    """Moves on in a file that may be compressed."""
    if path.suffix.lower() not in COMPRESSIONS:
        return file.seek(to)
    while at < to and (passed := len(file.read(min(_CHUNK, to - at)))):
        at += passed
    return at
