"""The label of a classifier's row: a class, or the value of a regression."""

from __future__ import annotations

import math
from operator import index
from typing import Any

from retain.data.messages import native
from retain.errors import SourceError

__all__ = ["UNLABELLED", "target_of"]

UNLABELLED = -1
"""The target of a classifier's row without a label; a regression's is NaN."""

_MOST = 2**31
_NONE = (-1, -100)  # GLUE's test rows have -1, and PyTorch passes over -100


def target_of(label: Any, regression: bool | None) -> int | float:
    """A label as a target.

    Args:
        label: a number, or one written as text (as CSV files have it); None or "" for none.
        regression: whether it is a value (any finite number) or a class (a whole number from 0;
            -1 and -100 mean none). None takes whole numbers as classes and others as values.

    Raises:
        SourceError: anything else.
    """
    label = native(label)
    if label is None or (isinstance(label, str) and not label.strip()):
        return math.nan if regression else UNLABELLED
    number = _number(label)
    if number is None or not abs(number) < math.inf:
        raise _refused(label, number, regression)
    if regression:
        return float(number)
    if number in _NONE:
        return UNLABELLED
    if isinstance(number, float) and not number.is_integer():
        if regression is None:
            return number
        raise _refused(label, number, regression)
    if (number < 0 and regression is False) or abs(number) >= _MOST:
        raise _refused(label, number, regression)
    return int(number)


def _number(label: Any) -> int | float | None:
    """The number that a label is, exactly; None for what is no number."""
    if isinstance(label, bool):
        return None
    if isinstance(label, float):
        return label
    if isinstance(label, str):
        text = label.strip()
        if not text.isascii() or "_" in text:
            return None
        for kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                continue
        return None
    try:
        return index(label)
    except TypeError:
        return None


def _refused(label: Any, number: float | None, regression: bool | None) -> SourceError:
    if isinstance(label, bool):
        fix = "write false as 0 and true as 1"
    elif isinstance(label, list | tuple):
        fix = "give one label a row: rows of several labels cannot be learned here"
    elif isinstance(label, str) and number is None:
        fix = "number the classes from 0, in the order of the model's config.id2label"
    elif number is not None and abs(number) < _MOST and number % 1:
        fix = "number the classes from 0, or load the model with num_labels=1 for a regression"
    else:
        fix = "repair the label, or leave the row out"
    classes = "a whole number from 0, or -1 for none"
    allowed = {True: "a finite number", False: classes, None: f"{classes}; or a real number"}
    return SourceError(
        "a label cannot be read",
        got=f"label {label!r:.60}",
        allowed=allowed[regression],
        fix=fix,
    )
