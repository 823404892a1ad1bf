"""What a method keeps: rows of earlier tasks and curvatures, as tensors of its state."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from retain.curvature.artifact import load_curvature
from retain.curvature.curvature import Curvature
from retain.data.batches import Example

__all__ = [
    "StoredRow", "choose", "pack_curvature", "pack_rows", "unpack_curvature", "unpack_rows",
]  # fmt: skip


@dataclass(frozen=True)
class StoredRow(Example):
    """A row of an earlier task.

    Attributes:
        columns: (start, stop) of the outputs of a classifier that answer it; None for a decoder.
    """

    columns: tuple[int, int] | None = None

    @classmethod
    def of(cls, example: Example, columns: slice | None) -> StoredRow:
        """A row with the columns of its own task."""
        span = None if columns is None else (columns.start, columns.stop)
        return cls(**{f.name: getattr(example, f.name) for f in fields(Example)}, columns=span)


def choose(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    """So many of the rows (all, where there are fewer), drawn from `seed`, in their order.

    The global random state is left as it was.
    """
    random = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(examples), generator=random)[:count].sort().values
    return [examples[i] for i in order.tolist()]


def pack_rows(rows: Sequence[StoredRow]) -> dict[str, Tensor]:
    """Rows as tensors: all rows' numbers one after the other, and how many each has."""

    def lengths(name: str) -> list[int]:
        return [len(getattr(row, name)) for row in rows]

    def joined(name: str, dtype: torch.dtype) -> Tensor:
        return torch.tensor([x for row in rows for x in getattr(row, name)], dtype=dtype)

    names = ("tokens", "targets", "predict", "segments")
    spans = [row.columns if row.columns is not None else (-1, -1) for row in rows]
    return {
        "tokens": joined("tokens", torch.int32),
        "targets": joined("targets", torch.float64),  # a regression's are no whole numbers
        "predict": joined("predict", torch.bool),
        "segments": joined("segments", torch.uint8),
        "lengths": torch.tensor([lengths(name) for name in names], dtype=torch.int32),
        "columns": torch.tensor(spans, dtype=torch.int32).reshape(-1, 2),
    }


def unpack_rows(state: dict[str, Tensor]) -> list[StoredRow]:
    """The rows of `pack_rows`."""
    pieces = [
        state[name].split(counts.tolist())
        for name, counts in zip(
            ("tokens", "targets", "predict", "segments"), state["lengths"], strict=True
        )
    ]
    rows = []
    for tokens, targets, predict, segments, span in zip(*pieces, state["columns"], strict=True):
        start, stop = span.tolist()
        real = stop - start == 1
        rows.append(
            StoredRow(
                tuple(tokens.tolist()),
                tuple(int(t) if not real and t.is_integer() else t for t in targets.tolist()),
                tuple(predict.tolist()),
                tuple(segments.tolist()),
                None if start < 0 else (start, stop),
            )
        )
    return rows


def pack_curvature(curvature: Curvature) -> Tensor:
    """The bytes of a curvature's file as a tensor."""
    with tempfile.TemporaryDirectory() as folder:
        path = curvature.save(Path(folder) / "curvature.safetensors")
        return torch.from_numpy(np.fromfile(path, dtype=np.uint8))


def unpack_curvature(data: Tensor) -> Curvature:
    """The curvature of `pack_curvature`.

    Raises:
        ArtifactError: it is damaged.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "curvature.safetensors"
        data.cpu().numpy().tofile(path)
        return load_curvature(path)
