"""Steps of several optimisers, each by its gradient scaler where it has one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["scaler_of", "step_each"]


class _Stepping:
    """A gradient scaler that steps one of several optimisers, and is updated after the last."""

    def __init__(self, scaler: Any) -> None:
        self.step = scaler.step

    def update(self) -> None:
        """Nothing yet: an update forgets whose gradients are unscaled already."""


def scaler_of(optimizer: Any, given: Any) -> tuple[Any, Any]:
    """The gradient scaler of an optimiser, and the one that it steps: accelerate's has its own."""
    own = getattr(optimizer, "scaler", None)
    return (given, optimizer) if own is None else (own, optimizer.optimizer)


def step_each(scaled: Sequence[tuple[Any, Any, Any]]) -> list[Any]:
    """Steps optimisers, each with what `scaler_of` tells of it.

    Returns:
        Those that have stepped: a gradient scaler leaves steps out. One that was given does not
        tell whose, so then none of those has.
    """
    given = next((by for each, by, known in scaled if by is not None and known is each), None)
    scale = None if given is None else given.get_scale()
    for each, by, known in scaled:
        if by is None:
            each.step()
        elif known is each:
            by.step(each)
        else:
            each.scaler = _Stepping(by)
            try:
                each.step()
            finally:
                each.scaler = by
    for by in {id(by): by for _, by, _ in scaled if by is not None}.values():
        by.update()
    left_out = given is not None and given.get_scale() < scale
    return [
        each for each, by, known in scaled
        if not (left_out if by is not None and known is each
                else getattr(each, "step_was_skipped", False))
    ]  # fmt: skip
