"""Files of tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from retain.data.tensors import read_tensors


def test_each_tensor_is_in_memory_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    made = {n: torch.randn(s) for n, s in {"odd": (3,), "square": (8, 8), "row": (1, 5)}.items()}
    save_file(made, path, {"about": "three"})
    found, metadata = read_tensors(path)
    assert metadata == {"about": "three"}
    path.write_bytes(b"\0" * path.stat().st_size)  # a mapping would show it
    assert list(found) == sorted(made)
    for name, tensor in found.items():
        assert torch.equal(tensor, made[name])
        assert tensor.data_ptr() % 64 == 0


def test_what_is_no_file_of_tensors_is_said(tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(b"not one")
    with pytest.raises(SafetensorError):
        read_tensors(tmp_path / "b")
    with pytest.raises(OSError, match="No such file"):
        read_tensors(tmp_path / "c")
