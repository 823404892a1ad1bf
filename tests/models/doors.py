"""A trainer with the callback, as any script makes one, for rows that are to be refused."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from transformers import Trainer, TrainingArguments

import retain


def trainer(
    model: Any,
    rows: Sequence[dict[str, Any]],
    gather: Callable[[list[dict[str, Any]]], dict[str, Any]],
    held: retain.RetentionCallback,
    kind: type[Trainer] = Trainer,
    **more: Any,
) -> Trainer:
    """Two steps of 4 rows each; `gather` is the collator."""
    settings = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2} | more
    arguments = TrainingArguments(
        tempfile.mkdtemp(), report_to=[], use_cpu=True, disable_tqdm=True,
        remove_unused_columns=False, **settings,
    )  # fmt: skip
    return kind(
        model=model, args=arguments, train_dataset=list(rows),  # type: ignore[arg-type]
        data_collator=gather, callbacks=[held],
    )  # fmt: skip
