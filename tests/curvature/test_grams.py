"""Sums of rows^T rows, of which a CPU computes what is above the diagonal."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from retain.curvature.blocks.estimator import Layout, products
from retain.curvature.blocks.kronecker import KroneckerEstimator
from retain.curvature.blocks.linalg import SMALL, gram_update, mirror

SIZES = [1, 7, SMALL - 1, SMALL, SMALL + 1, SMALL + 2, 3 * SMALL]


@pytest.mark.parametrize("size", SIZES)
def test_equals_the_whole_product(size: int) -> None:
    draw = torch.Generator().manual_seed(size)
    pieces = [torch.randn(5, size, generator=draw, dtype=torch.float64) for _ in range(3)]
    state: dict[str, Tensor] = {}
    whole = 0.0
    for weight, rows in zip((1.0, 0.5, 3.0), pieces, strict=True):
        gram_update(state, "a", rows, weight)
        whole = whole + weight * torch.einsum("ni,nj->ij", rows, rows)
    made = mirror(state["a"])
    assert made is state["a"]
    torch.testing.assert_close(made, whole, rtol=1e-12, atol=1e-12)


def test_what_is_below_is_left_out_where_it_is_worth_it() -> None:
    for size, idle in ((SMALL - 1, False), (SMALL, True)):
        state: dict[str, Tensor] = {}
        gram_update(state, "a", torch.ones(2, size))
        assert bool(state["a"][-1, 0] == 0) is idle
        assert bool((mirror(state["a"]) == 2).all())


def test_in_the_precision_of_a_fit() -> None:
    """Into a band of a larger matrix, weighted, by the hardware's bfloat16 where it has it."""
    draw = torch.Generator().manual_seed(0)
    pieces = [torch.randn(40, SMALL + 1, generator=draw) for _ in range(2)]
    state: dict[str, Tensor] = {}
    with products("auto"):
        for rows in pieces:
            gram_update(state, "a", rows, 0.25)
    every = torch.cat(pieces)
    error = mirror(state["a"]) - 0.25 * every.T @ every
    assert float(error.abs().max()) < 0.2 and float(error.square().mean().sqrt()) < 0.02


@pytest.mark.parametrize("size", [SMALL + 1])
def test_a_factor_of_an_estimator_is_whole(size: int) -> None:
    draw = torch.Generator().manual_seed(0)
    estimator = KroneckerEstimator(Layout({"layer": "layer"}))
    pieces = [torch.randn(4, size, generator=draw) for _ in range(2)]
    for rows in pieces:
        estimator.moment("inputs/layer", rows, 0.25)
    every = torch.cat(pieces)
    factor = estimator.factor("inputs/layer", 2.0)
    torch.testing.assert_close(factor.dense(), 0.5 * every.T @ every, rtol=1e-4, atol=1e-5)
