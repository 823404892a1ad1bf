"""Rows that are tokenised already, as SFTTrainer, Trainer or `datasets.map` have left them.

``attention_mask`` says which tokens are padding, on the left or on the right: they are no text.
``labels`` of -100 are not learned, nor is what ``completion_mask`` and ``assistant_masks`` omit.
Packed rows (``seq_lengths``, or ``position_ids`` that begin again) are several texts.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from operator import index
from typing import Any

from retain.data.messages import absent
from retain.errors import SourceError

__all__ = ["ready_causal", "ready_classified"]

_MASKS = ("completion_mask", "assistant_masks")


def ready_causal(cells: Mapping[str, Any], loss: str) -> list[tuple[list[int], list[bool]]]:
    """The tokens of each of a row's texts, and which of them are learned; whole, at any length.

    Args:
        cells: the row's columns.
        loss: "assistant" learns what ``completion_mask`` and ``assistant_masks`` say, "all" each
            token whose label is not -100.

    Raises:
        SourceError: a column that does not fit the row, or is not of whole numbers.
    """
    ids = _numbers(cells, "input_ids")
    learned = [True] * len(ids)
    if not absent(cells.get("labels")):
        labels = _aligned(cells, "labels", len(ids))
        for place, (label, token) in enumerate(zip(labels, ids, strict=True)):
            learned[place] = label != -100
            if label not in (-100, token):
                raise SourceError(
                    "labels are not the row's own tokens",
                    got=f"label {label} at token {token}, position {place + 1}",
                    allowed="each label its token or -100; the model shifts them itself",
                    fix="write labels as a copy of input_ids, with -100 where nothing is learned",
                )
    elif loss == "assistant":
        for name in _MASKS:
            if not absent(cells.get(name)):
                mask = _binary(cells, name, len(ids))
                learned = [a and bool(b) for a, b in zip(learned, mask, strict=True)]
    if any(_segments(cells, len(ids))):
        raise SourceError(
            "token types are no input of a model that continues text",
            got="token_type_ids that are not all 0",
            allowed="0 throughout, or a classifier",
            fix="take token_type_ids out",
        )
    kept = _kept(cells, len(ids))
    return [(ids[start:stop], learned[start:stop]) for start, stop in _texts(cells, kept)]


def ready_classified(cells: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """A classifier's row without its padding: tokens, and token types where they are not all 0.

    Raises:
        SourceError: as `ready_causal`.
    """
    ids = _numbers(cells, "input_ids")
    kept = _kept(cells, len(ids))
    segments = _segments(cells, len(ids))[kept]
    return ids[kept], segments if any(segments) else []


def _numbers(cells: Mapping[str, Any], name: str) -> list[int]:
    """A column of whole numbers.

    Raises:
        SourceError: it is none.
    """
    values = cells[name]
    if not isinstance(values, list | tuple):
        raise _no_numbers(name, f"{type(values).__name__}: {values!r:.40}")
    found = []
    for place, value in enumerate(values, start=1):
        try:
            if isinstance(value, bool) and name not in (*_MASKS, "attention_mask"):
                raise TypeError
            number = index(value)
        except TypeError:
            raise _no_numbers(name, f"{value!r:.40} at position {place}") from None
        if number < 0 and name != "labels":
            raise _no_numbers(name, f"{number} at position {place}")
        found.append(number)
    return found


def _no_numbers(name: str, got: str) -> SourceError:
    return SourceError(
        f"{name} is no list of whole numbers",
        got=got,
        allowed="one list of whole numbers from 0"
        + (", and -100" if name == "labels" else "")
        + " a row",
        fix="give the lists that the tokenizer returns, without return_tensors",
    )


def _aligned(cells: Mapping[str, Any], name: str, size: int) -> list[int]:
    found = _numbers(cells, name)
    if len(found) != size:
        raise SourceError(
            f"{name} is of another length than input_ids",
            got=f"{len(found)} and {size}",
            allowed="one entry a token",
            fix="tokenise the rows again, all columns in one call",
        )
    return found


def _binary(cells: Mapping[str, Any], name: str, size: int) -> list[int]:
    found = _aligned(cells, name, size)
    odd = next((v for v in found if v not in (0, 1)), None)
    if odd is not None:
        raise SourceError(f"{name} is no mask", got=odd, allowed="0 and 1", fix=f"repair {name}")
    return found


def _segments(cells: Mapping[str, Any], size: int) -> list[int]:
    if absent(cells.get("token_type_ids")):
        return []
    return _aligned(cells, "token_type_ids", size)


def _kept(cells: Mapping[str, Any], size: int) -> slice:
    """Where a row is no padding.

    Raises:
        SourceError: the mask has holes.
    """
    if absent(cells.get("attention_mask")):
        return slice(0, size)
    mask = _binary(cells, "attention_mask", size)
    first = next((i for i, m in enumerate(mask) if m), size)
    last = next((i for i in range(size, first, -1) if mask[i - 1]), first)
    if not all(mask[first:last]):
        raise SourceError(
            "attention_mask has holes",
            got=f"0 at position {first + mask[first:last].index(0) + 1}, between tokens",
            allowed="padding on the left or on the right",
            fix="take the masked tokens out of the row",
        )
    return slice(first, last)


def _texts(cells: Mapping[str, Any], kept: slice) -> list[tuple[int, int]]:
    """(start, stop) of each text of a row: one, but for packed rows.

    Raises:
        SourceError: lengths that do not add up, or positions that do not count up.
    """
    size = kept.stop - kept.start
    starts = [0]
    if not absent(cells.get("seq_lengths")):
        lengths = _numbers(cells, "seq_lengths")
        if sum(lengths) != size:
            raise SourceError(
                "seq_lengths do not add up to the row",
                got=f"{sum(lengths)} of {size} tokens",
                allowed="the lengths of the texts that are packed into the row",
                fix="pack the rows again",
            )
        starts = [sum(lengths[:i]) for i in range(len(lengths))]
    if not absent(cells.get("position_ids")):
        places = _numbers(cells, "position_ids")[kept]
        if absent(cells.get("seq_lengths")):
            starts = [i for i, place in enumerate(places) if place == 0]
        wanted = [i for a, b in pairwise([*starts, size]) for i in range(b - a)]
        if len(places) != size or wanted != places:
            raise SourceError(
                "position_ids do not count up",
                got=f"{places[:8]}",
                allowed="0, 1, 2 and so on; from 0 again for each text of a packed row",
                fix="take position_ids out",
            )
    stops = [*starts[1:], size]
    return [(kept.start + a, kept.start + b) for a, b in zip(starts, stops, strict=True)]
