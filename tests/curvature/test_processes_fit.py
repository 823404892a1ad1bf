"""Two processes fit what one does: each reads its own rows, and their sums are added up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import forked
import retain
from retain.curvature.fit.divided import own_batches
from retain.data.batches import Example
from retain.errors import CurvatureError
from retain.models import processes
from retain.models.lora import attach_lora
from tiny import deep

CASES: dict[str, dict[str, Any]] = {
    "kfac": {"structure": "kfac"},
    "draws": {"structure": "kfac", "samples": 3, "batch_size": 3},
    "sketched": {"structure": "kfac", "rank": 4},
    "share": {"structure": "kfac", "share": 0.5},
    "identity": {"structure": "identity"},
    "diagonal": {"structure": "diagonal"},
    "activation": {"structure": "activation"},
    "shampoo": {"structure": "shampoo"},
    "tridiagonal": {"structure": "tridiagonal"},
    "eigen": {"structure": "ekfac"},
    "adapter": {"structure": "activation", "space": "adapter"},
    "one row": {"structure": "kfac", "rows": 1, "batch_size": 1},
}


def rows(count: int = 9) -> list[dict[str, Any]]:
    random = torch.Generator().manual_seed(3)
    return [
        {"input_ids": torch.randint(1, 32, (3 + i % 4,), generator=random).tolist()}
        for i in range(count)
    ]


def fitted(name: str, **options: Any) -> retain.Curvature:
    model = attach_lora(deep(2), rank=2)
    told = {"batch_size": 2, "products": "float32", "progress": False} | CASES[name] | options
    return retain.fit_curvature(model, rows(), **told)


def matrices(curvature: retain.Curvature) -> dict[str, Tensor]:
    """Of each block; the links as they are."""
    found = {name: block.to_dense() for name, block in curvature.blocks.items()}
    return found | {n: t for n, t in curvature.tensors().items() if n.startswith("links/")}


def fit_all(out: Path) -> None:
    for name in CASES:
        found = fitted(name)
        kept = {"tensors": found.tensors(), "dense": matrices(found), "error": found.info.error}
        kept |= {"share": found.info.share_error, "predictions": found.info.predictions}
        torch.save(kept, out / f"{name}-{processes.rank()}.pt")
    if processes.rank() == 0:  # the other one takes no part
        alone = fitted("kfac", divide=False)
        torch.save(alone.tensors(), out / "alone.pt")
    break_off(out)


def break_off(out: Path) -> None:
    model = attach_lora(deep(2), rank=2)
    if processes.rank():
        with torch.no_grad():
            model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight[0, 0] = torch.nan
    try:
        retain.fit_curvature(model, rows(), batch_size=2, progress=False)
    except CurvatureError as error:
        (out / f"{processes.rank()}.json").write_text(json.dumps(str(error)))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("two")
    forked.gloo(fit_all, out)
    return out


@pytest.mark.parametrize("name", CASES)
def test_two_processes_fit_what_one_does(two: Path, name: str) -> None:
    kept = [torch.load(two / f"{name}-{rank}.pt", weights_only=True) for rank in (0, 1)]
    one = fitted(name)
    for key, t in matrices(one).items():
        assert (kept[0]["dense"][key] - t).norm() <= 1e-5 * t.norm(), key
    assert all(torch.equal(t, kept[1]["tensors"][key]) for key, t in kept[0]["tensors"].items())
    assert kept[0]["error"] == pytest.approx(one.info.error, rel=1e-5, nan_ok=True)
    assert kept[0]["share"] == pytest.approx(one.info.share_error, rel=1e-4, abs=1e-9)
    assert kept[0]["predictions"] == one.info.predictions


def test_a_fit_in_one_of_them_alone_waits_for_nobody(two: Path) -> None:
    kept, one = torch.load(two / "alone.pt", weights_only=True), fitted("kfac").tensors()
    assert all(torch.equal(t, kept[key]) for key, t in one.items())


def test_what_breaks_off_in_one_breaks_off_in_all(two: Path) -> None:
    first, second = (json.loads((two / f"{rank}.json").read_text()) for rank in (0, 1))
    assert "broke off in another process" in first
    assert "in process 1" in first
    assert "not finite" in second


@pytest.mark.parametrize(("count", "others", "size"), [(9, 2, 2), (5, 4, 1), (8, 2, 8), (3, 3, 2)])
def test_each_reads_as_often_and_no_row_twice(
    monkeypatch: pytest.MonkeyPatch, count: int, others: int, size: int
) -> None:
    examples = [Example((1,) * (1 + i % 3), (1,) * (1 + i % 3)) for i in range(count)]
    monkeypatch.setattr("retain.curvature.fit.divided.count", lambda: others)
    read = []
    for number in range(others):
        monkeypatch.setattr("retain.curvature.fit.divided.rank", lambda n=number: n)
        read.append([batch.rows for batch in own_batches(examples, size, 0)])
    assert len({len(r) for r in read}) == 1
    assert sorted(i for r in read for b in r for i in b) == list(range(count))
    assert max(len(b) for r in read for b in r) <= size + 1
