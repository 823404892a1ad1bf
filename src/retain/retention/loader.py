"""Rows of a trainer's or a loop's data, as the collator gives them.

A row may hold several documents end to end (TRL's ``padding_free`` and ``packing``, a
``DataCollatorWithFlattening``), which the trainer keeps apart: each is read as a row of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, islice, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from retain.data.batches import Example
from retain.data.draws import same_random, sample

__all__ = [
    "RowReader",
    "begins_anew",
    "is_readable",
    "loader_examples",
    "loader_items",
    "reader_of",
]

RowReader = Callable[[int, int], Sequence[Example]]
"""(count, seed) -> so many rows of the training data, drawn by the seed."""

SEARCHED = 16
"""Rows that are looked at for each that is wanted."""

SIDES = ("chosen_", "rejected_")
"""How the names of a pair's two answers begin, each with its prompt, in TRL's ORPO and CPO."""


def is_readable(loader: Any) -> bool:
    """Whether rows can be read by a loader: one of a user's own may have batches alone."""
    return hasattr(loader, "dataset") and hasattr(loader, "collate_fn")


def loader_examples(loader: Any, count: int, seed: int, causal: bool) -> list[Example]:
    """Rows of the training data, as the collator gives them, drawn without its sampler.

    Of `SEARCHED` times as many, at most: those without tokens are left out. Where rows are packed,
    the documents are drawn from those of `count` rows, for a packed row's are of like lengths.
    """
    found: list[list[Example]] = []
    with same_random():
        for item in islice(loader_items(loader, seed), SEARCHED * count):
            found += _rows(loader.collate_fn([item]), causal)
            if len(found) >= count:
                break
    return sample(list(chain.from_iterable(found[:count])), count, seed)


def loader_items(loader: Any, seed: int) -> Iterator[Any]:
    """The items of a loader's data set, in an order of the seed's; of a stream, in its own."""
    data = _data(loader)
    if _is_stream(data):
        return iter(data)
    random = torch.Generator().manual_seed(seed)
    return (data[i] for i in torch.randperm(len(data), generator=random).tolist())


def begins_anew(loader: Any, first: Any, causal: bool) -> bool:
    """Whether what is read of a loader's data set is there again for the training.

    A stream is begun once more, to see whether it gives the same row: one around a generator, say,
    goes on where it was left.

    Args:
        loader: the trainer's `DataLoader`.
        first: the first row that `loader_items` gave when it was read before.
        causal: whether the rows are a causal model's.
    """
    data = _data(loader)
    if not _is_stream(data):
        return True
    with same_random():
        begun = iter(data)
        again = [] if begun is data else list(islice(begun, 1))
    both = []
    for item in (first, *again):  # a collator that draws draws the same
        with same_random():
            both.append(_rows(loader.collate_fn([item]), causal))
    return len(both) == 2 and both[0] == both[1]


def _data(loader: Any) -> Any:
    data = loader.dataset
    while isinstance(data, IterableDataset) and hasattr(data, "dataset"):
        data = data.dataset  # one process's share of a stream: all are to read the same rows
    return data


def _is_stream(data: Any) -> bool:
    sized = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    return isinstance(data, IterableDataset) or not sized  # a stream may have both methods


