"""Scores of the untrained model, which runs of a study share: they are made once."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from retain.models.adapters.base import Adapter
from retain.models.heads import is_causal
from retain.provenance import hardware, versions
from retain.records import RunSpec, digest_of
from retain.study.material import TaskData
from retain.study.work import Work, read_shared

__all__ = ["read_untrained", "untrained_file"]


def untrained_file(
    run: RunSpec,
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
        run: of the study.
        work: of the study.
        adapter: attached, fresh.
        stamp: versions and commit.
        tasks: of the run, with their test rows.
    """
    settled = is_causal(adapter.model) and adapter.begins_as_base
    general = run.general and [run.general.plain(), versions("lm_eval"), str(work.data_dir)]
    parts = {
        "model": run.model,
        "dtype": run.dtype,
        "attention": run.attention,
        "adapter": run.adapter.plain(),
        "options": adapter.options,
        "tasks": [
            (definition, hashlib.sha256(repr(task.test).encode()).hexdigest(), task.max_length)
            for definition, task in zip(run.definitions, tasks, strict=True)
        ],
        "batch_size": run.evaluation.batch_size,
        "general": general,
        **({"answers": run.evaluation.answers} if run.evaluation.answers else {}),
        "seed": None if settled else run.seed,
        "code": dict(stamp),
        "machine": [hardware(), torch.get_num_threads()],
    }
    return work.out / "untrained" / f"{digest_of(parts)}.json"


def read_untrained(path: Path) -> dict[str, Any] | None:
    """What a file says, ``{"scores", "general", "seconds"}``; None where there is none."""
    found = read_shared(path)
    return found if found and {"scores", "general", "seconds"} <= set(found) else None
