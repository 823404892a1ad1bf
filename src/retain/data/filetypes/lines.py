"""JSON Lines: one JSON object, or one string, a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from retain.data.filetypes.opened import decoded, open_bytes
from retain.data.placed import PlacedRow, as_row
from retain.errors import SourceError

__all__ = ["Lines", "once"]

Line = tuple[int, bytes]


class Lines:
    """A file of JSON Lines. Lines are passed over as bytes; only those wanted are parsed.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def records(self) -> Iterator[Line]:
        """The lines that are not blank, each with its number."""
        with open_bytes(self.path) as file:
            for number, line in enumerate(file, start=1):
                if not line.isspace():
                    yield number, line

    def row(self, record: Line) -> PlacedRow:
        """A line as a row.

        Raises:
            SourceError: it is no JSON object.
        """
        number, line = record
        text = decoded(line, self.path, number == 1)
        try:
            value = json.loads(text, object_pairs_hook=once)
        except ValueError as error:
            raise self._broken(number, text, error) from error
        except RecursionError as error:
            raise SourceError(
                f"line {number} of {self.path} is nested too deeply",
                got="more brackets inside one another than can be read",
                allowed="rows of a few levels",
                fix=f"take the line out: sed -i {number}d {self.path}",
            ) from error
        if isinstance(value, list) and any(isinstance(v, dict) for v in value):
            raise SourceError(
                f"line {number} of {self.path} is an array of rows",
                got=f"{len(value)} rows in one line",
                allowed="one object a line; arrays in a file that is named .json",
                fix=f"mv {self.path} {_json(self.path)}",
            )
        return as_row(value, number, "line", self.path)

    def _broken(self, number: int, text: str, error: ValueError) -> SourceError:
        column = f", column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        fix = f"look at the line: sed -n {number}p {self.path}; repair it or take it out"
        if text.strip() in {"{", "[", "[{"}:
            fix = f"objects over several lines belong into a .json: mv {self.path} "
            fix += str(_json(self.path))
        elif "Extra data" in reason and text.rstrip().endswith(","):
            fix = f"take the commas behind the objects away: sed -i 's/,\\r*$//' {self.path}"
        elif "Extra data" in reason:
            fix = "begin a new line for each object"
        return SourceError(
            f"line {number} of {self.path} cannot be read",
            got=f"no JSON ({reason}{column}): {text.strip()[:60]!r}",
            allowed="one JSON object a line",
            fix=fix,
        )


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The fields of a JSON object.

    Raises:
        ValueError: one is there twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {twice!r} is there twice")
    return found


def _json(path: Path) -> Path:
    """The file's name with .json in the place of .jsonl."""
    head, _, tail = path.name.lower().partition(".jsonl")
    if not tail and path.name.lower().endswith(".ndjson"):
        head = path.name[: -len(".ndjson")]
    return path.with_name(
        f"{path.name[: len(head)]}.json{path.name[len(head) + 6 :] if tail else ''}"
    )
