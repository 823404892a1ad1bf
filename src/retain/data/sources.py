"""Rows from a file, a folder of shards, a data set of the hub, or from Python; and their tokens.

Rows are dictionaries; docs/data.md says what they may hold, and where they may come from.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

from retain.data.draws import check_limit, draw, draw_from
from retain.data.encoding import encode
from retain.data.readers.delimited import csv_records
from retain.data.readers.given import given_rows
from retain.data.readers.json_rows import json_records, line_records
from retain.data.readers.opened import check_head, reading
from retain.data.readers.paths import KINDS, files_of, kind_of
from retain.data.readers.tables import Table
from retain.data.readers.text import Text, block_length
from retain.data.rows import PlacedRow, Row
from retain.errors import SourceError
from retain.extras import load

__all__ = ["Row", "encode", "load_hub", "read_rows"]

_ON_HUB = re.compile(
    r"(?:hf:/|https?://(?:www\.)?(?:huggingface\.co|hf\.co))/datasets/([\w.-]+/[\w.-]+)"
    r"(?!.*/resolve/)"
)
_BARE = re.compile(r"[\w-]{1,96}")
_PART = r"[A-Za-z0-9][\w.-]*"
_HUB_NAME = re.compile(rf"({_PART}/{_PART})(?:/([\w.-]+))?(?::([\w.\[\]:%+-]+))?")


def read_rows(
    source: str | os.PathLike[str] | Iterable[Row | str],
    limit: int | None = None,
    *,
    seed: int = 0,
    max_length: int | None = None,
) -> list[Row]:
    """The rows of a source, or a seeded draw of some of them.

    A source is one of:

    - a file: %s;
    - a folder of such files, all of one kind, or a pattern such as ``data/*.parquet``; files are
      read in the order of their names; or a folder that `datasets` has saved;
    - the name of a data set on the hub: ``owner/name``, ``owner/name:split`` or
      ``owner/name/config:split``;
    - a `datasets.Dataset` or `IterableDataset`; whatever has a length and rows by number, such as
      a list or a `torch.utils.data.Dataset`; a table of pandas, Polars or Arrow; or a stream of
      rows, such as a generator. A row is a dictionary or a string.

    With a `limit` the rows are drawn from all rows, every row alike, and come in the source's
    order: the same for the same seed whatever the format, and a smaller limit gives a part of a
    larger one's. Memory grows with the limit, not with the file (but for one huge JSON
    object). Rows that are not drawn are not checked, but for CSV. Of a stream the draw is from its
    first 10,000 rows (eight times the limit if that is more), and a warning says so if there are
    more.

    A plain text file is one long row, ``{"text": ..., "pack": True}``; with a `limit` it is so many
    passages from places that are drawn, unless the whole file is hardly longer.

    Args:
        source: what to read.
        limit: rows at most; None for all.
        seed: of the draw.
        max_length: tokens that will be used of each row, so that passages are long enough.

    Raises:
        SourceError: the source is missing, damaged, empty or holds no rows.
        ConfigError: a limit below 1.
    """
    check_limit(limit)
    if isinstance(source, os.PathLike) and not isinstance(source, Path):
        source = Path(source)
    if isinstance(source, str | Path):
        rows = _read_path(source, limit, seed, max_length)
    else:
        rows = given_rows(source, limit, seed)
    if not rows:
        raise SourceError(
            "the source is empty",
            got=f"0 rows in {source if isinstance(source, str | Path) else type(source).__name__}",
            allowed="at least 1 row",
            fix="make it anew: an iterator gives its rows once"
            if isinstance(source, Iterator)
            else "give a data set or a file with text",
        )
    return cast("list[Row]", rows)


read_rows.__doc__ = (read_rows.__doc__ or "") % KINDS


def _read_path(
    source: str | Path, limit: int | None, seed: int, max_length: int | None
) -> list[PlacedRow]:
    if not str(source).strip() or "\x00" in str(source) or len(str(source)) > 4096:
        raise _no_such(source)
    try:
        folder = Path(source).expanduser()
        if (folder / "dataset_dict.json").is_file():
            splits = sorted(p.name for p in folder.iterdir() if p.is_dir())
            raise _several("the folder holds splits, not rows", splits, f"{folder}/")
        if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
            return given_rows(_saved(folder), limit, seed)
        files = files_of(source)
    except OSError as error:
        raise _no_such(source, error.strerror) from error
    if files:
        return _read_files(files, limit, seed, max_length)
    found = _HUB_NAME.fullmatch(source) if isinstance(source, str) else None
    if found is None or kind_of(Path(source)) or Path(str(source).partition("/")[0]).exists():
        raise _no_such(source)
    return given_rows(load_hub(*found.groups()), limit, seed)


# --- files

Record = Callable[[], PlacedRow]
Kind = TypeVar("Kind", Text, Table)


def _read_files(
    files: Sequence[Path], limit: int | None, seed: int, max_length: int | None
) -> list[PlacedRow]:
    """The rows of files of one kind, one after the other."""
    kind = kind_of(files[0])
    if kind == ".txt":
        texts = [_opened(path, Text) for path in files]
        if limit is not None:
            length = block_length(sum(text.size for text in texts), limit, max_length)
            for text in texts:
                text.divide(length)
        if limit is None or sum(map(len, texts)) <= limit:
            return _each(texts, lambda text: text.whole())
        return _taken(texts, limit, seed)
    if kind in {".parquet", ".arrow"}:
        return _taken([_opened(path, Table) for path in files], limit, seed)
    records: Iterable[Record] = itertools.chain.from_iterable(map(_records, files))
    if limit is not None:
        records = [record for _, record in draw_from(records, limit, seed)]
    return [record() for record in records]


def _opened(path: Path, kind: type[Kind]) -> Kind:
    with reading(path):
        check_head(path)
        return kind(path)


def _each(readers: Sequence[Kind], take: Callable[[Kind], list[PlacedRow]]) -> list[PlacedRow]:
    rows: list[PlacedRow] = []
    for reader in readers:
        with reading(reader.path):
            rows += take(reader)
    return rows


def _taken(readers: Sequence[Kind], limit: int | None, seed: int) -> list[PlacedRow]:
    """A draw from files that know how many rows they hold, as if they were one."""
    starts = [0, *itertools.accumulate(map(len, readers))]
    places = draw(starts[-1], limit, seed)
    begin = dict(zip((reader.path for reader in readers), starts, strict=False))
    return _each(
        readers,
        lambda reader: reader.take(
            [p - at for p in places if (at := begin[reader.path]) <= p < at + len(reader)]
        ),
    )


def _records(path: Path) -> Iterator[Record]:
    """What makes the rows of a file, one after the other."""
    kind = kind_of(path)
    with reading(path):
        check_head(path)
        if kind in {".csv", ".tsv"}:
            found = csv_records(path, kind == ".tsv")
        else:
            found = (line_records if kind == ".jsonl" else json_records)(path)
        for record in found:
            yield partial(_row, path, record)


def _row(path: Path, record: Record) -> PlacedRow:
    with reading(path):
        return record()


# --- data sets


def load_hub(repository: str, config: str | None, split: str | None) -> Any:
    """A `datasets.Dataset` of the hub, or of the cache if it is there.

    Raises:
        SourceError: it cannot be reached, does not exist, or has several splits or configurations.
    """
    datasets = load("datasets", "a data set of the hub")
    try:
        found = datasets.load_dataset(repository, config, split=split)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        several = "Config name is missing" in reason
        raise SourceError(
            f"the data set {repository} has several configurations"
            if several
            else f"there is no file or folder {repository}, and no data set of that name can be "
            "read",
            got=f"{type(error).__name__}: {reason[:200]}",
            allowed="a path, or a data set of the hub as owner/name, owner/name:split or "
            "owner/name/config:split",
            fix=f"name one: {repository}/CONFIG:train"
            if several
            else "check the path; for the hub, the name and the connection (HF_HUB_OFFLINE=1 "
            "reads only what is cached)",
        ) from error
    if not isinstance(found, dict):
        return found
    if len(found) == 1:
        return next(iter(found.values()))
    name = f"{repository}/{config}" if config else repository
    raise _several(f"the data set {name} has several splits", list(found), f"{name}:")


def _several(what: str, splits: Sequence[str], where: str) -> SourceError:
    first = "train" if "train" in splits else next(iter(splits), "SPLIT")
    return SourceError(
        what, got=", ".join(splits), allowed="one split", fix=f"pick a split: {where}{first}"
    )


def _saved(folder: Path) -> Any:
    """A folder that `datasets.Dataset.save_to_disk` has written; it is mapped, not copied."""
    datasets = load("datasets", "a saved data set")
    try:
        return datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SourceError(
            f"the data set in {folder} cannot be read",
            got=f"{type(error).__name__}: {' '.join(str(error).split())[:160]}",
            allowed="a folder that Dataset.save_to_disk has written",
            fix="save it again",
        ) from error


def _no_such(source: str | Path, reason: str | None = None) -> SourceError:
    text = str(source)
    named = _ON_HUB.match(text)
    prose = len(text) > 255 or "\n" in text or text.count(" ") > 3
    what, fix = "no such source", "check the path and the suffix"
    if text == "self":
        what = "text of the model's own is no file"
        fix = "leave the source out where the model's own text is the default; see --help"
    elif "://" in text:
        what = "a source on the network is not read"
        fix = "download it first, and give the path of the file"
        if named:
            fix = f"give the data set's name: {named[1]}"
        elif text.startswith(("http://", "https://")):
            fix = f"download it first: curl -LO {text}"
    elif _BARE.fullmatch(text):
        fix = f"check the path; for a data set of the hub give its owner too: OWNER/{text}"
    elif all(os.path.isfile(part.strip()) for part in text.split(",")):
        fix = "give one folder or a pattern, such as data/*.jsonl, or join the files"
    elif prose:
        fix = "if this is the text itself, give [text]"
    return SourceError(
        what,
        got=f"{text[:80]!r}{'...' if len(text) > 80 else ''}" + (f": {reason}" if reason else ""),
        allowed=f"a file: {KINDS}; a folder of them; a data set of the hub as owner/name",
        fix=fix,
    )