def _rows(batch: Any, causal: bool) -> list[list[Example]]:
    """What a collator made of one row: a sequence, or several, as of a pair of answers; of each the
    documents in it.
    """
    if not isinstance(batch, Mapping):
        return []
    if not batch.keys() & {"batch", "input_ids"}:
        return [row for side in _sides(batch) for row in _rows(side, causal)]
    ours = batch.get("batch")  # of this package's own trainer
    inputs = batch if ours is None else ours.inputs
    ids = torch.atleast_2d(inputs["input_ids"])
    mask, labels = inputs.get("attention_mask"), inputs.get("labels")
    answer = inputs.get("completion_mask")  # of TRL's DPO, KTO and TPO, in place of labels
    pairs = _pairs(mask, ids)
    if pairs is not None:
        mask = pairs.diagonal(dim1=1, dim2=2)
    elif mask is None or mask.numel() != ids.numel():
        mask = torch.ones_like(ids)
    counts = torch.ones_like(ids)
    if ours is not None and causal:
        counts = ours.predict
    elif labels is not None and causal:
        counts = labels != -100
    elif answer is not None and causal and answer.numel() == ids.numel():
        counts = answer
    types = inputs.get("token_type_ids")
    if types is None or types.numel() != ids.numel():
        types = torch.zeros_like(ids)
    found = []
    for tokens, keep, predicts, begins, kinds in zip(
        ids, mask.reshape(ids.shape).bool(), counts.reshape(ids.shape).bool(),
        _begins(inputs, ids, pairs), types.reshape(ids.shape), strict=True,
    ):  # fmt: skip
        kept, predict = tuple(tokens[keep].tolist()), tuple(predicts[keep].tolist())
        if not causal:
            segments = tuple(kinds[keep].tolist())
            examples = [Example(kept, (0,), (), segments if any(segments) else ())]
        elif ours is not None:
            examples = [Example(kept, (0,) * len(kept), predict)]
        else:
            examples = _documents(kept, predict, begins[keep].nonzero().flatten().tolist())
        found.append([example for example in examples if example.tokens])
    return [examples for examples in found if examples]


def _sides(batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A batch for each answer of a pair. One without labels is left out: it lacks its prompt."""
    return [
        {key.removeprefix(side): value for key, value in batch.items() if key.startswith(side)}
        for side in SIDES
        if {f"{side}input_ids", f"{side}labels"} <= batch.keys()
    ]


def _begins(inputs: Mapping[str, Any], ids: Tensor, pairs: Tensor | None) -> Tensor:
    """Where in a row another document begins, [rows, seq]; False at a row's own beginning.

    By the rule of transformers, which keeps them apart: without a mask ``position_ids`` that do not
    count on (`transformers.masking_utils.find_packed_sequence_indices`), or the ends that its flash
    attention is given. A mask that numbers the documents tells them too, and one of `pairs`.
    """
    begins = torch.zeros_like(ids, dtype=torch.bool)
    places, ends = inputs.get("position_ids"), inputs.get("cu_seq_lens_q")
    mask = inputs.get("attention_mask")
    if pairs is not None:
        begins[:, 1:] = ~pairs.diagonal(-1, dim1=1, dim2=2)
    elif mask is not None and mask.shape == ids.shape:
        begins[:, 1:] = (mask.diff() != 0) & (mask[:, 1:] > 1)
    elif mask is None and places is not None and places.shape == ids.shape:
        begins[:, 1:] = places.diff() != 1
    elif ends is not None and len(ids) == 1:
        begins[0, ends[1:-1].long()] = True
    return begins


def _pairs(mask: Tensor | None, ids: Tensor) -> Tensor | None:
    """Which position may read which, [rows, seq, seq] of bool, by a mask [rows, 1, seq, seq] as
    transformers takes it: of bool, or added to attention's logits (LLaMA-Factory's
    ``neat_packing``). None of another mask.
    """
    if mask is None or mask.ndim != 4 or mask[:, 0].shape != (*ids.shape, ids.shape[1]):
        return None
    return mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] >= 0


def _documents(tokens: tuple[int, ...], predict: tuple[bool, ...], at: list[int]) -> list[Example]:
    """The documents of a row, which begin `at`; of several, those in which something is learned:
    others are padding.
    """
    found = [
        Example(tokens[a : b - 1], tokens[a + 1 : b], predict[a + 1 : b])
        for a, b in pairwise([0, *(place for place in at if place), len(tokens)])
    ]
    return found if len(found) == 1 else [each for each in found if any(each.predict)]


def reader_of(examples: Sequence[Example]) -> RowReader:
    """Reads tokenised rows as a trainer's data are read: those with tokens, in a drawn order."""

    def read(count: int, seed: int) -> list[Example]:
        random = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(examples), generator=random).tolist()
        return [examples[i] for i in order if examples[i].tokens][:count]

    return read
