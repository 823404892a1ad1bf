"""Rows of a trainer's data, as its collator gives them."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from retain.data.batches import Example
from retain.models.heads import check_labels, head_kind, several_labels
from retain.models.names import inner_model
from retain.models.sizes import check_length, check_sizes
from retain.retention.loader import loader_items
from retain.training.stored import IGNORED, check_rows, no_class

__all__ = ["check_loader"]

CHECKED = 8
"""Rows of a batch that is looked at, where a trainer's loader does not say how many it has."""


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
        rows = list(islice(loader_items(loader, seed), size))
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
