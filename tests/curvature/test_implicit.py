"""The three implicit steps of a block.

Each is tested as the problem that its docstring states: ``X + tau * pull(X) = start``, with the
pull written with the dense matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from random_blocks import BLOCKS, F64, IN, OUT, Random, dense_quadratic, vec
from tiny import relative

TAUS = [10.0**k for k in range(-3, 13)]
RANK = 2
Problem = tuple[
    Tensor, Callable[[float], Tensor], Callable[[Tensor], Tensor], Callable[[Tensor], float]
]

IMPLICIT = pytest.mark.parametrize(
    ("which", "anchored"),
    [("prox", 0), ("left", 0), ("left", 2), ("left", 3), ("right", 0), ("right", 2), ("right", 3)],
)


def problem(
    which: str,
    structure: str,
    anchored: int,
    seed: int,
    dtype: torch.dtype = F64,
    flat: bool = False,
) -> Problem:
    """(start, solve(tau), pull(X), quadratic(X)) of one of the three."""
    random = Random(seed, dtype)
    block = random.block(structure, flat=flat)
    full = block.to_dense().double()
    b0, a0 = random.matrix(OUT, anchored), random.matrix(anchored, IN)
    anchor = (b0 @ a0).double()

    def apply(d: Tensor) -> Tensor:
        return (full @ vec(d)).reshape(OUT, IN)

    if which == "prox":
        start = random.matrix(OUT, IN)
        return (
            start, lambda tau: block.prox(start, tau),
            apply, lambda x: float(dense_quadratic(full, x)),
        )  # fmt: skip
    if which == "left":
        start, c = random.matrix(OUT, RANK), random.matrix(RANK, IN)
        wide = c.double()
        return (
            start, lambda tau: block.prox_left(start, c, b0, a0, tau),
            lambda x: apply(x @ wide - anchor) @ wide.T,
            lambda x: float(dense_quadratic(full, x @ wide - anchor)),
        )  # fmt: skip
    start, c = random.matrix(RANK, IN), random.matrix(OUT, RANK)
    wide = c.double()
    return (
        start, lambda tau: block.prox_right(start, c, b0, a0, tau),
        lambda x: wide.T @ apply(wide @ x - anchor),
        lambda x: float(dense_quadratic(full, wide @ x - anchor)),
    )  # fmt: skip


def affine(start: Tensor, pull: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """The pull is affine in X: its matrix, and what it is at zero."""
    basis = torch.eye(start.numel(), dtype=F64).reshape(-1, *start.shape)
    offset = pull(torch.zeros_like(start.double()))
    return torch.stack([vec(pull(e) - offset) for e in basis], 1), offset


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("structure", BLOCKS)
@IMPLICIT
def test_implicit_steps_solve_their_equation(
    which: str, anchored: int, structure: str, flat: bool
) -> None:
    start, solve, pull, _ = problem(which, structure, anchored, seed=3, flat=flat)
    linear, offset = affine(start, pull)
    for tau in [0.0, *TAUS[:7]]:
        system = torch.eye(len(linear), dtype=F64) + tau * linear
        want = torch.linalg.solve(system, vec(start - tau * offset)).reshape(start.shape)
        got = solve(tau)
        assert got.shape == start.shape
        assert relative(got, want) < 1e-8, tau
        residual = got + tau * pull(got) - start
        size = float(start.abs().max() + tau * offset.abs().max() + tau * pull(got).abs().max())
        assert float(residual.abs().max()) < 1e-10 * size, tau


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("structure", BLOCKS)
@IMPLICIT
def test_implicit_steps_are_finite_and_monotone_in_the_strength(
    which: str, anchored: int, structure: str, flat: bool, dtype: torch.dtype
) -> None:
    start, solve, _, quadratic = problem(which, structure, anchored, seed=4, dtype=dtype, flat=flat)
    assert relative(solve(0.0), start) < 10 * torch.finfo(dtype).eps
    values = [quadratic(start.double())]
    for tau in TAUS:
        x = solve(tau)
        assert x.dtype == dtype
        assert bool(x.isfinite().all()), tau
        values.append(quadratic(x.double()))
    slack = (1e-12 if dtype == F64 else 1e-5) * values[0]
    for before, after in pairwise(values):
        assert after <= before + slack


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("structure", [s for s in BLOCKS if s != "identity"])
@IMPLICIT
def test_implicit_steps_go_no_further_than_the_nearest_minimum(
    which: str, anchored: int, structure: str, dtype: torch.dtype
) -> None:
    start, solve, pull, _ = problem(which, structure, anchored, seed=5, dtype=dtype, flat=True)
    linear, _ = affine(start, pull)
    linear = 0.5 * (linear + linear.T)
    values, vectors = torch.linalg.eigh(linear)
    rounding = 1e-10 if dtype == F64 else 1e-5
    free = vectors[:, values < rounding * values.max()]
    assert free.shape[1] >= 1 or "scalar" in structure
    away = torch.linalg.pinv(linear, rtol=rounding, hermitian=True) @ vec(pull(start.double()))
    bound = 1.001 * float(away.norm())
    if dtype != F64:
        bound = 1.5 * (bound + float(start.norm()))
    for tau in TAUS:
        step = vec(solve(tau).double() - start.double())
        assert float(step.norm()) <= bound, tau
        if dtype == F64 and tau <= 1e9 and free.shape[1]:
            assert float((free.T @ step).abs().max()) < 1e-4 * float(start.abs().max()), tau


@pytest.mark.parametrize("structure", BLOCKS)
@IMPLICIT
def test_implicit_steps_shrink_distances(which: str, anchored: int, structure: str) -> None:
    # A proximal map of a convex function moves no point further than the start allows:
    # q(X) + |X - start|^2 / (2 tau) is at most its value at the start.
    start, solve, _, quadratic = problem(which, structure, anchored, seed=6)
    for tau in TAUS:
        x = solve(tau)
        reached = quadratic(x) + float((x - start).square().sum()) / (2 * tau)
        assert reached <= quadratic(start) * (1 + 1e-9)
