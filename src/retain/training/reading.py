"""Rows of a trainer's data: as its collator gives them, and where they lie there as tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from retain.data.batches import Example
from retain.data.draws import same_random
from retain.errors import SourceError, warn
from retain.extras import classes_of
from retain.models.heads import Head, check_labels, head_kind, several_labels
from retain.models.names import inner_model
from retain.models.sizes import check_ids, check_length, check_sizes, rows_of_embedding
from retain.retention.loader import begins_anew, is_readable, loader_items

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["check_loader"]

IGNORED = -100
"""A label that transformers leaves out of the loss."""

CHECKED = 8
"""Rows of a batch that is looked at, where a trainer's loader does not say how many it has."""

AT_ONCE = 1000
"""Rows of a data set that are looked at together."""

TOKENS, LABELS = "input_ids", ("label", "labels", "label_ids")
"""Names of columns, as the collators of transformers read them."""

MORE = ("pixel_values", "input_features", "input_values")
"""How the names of a batch's images and sounds begin."""


def check_loader(model: nn.Module, loader: Any, seed: int) -> None:
    """Looks at a trainer's data, before the first step, for what could not be learned or held.

    Of rows that lie there as tokens, all are looked at; of any others one batch. Labels that are
    lists, or floating-point numbers for several classes, are those of a head of several labels:
    transformers finds that out at its first loss, and no earlier. Rows of a stream that can be read
    only once are lost to the training; a warning says so.

    Args:
        model: that is trained.
        loader: the trainer's `DataLoader`, whose data set and collator are used. Of another, that
            has none of them, nothing is looked at.
        seed: of the choice of rows.

    Raises:
        ModelError: a head that is not known, or one of several labels.
        SourceError: a token, a length or a label that the model's tables have no place for.
    """
    kind = head_kind(model)
    if not is_readable(loader):
        return
    _check_rows(model, loader)
    with same_random():
        size = getattr(loader, "batch_size", None) or CHECKED
        rows = list(islice(loader_items(loader, seed), size))
        batches = _collated(loader.collate_fn, rows)
    if rows and not begins_anew(loader, rows[0], kind == "causal"):
        warn(
            "the training data are a stream that gave other rows when it was begun again: where it "
            "can be read only once, the rows that are read before the first step (a batch, and "
            "those of the filter) are not trained on; give a data set that begins with its first "
            "row whenever it is iterated over, as datasets.IterableDataset.from_generator does"
        )
    for batch in batches:
        if isinstance(batch, Mapping) and TOKENS in batch:  # else this package's own has checked it
            _check_batch(model, kind, batch)


def _collated(collate: Callable[[list[Any]], Any], rows: list[Any]) -> list[Any]:
    """A batch of rows; or of each its own, where a collator that does not pad makes none of rows of
    several lengths, which its sampler keeps apart.
    """
    try:
        return [collate(rows)] if rows else []
    except Exception:
        return [collate([row]) for row in rows]


def _check_batch(model: nn.Module, kind: Head, batch: Mapping[str, Any]) -> None:
    more = [key for key in batch if key.startswith(MORE)]
    if more:
        raise SourceError(
            "the rows hold more than text", got=", ".join(more), allowed="rows of text alone",
            fix="leave the images and sounds out",
        )  # fmt: skip
    causal, places = kind == "causal", batch.get("position_ids")
    examples = [
        Example(row, row if causal else (0,), (True,) * len(row) if causal else ())
        for row in map(tuple, torch.atleast_2d(batch[TOKENS]).tolist())
    ]
    check_sizes(model, examples, labels=False, lengths=places is None)
    if places is not None:  # rows that are laid end to end begin again at 0
        check_length(model, [int(places.max()) + 1], "a batch", fix="shorter rows: max_length=...")
    labels = next((batch[key] for key in ("labels", "label") if key in batch), None)
    if causal or not isinstance(labels, Tensor):
        return
    problem = getattr(inner_model(model).config, "problem_type", None)
    if kind == "classes" and problem is None and labels.is_floating_point():
        got = f"labels of {str(labels.dtype).removeprefix('torch.')}"
        raise several_labels(got) if labels.dim() > 1 else _no_class(got)
    check_labels(
        model, (None if row.dim() == 0 and row == IGNORED else row for row in labels), "batch row"
    )


