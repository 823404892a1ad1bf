"""Read rows from a data set, a list or a file."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from retain.errors import SourceError

__all__ = ["Row", "read_rows"]

Row = Mapping[str, Any]

_SUFFIXES = (".txt", ".md", ".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet")
_UTF8 = "utf-8-sig"  # Excel and PowerShell begin a file with a byte order mark


def read_rows(source: str | Path | Iterable[Row], limit: int | None = None) -> list[Row]:
    """The rows of a `datasets.Dataset`, a list of dictionaries or strings, or a file.

    Args:
        source: what to read; files by suffix: %s.
        limit: read at most so many rows.

    Raises:
        SourceError: the file is missing, damaged, empty or of another kind.
    """
    if isinstance(source, str | Path):
        rows = _read_file(Path(source).expanduser(), limit)
    else:
        rows = []
        for row in source:
            rows.append({"text": row} if isinstance(row, str) else row)
            if limit is not None and len(rows) >= limit:
                break
    if not rows:
        raise SourceError(
            "the source is empty",
            got=f"0 rows in {_short(source)}",
            allowed="at least 1 row",
            fix="give a data set or a file with text",
        )
    return rows


def _read_file(path: Path, limit: int | None) -> list[Row]:
    kind = next(
        (s for s in sorted(_SUFFIXES, key=len, reverse=True) if path.name.endswith(s)), None
    )
    if str(path) == "self" and not path.exists():
        raise SourceError(
            "text of the model's own is no file",
            got="self",
            allowed=f"a file ending in {', '.join(_SUFFIXES)}",
            fix="leave the source out where the model's own text is the default; see --help",
        )
    if not path.is_file() or kind is None:
        raise SourceError(
            "no such source" if not path.is_file() else "a source of an unknown kind",
            got=str(path),
            allowed=f"a file ending in {', '.join(_SUFFIXES)}; 'self' where text may be sampled",
            fix="check the path and the suffix",
        )
    try:
        rows = _parse(path, kind, limit)
    except (OSError, EOFError, ValueError, csv.Error) as error:
        raise SourceError(
            "the source cannot be read",
            got=f"{path} ({type(error).__name__}: {str(error)[:120]})",
            allowed=f"a sound {kind} file",
            fix="repair or replace the file",
        ) from error
    return rows if limit is None else rows[:limit]


def _parse(path: Path, kind: str, limit: int | None) -> list[Row]:
    if kind in {".txt", ".md"}:
        text = path.read_text(encoding=_UTF8)
        return [{"text": text, "pack": True}] if text.strip() else []
    if kind in {".jsonl", ".jsonl.gz"}:
        rows: list[Row] = []
        opener = gzip.open if kind.endswith(".gz") else open
        with opener(path, "rt", encoding=_UTF8) as file:
            for line in file:
                if limit is not None and len(rows) >= limit:
                    break
                if line.strip():
                    rows.append(_row(json.loads(line)))
        return rows
    if kind == ".json":
        found = json.loads(path.read_text(encoding=_UTF8))
        return [_row(r) for r in (found if isinstance(found, list) else [found])]
    if kind == ".csv":
        with path.open(encoding=_UTF8, newline="") as file:
            return list(csv.DictReader(file))
    import pyarrow.parquet as parquet

    return list(parquet.read_table(path).to_pylist())


def _row(value: Any) -> Row:
    if isinstance(value, str):
        return {"text": value}
    if not isinstance(value, dict):
        raise ValueError(f"a row is a {type(value).__name__}, not an object")
    return value


def _short(source: object) -> str:
    return str(source) if isinstance(source, str | Path) else type(source).__name__


read_rows.__doc__ = (read_rows.__doc__ or "") % ", ".join(_SUFFIXES)
