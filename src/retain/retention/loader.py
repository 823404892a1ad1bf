"""Rows of a trainer's or a loop's data, as the collator gives them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch.utils.data import IterableDataset

from retain.data.batches import Example

__all__ = ["RowReader", "loader_examples", "loader_items", "reader_of"]

RowReader = Callable[[int, int], Sequence[Example]]
"""(count, seed) -> so many rows of the training data, drawn by the seed."""

SEARCHED = 16
"""Rows that are looked at for each that is wanted."""


def loader_examples(loader: Any, count: int, seed: int, causal: bool) -> list[Example]:
    """Rows of the training data, as the collator gives them, drawn without its sampler.

    Of `SEARCHED` times as many, at most: those without tokens are left out.
    """
    found: list[Example] = []
    with torch.random.fork_rng():
        for item in islice(loader_items(loader, seed), SEARCHED * count):
            found += _examples(loader.collate_fn([item]), causal)
            if len(found) >= count:
                break
    return found[:count]


def loader_items(loader: Any, seed: int) -> Iterator[Any]:
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


def reader_of(examples: Sequence[Example]) -> RowReader:
    """Reads tokenised rows as a trainer's data are read: those with tokens, in a drawn order."""

    def read(count: int, seed: int) -> list[Example]:
        random = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(examples), generator=random).tolist()
        return [examples[i] for i in order if examples[i].tokens][:count]

    return read
