"""Curvature files: exact, whole, and refused when they are not."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import fits
import retain.curvature.artifact as artifact
from fits import SEEDS, Setup, fitted, groups, moved, setups, tensors
from retain import Curvature, load_curvature
from retain.errors import ArtifactError, OutputError, RetainError
from tiny import STRUCTURES, tiny


def fit(kind: str, structure: str = "kfac", **options: Any) -> Curvature:
    return fits.fit(tiny(kind, **{"moved": True} | options), kind, structure)


def refused(path: Path) -> str:
    """The one line with which a file is refused."""
    with pytest.raises(ArtifactError) as caught:
        load_curvature(path)
    assert isinstance(caught.value, RetainError)
    message = str(caught.value)
    assert "\n" not in message
    assert path.name in message
    assert "fix: " in message
    return message


def places(tensors: list[Tensor]) -> list[int]:
    """For each tensor, the first that lies in the same memory."""
    known: dict[int, int] = {}
    return [known.setdefault(t.data_ptr(), n) for n, t in enumerate(tensors)]


def saved(curvature: Curvature, times: int = 1) -> Curvature:
    """What a file of a file of it holds."""
    with TemporaryDirectory() as folder:
        for number in range(times):
            curvature = load_curvature(curvature.save(Path(folder) / f"{number}"))
    return curvature


@pytest.mark.parametrize("times", [1, 2])
@settings(max_examples=40, deadline=None)
@given(setup=setups(), seed=SEEDS)
def test_a_file_gives_the_same_bits_and_shares_as_much(times: int, setup: Setup, seed: int) -> None:
    curvature = fitted(setup).curvature
    if times == 2:  # use puts like layers together
        memory, held = curvature.memory(), groups(curvature)
        curvature.quadratic(moved(setup, seed))
        assert (curvature.memory(), groups(curvature)) == (memory, held)
    loaded = saved(curvature, times)
    assert loaded.info == curvature.info
    assert loaded.memory() == curvature.memory()
    assert list(loaded.blocks) == list(curvature.blocks)
    assert set(loaded.anchor) == set(curvature.anchor)
    assert groups(loaded) == groups(curvature)
    for name, block in curvature.blocks.items():
        again = loaded.blocks[name]
        assert (type(again), again.shape) == (type(block), block.shape)
    assert list(loaded.tensors()) == list(curvature.tensors())
    found, want = tensors(loaded), tensors(curvature)
    weights = [{pair: link.weight for pair, link in c.links.items()} for c in (loaded, curvature)]
    assert weights[0] == weights[1]
    assert places(found) == places(want)
    for name, kept in curvature.anchor.items():
        found += loaded.anchor[name]
        want += kept
    for one, two in zip(found, want, strict=True):
        assert one.dtype == two.dtype and torch.equal(one, two)
    model = moved(setup, seed)
    assert loaded.quadratic(model) == pytest.approx(curvature.quadratic(model), rel=1e-14)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_file_goes_into_a_new_folder_and_keeps_float32(structure: str, tmp_path: Path) -> None:
    curvature = fit("llama", structure=structure, dtype=torch.float32)
    path = curvature.save(tmp_path / "deep" / "folder" / "c.safetensors")
    assert [p.name for p in path.parent.iterdir()] == ["c.safetensors"]
    again = load_curvature(path)
    for name, block in curvature.blocks.items():
        for short, tensor in block.tensors().items():
            found = again.blocks[name].tensors()[short]
            assert found.dtype == tensor.dtype == torch.float32
            assert torch.equal(found, tensor), (name, short)


def test_shared_tensors_are_stored_once(tmp_path: Path) -> None:
    curvature = fit("llama", moved=False)
    path = curvature.save(tmp_path / "c.safetensors")
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        stored = sum(file.get_tensor(n).numel() * 8 for n in names)
    # q, k and v share an input, and so do gate and up: 3 tensors fewer a layer than 2 x 7.
    assert len(names) == 2 * (2 * 7 - 3)
    assert stored == curvature.memory()
    again = load_curvature(path)
    assert again.memory() == curvature.memory()
    # And once more: what was loaded is saved as compactly as what was fitted.
    assert again.save(tmp_path / "again").stat().st_size == path.stat().st_size


def test_a_saved_file_may_be_read_as_others_are(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("")
    path = fit("bert").save(tmp_path / "c.safetensors")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    whole = fit("bert", "diagonal").save(tmp_path / "whole").read_bytes()
    path = tmp_path / "cut.safetensors"
    for size in (0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 8, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused(path)
    path.write_bytes(whole + b"\0")
    refused(path)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_any_flipped_bit_is_found(structure: str, tmp_path: Path) -> None:
    # The first layers' worth of a file: its length field, all parts of the header, tensors.
    whole = fit("llama", structure=structure, targets=["q_proj"]).save(tmp_path / "whole")
    data = whole.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    places = [*range(8), *range(8, header, 17), *range(header - 9, len(data), 23), len(data) - 1]
    path = tmp_path / "flipped.safetensors"
    for number, place in enumerate(places):
        changed = bytearray(data)
        changed[place] ^= 1 << (number % 8)
        path.write_bytes(changed)
        refused(path)


def test_a_changed_description_is_found(tmp_path: Path) -> None:
    # A well-formed header that says something else: what a hand or a tool would write.
    path = fit("llama", structure="identity").save(tmp_path / "c.safetensors")
    data = path.read_bytes()
    for old, new in (
        (b'\\"samples\\": 1', b'\\"samples\\": 2'),
        (b'\\"fisher\\": \\"mc\\"', b'\\"fisher\\": \\"mx\\"'),
        (b'\\"space\\": \\"weight\\"', b'\\"space\\": \\"wright\\"'),
    ):
        assert data.count(old) == 1
        path.write_bytes(data.replace(old, new))
        refused(path)


def test_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(2)}, other)
    refused(other)
    save_file({"weight": torch.zeros(2)}, other, metadata={"retain": json.dumps({"format": "x/9"})})
    assert "x/9" in refused(other)
    save_file({"weight": torch.zeros(2)}, other, metadata={"retain": "[]"})
    refused(other)
    text = tmp_path / "text.safetensors"
    text.write_text("not a curvature\n" * 50)
    refused(text)
    assert "no such" in refused(tmp_path / "missing.safetensors")
    assert "no such" in refused(tmp_path)


def listing(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    curvature = fit("bert", structure="identity")
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder").mkdir()
    before = listing(tmp_path)
    for place in ("file/c.safetensors", "file/deep/c.safetensors", "folder"):
        with pytest.raises(OutputError) as caught:
            curvature.save(tmp_path / place)
        assert "\n" not in str(caught.value)
        assert listing(tmp_path) == before
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the rights of root have no limits"
)
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    with pytest.raises(OutputError):
        fit("bert", structure="identity").save(locked / "c.safetensors")
    assert listing(locked) == set()


def test_a_full_disk_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fit("bert", structure="identity").save(tmp_path / "c.safetensors")
    old = path.read_bytes()

    def full(tensors: object, scratch: str, metadata: object) -> None:
        Path(scratch).write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(artifact, "save_file", full)
    with pytest.raises(OutputError, match="No space left"):
        fit("bert").save(path)
    assert listing(tmp_path) == {"c.safetensors"}
    assert path.read_bytes() == old


def test_a_file_is_laid_out_as_before(tmp_path: Path) -> None:
    # Written by hand, as every version has written it: shared tensors once, the alias says whose.
    at = "model.layers.{}.self_attn.{}_proj"
    names = [at.format(layer, which) for layer in (0, 1) for which in "qk"]
    held = {f"blocks/{n}/outputs": torch.eye(8 if "q_" in n else 4).double() for n in names}
    held |= {f"blocks/{n}/inputs": 2 * torch.eye(8).double() for n in names[::2]}
    info = {
        "structure": "kfac", "space": "weight", "fisher": "mc", "tokens": 4, "predictions": 4,
        "sequences": 1, "samples": 1, "max_length": 4, "seed": 0, "error": math.nan, "model": "x",
        "sites": {n: [8 if "q_" in n else 4, 8, 2, 1.0] for n in names},
    }  # fmt: skip
    described = {
        "format": "retain.curvature/1",
        "info": info,
        "alias": {f"blocks/{k}/inputs": f"blocks/{q}/inputs" for q, k in pairwise(names)},
        "shapes": {n: [8 if "q_" in n else 4, 8] for n in names},
    }
    described["alias"].pop(f"blocks/{names[2]}/inputs")
    digest = artifact.digest_of(json.dumps(described), held)
    save_file(held, tmp_path / "c", {"retain": json.dumps(described | {"digest": digest})})
    found = load_curvature(tmp_path / "c")
    assert found.groups() == [names[:2], names[2:]]
    assert math.isnan(found.info.error)  # of one draw of one row
    again = load_curvature(found.save(tmp_path / "again"))
    assert math.isnan(again.info.error)
    assert torch.equal(again.to_dense(), found.to_dense())
    save_file(held, tmp_path / "old", {"retain": json.dumps(described), "digest": digest})
    assert list(load_curvature(tmp_path / "old").blocks) == names  # of 0.1.0: the digest beside it
