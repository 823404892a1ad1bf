"""What a method keeps: rows of earlier tasks and curvatures, as tensors of its state."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retain.curvature.curvature import Curvature, load_curvature
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


def pack_rows(rows: Sequence[StoredRow]) -> Tensor:
    """Rows as JSON, in a tensor of bytes; what counts in training of them."""
    kept = [{k: v for k, v in asdict(row).items() if k != "prompted"} for row in rows]
    text = json.dumps(kept, separators=(",", ":"))
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def unpack_rows(data: Tensor) -> list[StoredRow]:
    """The rows of `pack_rows`."""
    found = []
    for row in json.loads(bytes(data.cpu().numpy())):
        values: dict[str, Any] = {k: None if v is None else tuple(v) for k, v in row.items()}
        found.append(StoredRow(**values))
    return found


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
