"""Read a safetensors file into memory."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open
from torch import Tensor

__all__ = ["read_tensors"]


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, each in memory of its own, and its metadata.

    As safetensors hands them out they lie in the file's mapping, at any address. A product over
    memory that is not aligned may differ in its last bit, and then a run that goes on from a file
    is not the uninterrupted one.

    Args:
        path: of the file.

    Raises:
        SafetensorError: it is no safetensors file.
        OSError: it cannot be read.
    """
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        return {name: file.get_tensor(name).clone() for name in names}, file.metadata() or {}
