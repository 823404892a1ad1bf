"""Rows that are tokenised already, as SFTTrainer, Trainer or `datasets.map` have left them.

``attention_mask`` says which tokens are padding, on the left or on the right: they are no text.
``labels`` of -100 are not learned, nor is what ``completion_mask`` and ``assistant_masks`` omit.
Packed rows (``seq_lengths``, or ``position_ids`` that begin again) are several texts.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from operator import index

from retain.data.messages import absent
from retain.data.rows import Row
from retain.errors import SourceError

__all__ = ["tokenised_causal", "tokenised_classified"]

_MASKS = ("completion_mask", "assistant_masks")


def tokenised_causal(cells: Row, loss: str) -> list[tuple[list[int], list[bool]]]:
    """The tokens of each of a row's texts, and which of them are learned; whole, at any length.

    Args:
        cells: the row's columns.
        loss: "assistant" learns what ``completion_mask`` and ``assistant_masks`` say, "all" each
            token whose label is not -100.

    Raises:
        SourceError: a column that does not fit the row, or is not of whole numbers.
    """
    ids = _numbers(cells, "input_ids") or []
    labels = _aligned(cells, "labels", len(ids))
    learned = [True] * len(ids) if labels is None else [label != -100 for label in labels]
    for place, (label, token) in enumerate(zip(labels or [], ids, strict=False), start=1):
        if label not in (-100, token):
            raise SourceError(
                "labels are not the row's own tokens",
                got=f"label {label} at token {token}, position {place}",
                allowed="each label its token or -100; the model shifts them itself",
                fix="write labels as a copy of input_ids, with -100 where nothing is learned",
            )
    if labels is None and loss == "assistant":
        for name in _MASKS:
            mask = _aligned(cells, name, len(ids))
            learned = [a and bool(b) for a, b in zip(learned, mask or learned, strict=True)]
    if any(_aligned(cells, "token_type_ids", len(ids)) or []):
        raise SourceError(
            "token types are no input of a model that continues text",
            got="token_type_ids that are not all 0",
            allowed="0 throughout, or a classifier",
            fix="take token_type_ids out",
        )
    bounds = _bounds(cells, _text(cells, len(ids)))
    return [(ids[start:stop], learned[start:stop]) for start, stop in pairwise(bounds)]


def tokenised_classified(cells: Row) -> tuple[list[int], list[int]]:
    """A classifier's row without its padding: tokens, and token types where they are not all 0.

    Raises:
        SourceError: as `tokenised_causal`.
    """
    ids = _numbers(cells, "input_ids") or []
    text = _text(cells, len(ids))
    segments = (_aligned(cells, "token_type_ids", len(ids)) or [])[text]
    return ids[text], segments if any(segments) else []


def _numbers(cells: Row, name: str) -> list[int] | None:
    """A column of whole numbers, None where there is none; `SourceError` for anything else."""
    values, got = cells.get(name), ""
    if absent(values):
        return None
    found: list[int] = []
    if not isinstance(values, list | tuple):
        values, got = [], f"{type(values).__name__}: {values!r:.40}"
    for place, value in enumerate(values, start=1):
        try:
            if isinstance(value, bool) and name not in (*_MASKS, "attention_mask"):
                raise TypeError
            found.append(index(value))
            if found[-1] < 0 and name != "labels":
                raise TypeError
        except TypeError:
            got = f"{value!r:.40} at position {place}"
            break
    if got:
        minus = ", and -100" if name == "labels" else ""
        raise SourceError(
            f"{name} is no list of whole numbers",
            got=got,
            allowed=f"one list of whole numbers from 0{minus} a row",
            fix="give the lists that the tokenizer returns, without return_tensors",
        )
    return found


def _aligned(cells: Row, name: str, size: int) -> list[int] | None:
    """A column with a number for each token; of 0 and 1, if it is a mask."""
    found = _numbers(cells, name)
    if found is not None and len(found) != size:
        raise SourceError(
            f"{name} is of another length than input_ids",
            got=f"{len(found)} and {size}",
            allowed="one entry a token",
            fix="tokenise the rows again, all columns in one call",
        )
    if "mask" in name and found is not None and not set(found) <= {0, 1}:
        odd = next(v for v in found if v not in (0, 1))
        raise SourceError(f"{name} is no mask", got=odd, allowed="0 and 1", fix=f"repair {name}")
    return found


def _text(cells: Row, size: int) -> slice:
    """Where a row is no padding; `SourceError` for a mask with holes."""
    mask = _aligned(cells, "attention_mask", size)
    if mask is None:
        return slice(0, size)
    first = mask.index(1) if 1 in mask else size
    last = size - mask[::-1].index(1) if 1 in mask else size
    if 0 in mask[first:last]:
        raise SourceError(
            "attention_mask has holes",
            got=f"0 at position {mask.index(0, first) + 1}, between tokens",
            allowed="padding on the left or on the right",
            fix="take the masked tokens out of the row",
        )
    return slice(first, last)


def _bounds(cells: Row, text: slice) -> list[int]:
    """Where each text of a row begins, and where the last ends: one text, but for packed rows.

    Raises:
        SourceError: lengths that do not add up, or positions that do not count up.
    """
    size = text.stop - text.start
    lengths, places = _numbers(cells, "seq_lengths"), _numbers(cells, "position_ids")
    bounds = [0, size] if lengths is None else [0, *accumulate(lengths)]
    if bounds[-1] != size:
        raise SourceError(
            "seq_lengths do not add up to the row",
            got=f"{bounds[-1]} of {size} tokens",
            allowed="the lengths of the texts that are packed into the row",
            fix="pack the rows again",
        )
    if places is not None:
        places = places[text]
        if lengths is None:
            bounds = [*(i for i, place in enumerate(places) if place == 0), size]
        if places != [i for a, b in pairwise(bounds) for i in range(b - a)]:
            raise SourceError(
                "position_ids do not count up",
                got=f"{places[:8]}",
                allowed="0, 1, 2 and so on; from 0 again for each text of a packed row",
                fix="take position_ids out",
            )
    return [text.start + bound for bound in bounds]