def _check_rows(model: nn.Module, loader: Any) -> None:
    """Refuses rows whose tokens or classes a model has no place for, before the first step.

    Else the first of them ends a training in a bare IndexError, on a GPU in a device of no use.

    Args:
        model: with a head that is known.
        loader: the trainer's `DataLoader`. Labels are looked at where one of transformers' own
            collators reads them; another may make other labels of them.

    Raises:
        SourceError: there is such a row; it is named by its number.
    """
    data, table = loader.dataset, rows_of_embedding(model)
    for number, ids in _odd(_column(data, (TOKENS,)), table):
        if isinstance(ids, list | tuple) and ids and isinstance(ids[0], int):
            check_ids(ids, table, number)
    if head_kind(model) != "classes" or not _is_plain(loader.collate_fn):
        return
    classes = int(inner_model(model).config.num_labels)
    for number, label in _odd(_column(data, LABELS), classes):
        if isinstance(label, str | bool):
            raise _no_class(f"label {label!r} in row {number}", classes)
        outside = isinstance(label, int) and not 0 <= label < classes and label != IGNORED
        if label is None or outside:
            raise SourceError(
                f"the label of row {number} has no output",
                got=f"label {label}",
                allowed=f"whole numbers from 0 to {classes - 1}; {IGNORED} leaves a row out",
                fix="count the labels from 0, leave rows without one out, "
                "or load the model with as many as num_labels",
            )


def _no_class(got: str, classes: int | None = None) -> SourceError:
    """The error for labels that are no classes."""
    return SourceError(
        "the labels of a classifier are numbers of classes",
        got=got,
        allowed="whole numbers" + (f" from 0 to {classes - 1}" if classes else ""),
        fix='data.class_encode_column("label") numbers names and values; '
        "num_labels=1 is for a regression",
    )


def _is_plain(collate: Any) -> bool:
    while hasattr(collate, "data_collator"):  # what takes unused columns away first
        collate = collate.data_collator
    return str(getattr(collate, "__module__", "")).startswith("transformers.")


def _column(data: Any, names: Sequence[str]) -> Iterator[pa.ChunkedArray] | list[Any]:
    """A column of a data set, in pieces; or of rows in a list, as it is; else nothing."""
    if isinstance(data, classes_of("datasets", "Dataset")):
        found = [n for n in names if n in data.column_names]
        pieces = data.select_columns(found[:1]).with_format("arrow").iter(AT_ONCE) if found else []
        return (piece.column(0) for piece in pieces)
    if isinstance(data, list) and all(isinstance(row, Mapping) for row in data):
        return [next((row[n] for n in names if n in row), IGNORED) for row in data]
    return []


def _odd(
    column: Iterator[pa.ChunkedArray] | list[Any], end: int | None
) -> Iterator[tuple[int, Any]]:
    """The rows, counted from 1, that may hold something else than numbers from 0 to below end.

    Data sets are looked at in pieces, without making Python's numbers of them.
    """
    if isinstance(column, list):
        values = (v.tolist() if hasattr(v, "tolist") else v for v in column)
        yield from enumerate(values, start=1)
        return
    first = 1
    for piece in column:
        if not _within(piece, end):
            yield from enumerate(piece.to_pylist(), start=first)
        first += len(piece)


def _within(piece: pa.ChunkedArray, end: int | None) -> bool:
    import pyarrow as pa
    import pyarrow.compute as pc

    nested = pa.types.is_list(piece.type) or pa.types.is_large_list(piece.type)
    values = pc.list_flatten(piece) if nested else piece
    if not pa.types.is_integer(values.type) or piece.null_count:
        return False
    span = pc.min_max(values).as_py()
    low, high = span["min"], span["max"]
    return low is None or (low >= 0 and (end is None or high < end))
