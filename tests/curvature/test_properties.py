"""What holds for every fitted curvature, whatever it is made of."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fits import (
    SEEDS,
    Setup,
    dense_quadratic,
    displacement,
    fitted,
    groups,
    joined,
    model_of,
    moved,
    setups,
)
from retain import Curvature
from retain.errors import ConfigError, MismatchError
from retain.models.sites import find_sites, lora_sites
from tiny import relative

EACH = given(setup=setups(), seed=SEEDS)
QUICK = settings(max_examples=40, deadline=None)


def drawn(curvature: Curvature, seed: int) -> dict[str, Tensor]:
    """A random displacement of each block."""
    random = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(block.shape, generator=random, dtype=torch.float64)
        for name, block in curvature.blocks.items()
    }


@QUICK
@given(setup=setups())
def test_it_is_symmetric_and_positive_semi_definite(setup: Setup) -> None:
    curvature, dense = fitted(setup)
    assert relative(dense, dense.T) < 1e-13
    values = torch.linalg.eigvalsh(0.5 * (dense + dense.T))
    assert float(values[0]) > -1e-12 * float(values[-1])
    trace = sum(block.trace() for block in curvature.blocks.values())
    assert float(dense.trace()) == pytest.approx(trace, rel=1e-10)
    assert trace > 0


@QUICK
@EACH
def test_quadratic_and_matvec_are_those_of_the_dense_matrix(setup: Setup, seed: int) -> None:
    curvature, dense = fitted(setup)
    moves = drawn(curvature, seed)
    d = joined(curvature, moves)
    assert relative(joined(curvature, curvature.matvec(moves)), dense @ d) < 1e-10
    assert relative(curvature.quadratic(moves), 0.5 * d @ dense @ d) < 1e-10
    nothing = {name: torch.zeros_like(d) for name, d in moves.items()}
    assert curvature.quadratic(nothing) == 0.0


@QUICK
@EACH
def test_matvec_is_the_gradient_of_the_quadratic(setup: Setup, seed: int) -> None:
    curvature, _ = fitted(setup)
    moves = {name: d.requires_grad_() for name, d in drawn(curvature, seed).items()}
    pulled = curvature.matvec(moves)
    value = sum(0.5 * (moves[name] * f).sum() for name, f in pulled.items())
    found = torch.autograd.grad(value, list(moves.values()))
    gradient = joined(curvature, dict(zip(moves, found, strict=True)))
    assert relative(gradient, joined(curvature, pulled).detach()) < 1e-10
    with torch.no_grad():
        assert relative(curvature.quadratic(moves), value.detach()) < 1e-10


@QUICK
@EACH
def test_a_models_quadratic_and_pulls_are_those_of_the_dense_matrix(
    setup: Setup, seed: int
) -> None:
    curvature, dense = fitted(setup)
    model = moved(setup, seed)
    value = dense_quadratic(curvature, model, dense)
    value.backward()
    nats, pulls = curvature.pulls(find_sites(model))
    assert relative(nats, value.detach()) < 1e-9
    assert nats == curvature.quadratic(model) > 0
    whole = torch.cat([p.grad.reshape(-1) for p, _ in pulls])
    assert relative(torch.cat([g.reshape(-1) for _, g in pulls]), whole) < 1e-9
    moves = {name: d.detach() for name, d in displacement(curvature, model).items()}
    assert relative(curvature.quadratic(moves), nats) < 1e-9


@QUICK
@given(setup=setups())
def test_it_is_zero_at_the_anchor(setup: Setup) -> None:
    curvature, _ = fitted(setup)
    nats, pulls = curvature.pulls(find_sites(model_of(setup)))
    rounded = setup.space == "weight" and setup.moved  # s B A - s B_0 A_0, in two products
    assert abs(nats) <= (1e-14 if rounded else 0.0)
    assert max(float(g.abs().max()) for _, g in pulls) <= (1e-12 if rounded else 0.0)


@QUICK
@given(setup=setups(("weight",)), seed=SEEDS, turn=SEEDS)
def test_weight_space_does_not_see_the_gauge(setup: Setup, seed: int, turn: int) -> None:
    curvature, _ = fitted(setup)
    model = moved(setup, seed)
    before = curvature.quadratic(model)
    random = torch.Generator().manual_seed(turn)
    with torch.no_grad():
        for site in lora_sites(model):
            r = torch.randn(site.rank, site.rank, generator=random, dtype=torch.float64)
            r = r + 2 * torch.eye(site.rank, dtype=torch.float64)
            assume(float(torch.linalg.cond(r)) < 100)
            site.b.copy_(site.b @ r)
            site.a.copy_(torch.linalg.solve(r, site.a))
    assert relative(curvature.quadratic(model), before) < 1e-8


# Multiples.


@QUICK
@given(setup=setups(), seed=SEEDS, c=st.floats(0, 1e6, allow_subnormal=False))
def test_a_multiple_has_so_many_times_the_quadratic(setup: Setup, seed: int, c: float) -> None:
    curvature, dense = fitted(setup)
    times = c * curvature
    assert relative(times.to_dense(), c * dense) < 1e-12
    assert torch.equal((curvature * c).to_dense(), times.to_dense())
    assert torch.equal(curvature.to_dense(), dense)
    model = moved(setup, seed)
    assert times.quadratic(model) == pytest.approx(c * curvature.quadratic(model), rel=1e-10)
    moves = drawn(curvature, seed)
    assert times.quadratic(moves) == pytest.approx(c * curvature.quadratic(moves), rel=1e-10)
    assert (times.info, times.anchor) == (curvature.info, curvature.anchor)
    if setup.structure != "identity":  # whose one number each block multiplies for itself
        assert groups(times) == groups(curvature)


@pytest.mark.parametrize("c", [-1, -1e-300, math.nan, math.inf, -math.inf])
def test_a_multiple_that_would_pay_for_drift_is_refused(c: float) -> None:
    curvature, _ = fitted(Setup("llama", "weight", "tridiagonal", "mc", True, None))
    for product in (lambda: c * curvature, lambda: curvature * c):
        with pytest.raises(ConfigError, match="multiplied") as caught:
            product()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("c", ["2", None, torch.ones(2)])
def test_a_multiple_by_something_else_is_a_type_error(c: Any) -> None:
    curvature, _ = fitted(Setup("llama", "weight", "kfac", "mc", True, None))
    with pytest.raises(TypeError):
        curvature * c


def test_displacements_of_other_blocks_are_refused() -> None:
    curvature, _ = fitted(Setup("llama", "weight", "kfac", "mc", True, None))
    moves = drawn(curvature, 0)
    last, d = list(moves.items())[-1]
    assert d.shape[0] != d.shape[1]
    for odd in (
        {},
        {name: d for name, d in moves.items() if name != last},
        {**moves, "other": d},
        {**moves, last: d.T},
    ):
        for use in (curvature.matvec, curvature.quadratic):
            with pytest.raises(MismatchError, match="not those of the blocks") as caught:
                use(odd)
            assert "\n" not in str(caught.value)
