"""Scores of the untrained model, which runs of a study share: they are made once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from retain.models.adapters.base import Adapter
from retain.models.heads import is_causal
from retain.study.material import TaskData
from retain.study.runner import Work

__all__ = ["read_untrained", "untrained_file"]


def untrained_file(
    config: Mapping[str, Any],
    work: Work,
    adapter: Adapter,
    stamp: Mapping[str, Any],
    tasks: Sequence[TaskData],
) -> Path:
    """The file for all runs whose model scores the same before training.

    Its name depends on the model, the adapter, how and on what is scored, the versions and the
    threads; on the seed only where that is in the scores already: of an encoder, whose head is
    new, and of an adapter that does not begin as the base model.

    Args:
        config: of the run.
        work: of the study.
        adapter: attached, fresh.
        stamp: versions and commit.
        tasks: of the run, with their test rows.
    """
    settled = is_causal(adapter.model) and adapter.begins_as_base
    parts = [
        {k: config[k] for k in ("model", "dtype", "attention", "adapter", "general")},
        config["evaluation"]["batch_size"],
        config["definitions"],
        adapter.options,
        None if settled else config["seed"],
        dict(stamp),
        torch.get_num_threads(),
        [(hashlib.sha256(repr(t.test).encode()).hexdigest(), t.max_length) for t in tasks],
    ]
    name = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
    return work.out / "untrained" / f"{name}.json"


def read_untrained(path: Path) -> dict[str, Any] | None:
    """What a file says, ``{"scores", "general", "seconds"}``; None where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    good = isinstance(found, dict) and {"scores", "general", "seconds"} <= set(found)
    return found if good else None
