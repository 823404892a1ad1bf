"""Rows of a trainer's data, as its collator gives them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from retain.data.batches import Example
from retain.models.heads import check_labels, head_kind, several_labels
from retain.models.names import inner_model
from retain.models.sizes import check_length, check_sizes
from retain.training.stored import IGNORED, check_rows, no_class

__all__ = ["check_loader", "loader_examples"]

SEARCHED = 16
"""Rows that are looked at for each that is wanted."""

CHECKED = 8
"""Rows of a batch that is looked at, where a trainer's loader does not say how many it has."""


def loader_examples(loader: Any, count: int, seed: int, causal: bool) -> list[Example]:
    """Rows of the training data, as the collator gives them, drawn without its sampler.

    Of `SEARCHED` times as many, at most: those without tokens are left out.
    """
    found: list[Example] = []
    with torch.random.fork_rng():
        for item in islice(_items(loader, seed), SEARCHED * count):
            found += _examples(loader.collate_fn([item]), causal)
            if len(found) >= count:
                break
    return found[:count]


def check_loader(model: nn.Module, loader: Any, seed: int) -> None:
    """Looks at a trainer's data, before the first step, for what could not be learned or held.

    Of rows that lie there as tokens, all are looked at; of any others one batch. Labels that are
    lists, or floating-point numbers for several classes, are those of a head of several labels:
    transformers finds that out at its first loss, and no earlier.

    Args:
        model: that is trained.
        loader: the trainer's `DataLoader`, whose data set and collator are used.
        seed: of the choice of rows.

    Raises:
        ModelError: a head that is not known, or one of several labels.
        SourceError: a token, a length or a label that the model's tables have no place for.
    """
    kind = head_kind(model)
    check_rows(model, loader)
    with torch.random.fork_rng():
        size = getattr(loader, "batch_size", None) or CHECKED
        rows = list(islice(_items(loader, seed), size))
        batch = loader.collate_fn(rows) if rows else None
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        return  # this package's own trainer has checked its rows
    causal, places = kind == "causal", batch.get("position_ids")
    examples = [
        Example(row, row if causal else (0,), (True,) * len(row) if causal else ())
        for row in map(tuple, torch.atleast_2d(batch["input_ids"]).tolist())
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
        raise several_labels(got) if labels.dim() > 1 else no_class(got)
    check_labels(
        model, (None if row.dim() == 0 and row == IGNORED else row for row in labels), "batch row"
    )


def _items(loader: Any, seed: int) -> Iterator[Any]:
    """The items of a loader's data set, in an order of the seed's; of a stream, in its own."""
    data: Any = loader.dataset
    while isinstance(data, IterableDataset) and hasattr(data, "dataset"):
        data = data.dataset  # one process's share of a stream: all are to read the same rows
    stream = isinstance(data, IterableDataset)  # it may have both methods all the same
    if stream or not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        return iter(data)
    random = torch.Generator().manual_seed(seed)
    return (data[i] for i in torch.randperm(len(data), generator=random).tolist())


def _examples(batch: Any, causal: bool) -> list[Example]:
    """What a collator made of one row: a sequence, or several, as of a pair of answers."""
    if not isinstance(batch, Mapping) or not batch.keys() & {"batch", "input_ids"}:
        return []
    ours = batch.get("batch")  # of this package's own trainer
    inputs = batch if ours is None else ours.inputs
    ids = torch.atleast_2d(inputs["input_ids"])
    mask, labels = inputs.get("attention_mask"), inputs.get("labels")
    if mask is None or mask.numel() != ids.numel():
        mask = torch.ones_like(ids)
    counts = torch.ones_like(ids)
    if ours is not None and causal:
        counts = ours.predict
    elif labels is not None and causal:
        counts = labels != -100
    found = []
    for tokens, keep, predicts in zip(
        ids, mask.reshape(ids.shape).bool(), counts.reshape(ids.shape).bool(), strict=True
    ):
        kept, predict = tuple(tokens[keep].tolist()), tuple(predicts[keep].tolist())
        if not causal:
            found.append(Example(kept, (0,)))
        elif ours is not None:
            found.append(Example(kept, (0,) * len(kept), predict))
        else:
            found.append(Example(kept[:-1], kept[1:], predict[1:]))
    return [example for example in found if example.tokens]
