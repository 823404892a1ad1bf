"""The loss of a batch: what a task's own outputs say to its targets, summed over predictions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from retain.data.batches import Batch, Example

__all__ = ["Head", "head_of", "task_loss"]

Head = tuple[int, int, bool]
"""(start, stop, regression): the columns of a classifier that answer a row, and how."""


def head_of(example: Example, columns: slice | None, regression: bool) -> Head | None:
    """The head that answers a row: its own, where it is of an earlier task (replay).

    None is the whole output, for a decoder or a classifier of one task.
    """
    span = getattr(example, "columns", None)
    if span is not None:
        return (*span, span[1] - span[0] == 1)
    if columns is None:
        return (0, 1, True) if regression else None
    return (columns.start, columns.stop, regression)


def task_loss(logits: Tensor, batch: Batch, heads: Sequence[Head | None]) -> Tensor:
    """The summed loss in nats (cross-entropy), or of squared errors (regression), a scalar.

    Args:
        logits: [predictions, classes].
        batch: its targets are local to each row's columns.
        heads: one for each row.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    kinds = dict.fromkeys(heads)
    if len(kinds) == 1 or batch.predict is not None:
        return _of_head(wide, batch.targets, heads[0])
    total = wide.new_zeros(())
    for kind in kinds:
        rows = torch.tensor([h == kind for h in heads], device=wide.device)
        total = total + _of_head(wide[rows], batch.targets[rows], kind)
    return total


def _of_head(logits: Tensor, targets: Tensor, head: Head | None) -> Tensor:
    if head is None:
        return functional.cross_entropy(logits, targets, reduction="sum")
    start, stop, regression = head
    if regression:
        return (logits[:, start] - targets.to(logits.dtype)).square().sum()
    return functional.cross_entropy(logits[:, start:stop], targets.long(), reduction="sum")
