"""Rows from a file, a folder of shards, a data set of the hub, or from Python."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from retain.data.draws import check_limit, draw, draw_from
from retain.data.filetypes.columns import Arrow, Parquet
from retain.data.filetypes.found import KINDS, files_of, kind_of, open_file
from retain.data.filetypes.opened import reading
from retain.data.filetypes.text import Text, block_length
from retain.data.given import given_rows
from retain.data.hub import hub_name, load_hub
from retain.data.placed import PlacedRow
from retain.errors import SourceError

__all__ = ["Row", "read_rows"]

Row = Mapping[str, Any]

_ON_HUB = re.compile(
    r"(?:hf:/|https?://(?:www\.)?(?:huggingface\.co|hf\.co))/datasets/([\w.-]+/[\w.-]+)"
    r"(?!.*/resolve/)"
)
_BARE = re.compile(r"[\w-]{1,96}")


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
            raise _several(folder)
        if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
            return given_rows(_saved(folder), limit, seed)
        files = files_of(source)
    except OSError as error:
        raise _no_such(source, error.strerror) from error
    if not files:
        named = hub_name(source)
        if named is None:
            raise _no_such(source)
        return given_rows(load_hub(*named), limit, seed)
    return read_files(files, limit, seed, max_length)


def read_files(
    files: Sequence[Path], limit: int | None, seed: int, max_length: int | None
) -> list[PlacedRow]:
    """The rows of files of one kind, one after the other; see `read_rows`."""
    kind = kind_of(files[0])
    if kind == ".txt":
        return _texts(files, limit, seed, max_length)
    if kind in {".parquet", ".arrow"}:
        return _tables(files, limit, seed)
    found: Iterable[tuple[Any, Any]] = itertools.chain.from_iterable(map(_all, files))
    if limit is not None:
        found = [pair for _, pair in draw_from(found, limit, seed)]
    rows = []
    for reader, record in found:
        with reading(reader.path):
            rows.append(reader.row(record))
    return rows


def _all(path: Path) -> Iterable[tuple[Any, Any]]:
    """The records of a file, each with the reader that makes a row of it."""
    with reading(path):
        reader: Any = open_file(path)
        for record in reader.records():
            yield reader, record


def _tables(files: Sequence[Path], limit: int | None, seed: int) -> list[PlacedRow]:
    counts = []
    for path in files:
        with reading(path):
            counts.append(len(cast(Parquet | Arrow, open_file(path))))
    places = draw(sum(counts), limit, seed)
    rows: list[PlacedRow] = []
    start = 0
    for path, count in zip(files, counts, strict=True):
        inside = [place - start for place in places if start <= place < start + count]
        start += count
        if inside:
            with reading(path):
                rows += cast(Parquet | Arrow, open_file(path)).take(inside)
    return rows


def _texts(
    files: Sequence[Path], limit: int | None, seed: int, max_length: int | None
) -> list[PlacedRow]:
    texts = []
    for path in files:
        with reading(path):
            texts.append(cast(Text, open_file(path)))
    if limit is not None:
        length = block_length(sum(text.size for text in texts), limit, max_length)
        for text in texts:
            text.divide(length)
    counts = [len(text) for text in texts]
    rows: list[PlacedRow] = []
    if limit is None or sum(counts) <= limit:
        for text in texts:
            with reading(text.path):
                whole = text.whole()
            rows += [whole] if whole is not None else []
        return rows
    places, start = draw(sum(counts), limit, seed), 0
    for text, count in zip(texts, counts, strict=True):
        inside = [place - start for place in places if start <= place < start + count]
        start += count
        if inside:
            with reading(text.path):
                rows += text.take(inside)
    return rows


def _saved(folder: Path) -> Any:
    """A folder that `datasets.Dataset.save_to_disk` has written; it is mapped, not copied."""
    import datasets

    with_reason = (OSError, ValueError, KeyError, TypeError)
    try:
        return datasets.load_from_disk(str(folder))
    except with_reason as error:
        raise SourceError(
            f"the data set in {folder} cannot be read",
            got=f"{type(error).__name__}: {' '.join(str(error).split())[:160]}",
            allowed="a folder that Dataset.save_to_disk has written",
            fix="save it again",
        ) from error


def _several(folder: Path) -> SourceError:
    splits = sorted(p.name for p in folder.iterdir() if p.is_dir())
    first = "train" if "train" in splits else next(iter(splits), "SPLIT")
    return SourceError(
        "the folder holds splits, not rows",
        got=f"{', '.join(splits)} in {folder}",
        allowed="one split",
        fix=f"pick a split: {folder / first}",
    )


def _no_such(source: str | Path, reason: str | None = None) -> SourceError:
    text = str(source)
    if text == "self":
        return SourceError(
            "text of the model's own is no file",
            got="self",
            allowed=f"a file: {KINDS}",
            fix="leave the source out where the model's own text is the default; see --help",
        )
    if "://" in text:
        named = _ON_HUB.match(text)
        web = text.startswith(("http://", "https://"))
        return SourceError(
            "a source on the network is not read",
            got=text[:80],
            allowed="a file, a folder, or a data set of the hub as owner/name",
            fix=f"give the data set's name: {named[1]}" if named
            else f"download it first: curl -LO {text}" if web
            else "download it first, and give the path of the file",
        )  # fmt: skip
    if _BARE.fullmatch(text):
        return SourceError(
            "no such source",
            got=repr(text),
            allowed=f"a file: {KINDS}; a folder of them; a data set of the hub as owner/name",
            fix=f"check the path; for a data set of the hub give its owner too: OWNER/{text}",
        )
    prose = len(text) > 255 or "\n" in text or text.count(" ") > 3
    return SourceError(
        "no such source",
        got=f"{text[:80]!r}{'...' if len(text) > 80 else ''}" + (f": {reason}" if reason else ""),
        allowed=f"a file: {KINDS}; a folder of them; a data set of the hub as owner/name; 'self' "
        "where text may be sampled",
        fix="if this is the text itself, give [text]" if prose else "check the path and the suffix",
    )
