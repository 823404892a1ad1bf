"""Marks on what a training holds: the next one finds what a training that broke off has left."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from torch import nn

from retain.models.shards import shard_of

__all__ = ["Holder", "mark", "release_left", "unmark"]

_MARK = "_retain_held"
"""The attribute of an A for its `_Mark`."""


class Holder(Protocol):
    """What holds a model: a recipe."""

    def release(self) -> None:
        """Lets the model train freely."""

    def undo_idle(self) -> None:
        """Puts back what was changed before a training that has learned nothing."""


class _Mark:
    """On an A: what holds it. Of a model that is pickled or copied it does not go along."""

    def __init__(self, holder: Holder) -> None:
        self.holder = holder

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def mark(weights: Iterable[nn.Parameter], holder: Holder) -> None:
    """Says of weights that this holds them."""
    for weight in weights:
        setattr(weight, _MARK, _Mark(holder))


def unmark(weights: Iterable[nn.Parameter], holder: Holder) -> None:
    """Says so no longer; what others hold stays marked."""
    for weight in weights:
        found = getattr(weight, _MARK, None)
        if found is not None and found.holder is holder:
            delattr(weight, _MARK)


def release_left(model: nn.Module, *, resuming: bool = False) -> None:
    """Releases what a training that broke off has left on A.

    Where it has learned nothing yet, A is what it was before its filter again.

    Args:
        model: with its adapter.
        resuming: A is from a checkpoint, and is right as it is.
    """
    copies = [s.whole for s in map(shard_of, model.modules()) if s is not None]
    weights = [*model.parameters(), *copies]
    holders = [each.holder for p in weights if (each := getattr(p, _MARK, None)) is not None]
    for holder in dict.fromkeys(holders):
        holder.release()
        if not resuming:
            holder.undo_idle()
