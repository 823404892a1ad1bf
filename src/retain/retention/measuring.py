"""Curvatures of a run: measured on its rows, and as tensors of a method's state."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retain.curvature.artifact import load_curvature
from retain.curvature.curvature import Curvature
from retain.curvature.fit.fit import fit_curvature
from retain.data.batches import Example
from retain.retention.method import Context
from retain.types import Structure

__all__ = ["fit_on", "packed", "unpacked"]


def fit_on(
    context: Context, rows: Sequence[Example], structure: Structure, seed: int, **options: Any
) -> Curvature:
    """The curvature of all these rows at the model's present weights.

    Args:
        context: of the run.
        rows: tokenised.
        structure: see `retain.types.Structure`.
        seed: of label draws.
        **options: of `retain.fit_curvature`.
    """
    return fit_curvature(
        context.adapter.model,
        list(rows),
        structure,
        rows=len(rows),
        max_length=max(len(e.tokens) for e in rows) + 1,
        batch_size=min(context.batch_size, len(rows)),
        seed=seed,
        progress=context.progress,
        **options,
    )


def packed(curvature: Curvature) -> Tensor:
    """The bytes of a curvature's file as a tensor, for a method's state."""
    with tempfile.TemporaryDirectory() as folder:
        path = curvature.save(Path(folder) / "curvature.safetensors")
        return torch.from_numpy(np.fromfile(path, dtype=np.uint8))


def unpacked(data: Tensor) -> Curvature:
    """What `packed` has packed.

    Raises:
        ArtifactError: it is damaged.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "curvature.safetensors"
        data.cpu().numpy().tofile(path)
        return load_curvature(path)
