"""Rows that are given from Python: what counts as rows, and what is said of what does not."""

from __future__ import annotations

import io
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Set
from typing import Any

from retain.data.draws import draw, draw_from
from retain.data.readers.tables import check_names
from retain.data.rows import PlacedRow, as_row
from retain.errors import RetainWarning, SourceError
from retain.extras import load

__all__ = ["STREAMED", "given_rows"]

STREAMED = 10_000
"""Rows of a stream that a draw looks at; or eight times as many as are wanted, if that is more."""

_PLAIN = frozenset({"numpy", "torch", "pandas", "arrow", "polars", "jax", "tensorflow"})
_ALLOWED = "a data set, a list of dictionaries or strings, a table, a path"


def given_rows(source: Any, limit: int | None, seed: int) -> list[PlacedRow]:
    """The rows of a data set, a list, a table or a stream; see `retain.data.sources.read_rows`.

    Raises:
        SourceError: it holds no rows, or a row is neither a mapping nor a text.
    """
    if isinstance(source, Mapping):
        raise _mapping(source)
    fix = next((fix for holds, fix in _NOT_ROWS if holds(source)), None)
    if fix is not None:
        raise SourceError("the source holds no rows", got=_named(source), allowed=_ALLOWED, fix=fix)
    saved = _is(source, "datasets", "Dataset")
    if saved and source.format["type"] in _PLAIN:
        source = source.with_format(None, columns=source.format["columns"])
    elif _is(source, "pandas", "Series"):
        source = source.tolist()
    elif _is(source, "datasets", "IterableDataset"):
        source = source.with_format(None)
    elif not saved and any(hasattr(source, f"__arrow_c_{kind}__") for kind in ("stream", "array")):
        return _table(source, limit, seed)
    if (
        hasattr(source, "__len__")
        and hasattr(source, "__getitem__")
        and not _is(source, "torch.utils.data", "IterableDataset")
    ):
        places = draw(len(source), limit, seed)
        if len(places) == len(source) and (saved or isinstance(source, list | tuple)):
            return [as_row(row, number) for number, row in enumerate(source, start=1)]
        return [as_row(source[place], place + 1) for place in places]
    try:
        stream = iter(source)
    except TypeError as error:
        raise SourceError(
            "the source holds no rows",
            got=type(source).__name__,
            allowed=_ALLOWED,
            fix="call it" if callable(source) else "give [{'text': ...}, ...]",
        ) from error
    return _streamed(stream, limit, seed)


def _table(source: Any, limit: int | None, seed: int) -> list[PlacedRow]:
    """The rows of a table of pandas, Polars, Arrow or whatever else gives itself to Arrow."""
    pyarrow = load("pyarrow", f"reading a {type(source).__name__}")
    try:
        if _is(source, "pandas", "DataFrame"):
            check_names([str(n) for n in source.columns], "the data frame", "frame.columns = [...]")
            places = draw(len(source), limit, seed)
            some = source if len(places) == len(source) else source.iloc[list(places)]
            table = pyarrow.Table.from_pandas(some, preserve_index=False)
        else:
            table = pyarrow.table(source)
            fix = "table.rename_columns([...]) in pyarrow"
            check_names(table.schema.names, "the table", fix)
            places = draw(table.num_rows, limit, seed)
            table = table if len(places) == table.num_rows else table.take(list(places))
        rows = table.to_pylist()
    except (pyarrow.ArrowException, TypeError, ValueError, KeyError) as error:
        raise SourceError(
            "the table cannot be read",
            got=f"{type(source).__name__}: {' '.join(str(error).split())[:160]}",
            allowed="columns of one type each",
            fix="give rows: frame.to_dict('records') in pandas",
        ) from error
    return [as_row(row, place + 1) for row, place in zip(rows, places, strict=True)]


def _streamed(stream: Iterator[Any], limit: int | None, seed: int) -> list[PlacedRow]:
    if limit is None:
        return [as_row(row, number) for number, row in enumerate(stream, start=1)]
    most = max(STREAMED, 8 * limit)
    found = draw_from(itertools.islice(stream, most), limit, seed)
    if next(stream, found) is not found:
        warnings.warn(
            f"the source is a stream: {limit} rows are drawn from its first {most}; shuffle it "
            "first if its order means something, or give a data set with a length",
            RetainWarning,
            stacklevel=2,
        )
    return [as_row(row, place + 1) for place, row in found]


def _is(source: object, package: str, *names: str) -> bool:
    """Whether an object is of one of some classes, without importing their package."""
    return any(
        c.__name__ in names and f"{c.__module__}.".startswith(f"{package}.")
        for c in type(source).__mro__
    )


def _mapping(source: Mapping[Any, Any]) -> SourceError:
    """What is said of a mapping: splits, columns, or one row."""
    kind, names = type(source).__name__, ", ".join(map(str, source)) or "nothing"
    values = list(source.values())
    splits = [v for v in values if _is(v, "datasets", "Dataset", "IterableDataset")]
    lists = [v for v in values if isinstance(v, list | tuple) and v and isinstance(v[0], Mapping)]
    known = source.keys() & {"train", "test", "validation"}
    if kind in {"DatasetDict", "IterableDatasetDict"} or splits or (known and lists):
        first = "train" if "train" in source else next(iter(source), "train")
        return SourceError(
            "the source is several splits",
            got=f"{kind} of {names}",
            allowed="one split",
            fix=f"pick a split: source[{first!r}]",
        )
    sizes = {
        len(v) if hasattr(v, "__len__") and not isinstance(v, str | bytes | Mapping) else None
        for v in values
    }
    columns = len(sizes) == 1 and None not in sizes
    one = "[source] if it is one row"
    return SourceError(
        f"the source is {'columns, not rows' if columns else 'one row, not a list of rows'}",
        got=f"{kind} of {names}",
        allowed="rows, one after the other",
        fix=f"datasets.Dataset.from_dict(dict(source)); {one}" if columns else one,
    )


def _named(source: Any) -> str:
    if isinstance(source, bytes | bytearray | memoryview):
        return f"{len(source)} bytes"
    return type(source).__name__


_NOT_ROWS: tuple[tuple[Callable[[Any], bool], str], ...] = (
    (lambda s: isinstance(s, bytes | bytearray | memoryview), "give its path, or [text]"),
    (lambda s: isinstance(s, Set), "a set has no order: sorted(source)"),
    (lambda s: isinstance(s, io.IOBase), "give the path of the file"),
    (lambda s: _is(s, "torch.utils.data", "DataLoader"), "give its rows: source.dataset"),
    (lambda s: _is(s, "transformers", "Trainer"), "give its rows: source.train_dataset"),
    (lambda s: _is(s, "torch", "Tensor") or _is(s, "numpy", "ndarray"),
     "texts: source.tolist(); tokens: [{'input_ids': ids} for ids in source.tolist()]"),
    (lambda s: _is(s, "polars", "LazyFrame"), "source.collect()"),
    (lambda s: _is(s, "pyarrow", "Array", "ChunkedArray"), "texts: source.to_pylist()"),
    (lambda s: _is(s, "polars", "Series"), "texts: source.to_list()"),
    (lambda s: isinstance(s, type), "make one: source(...)"),
    (lambda s: type(s).__name__ == "Example", "[source]"),
)  # fmt: skip
