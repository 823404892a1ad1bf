"""Scores of the untrained model, which runs of a study share: they are made once."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from retain.documents import read_json
from retain.models.adapters.base import Adapter
from retain.models.heads import is_causal
from retain.provenance import hardware, versions
from retain.study.grid import run_key
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

    Its name depends on the model, the adapter, how and on what is scored, the versions, the
    machine and the threads; on the seed only where that is in the scores already: of an encoder,
    whose head is new, and of an adapter that does not begin as the base model.

    Args:
        config: of the run.
        work: of the study.
        adapter: attached, fresh.
        stamp: versions and commit.
        tasks: of the run, with their test rows.
    """
    settled = is_causal(adapter.model) and adapter.begins_as_base
    general = config["general"] and [config["general"], versions("lm_eval"), str(work.data_dir)]
    parts = {
        **{name: config[name] for name in ("model", "dtype", "attention", "adapter")},
        "options": adapter.options,
        "tasks": [
            (definition, hashlib.sha256(repr(task.test).encode()).hexdigest(), task.max_length)
            for definition, task in zip(config["definitions"], tasks, strict=True)
        ],
        "batch_size": config["evaluation"]["batch_size"],
        "general": general,
        "seed": None if settled else config["seed"],
        "code": dict(stamp),
        "machine": [hardware(), torch.get_num_threads()],
    }
    return work.out / "untrained" / f"{run_key(parts)}.json"


def read_untrained(path: Path) -> dict[str, Any] | None:
    """What a file says, ``{"scores", "general", "seconds"}``; None where there is none."""
    try:
        found = read_json(path, sealed=True)
    except (OSError, ValueError):
        return None
    good = isinstance(found, dict) and {"scores", "general", "seconds"} <= set(found)
    return found if good else None
