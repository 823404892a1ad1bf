"""What is decomposed: as much for a deep model as for a shallow one."""

from __future__ import annotations

import pytest
import torch

from counting import Calls
from retain import fit_curvature
from retain.data.batches import Example
from retain.models.lora import attach_lora
from retain.retention.loader import reader_of
from retain.retention.recipe import Recipe
from tiny import deep

KINDS = ("eigh", "svd", "cholesky", "linalg_qr", "solve", "inv")


def decomposition(name: str) -> str | None:
    return name if any(kind in name for kind in KINDS) else None


def counted(layers: int, rank: int | None, structure: str) -> tuple[int, int]:
    """Of a fit, and of the start of a training."""
    model = attach_lora(deep(layers), rank=2)
    torch.manual_seed(0)
    ids = torch.randint(1, 32, (12, 9)).tolist()
    with Calls(decomposition) as fit:
        curvature = fit_curvature(
            model, [{"input_ids": row} for row in ids], structure, rank=rank, batch_size=4,
            progress=False,
        )  # fmt: skip
    rows = [Example(tuple(row), (*row[1:], 0), (True,) * 9) for row in ids]
    recipe = Recipe(curvature)
    with Calls(decomposition) as start:
        recipe.begin(model, reader_of(rows))
    assert recipe.filter is not None
    recipe.release()
    return fit.found.total(), start.found.total()


@pytest.mark.parametrize("structure", ["kfac", "activation"])
@pytest.mark.parametrize("rank", [3, None])
def test_their_number_does_not_grow_with_the_layers(rank: int | None, structure: str) -> None:
    few, many = (counted(layers, rank, structure) for layers in (4, 8))
    assert few == many
    assert max(few) <= 20
