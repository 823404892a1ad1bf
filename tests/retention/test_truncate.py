"""The cut of an adapter is the best one in the curvature's norm, by brute force."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from retain import fit_curvature
from retain.errors import MismatchError
from retain.models.sites import lora_sites
from retain.retention.soften.truncate import truncated
from tiny import ROWS, tiny


def root(matrix: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ (values.clamp(min=0).sqrt()[:, None] * vectors.T)


def fit(structure: str, **options: Any) -> tuple[Any, Any]:
    model = tiny("llama", moved=True, rank=4)
    options = {"rows": 4, "batch_size": 4, "progress": False, **options}
    return model, fit_curvature(model, ROWS["llama"], structure, **options)


@pytest.mark.parametrize("structure", ["kfac", "shampoo", "activation"])
@pytest.mark.parametrize("rank", [1, 3])
def test_it_is_the_best_of_its_rank(structure: str, rank: int) -> None:
    model, curvature = fit(structure)
    sites = lora_sites(model)
    found, lost = truncated(sites, curvature, rank)
    cut = whole = 0.0
    for site in sites:
        b, a = found[site.name]
        assert b.shape == (site.shape[0], rank)
        assert a.shape == (rank, site.shape[1])
        block: Any = curvature.blocks[site.name]
        left, right = root(block.outputs.dense().double()), root(block.inputs.dense().double())
        d = (site.b @ site.a).detach()
        values = torch.linalg.svdvals(left @ d @ right)
        gap = left @ (d - b @ a) @ right
        best = float(values[rank:].square().sum())
        assert float(gap.square().sum()) == pytest.approx(best, rel=1e-4, abs=1e-12)
        cut, whole = cut + best, whole + float(values.square().sum())
    assert lost == pytest.approx(cut / whole, rel=1e-4)
    assert 0 < lost < 1


@pytest.mark.parametrize("rank", [4, 9])
def test_what_fits_stays_bit_for_bit(rank: int) -> None:
    model, curvature = fit("kfac")
    found, lost = truncated(lora_sites(model), curvature, rank)
    for site in lora_sites(model):
        assert torch.equal(found[site.name][0], site.b)
        assert torch.equal(found[site.name][1], site.a)
    assert lost == 0


def test_a_curvature_without_sides_is_refused() -> None:
    model, curvature = fit("diagonal")
    with pytest.raises(MismatchError, match="no two sides to cut by"):
        truncated(lora_sites(model), curvature, 2)
