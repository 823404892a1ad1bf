"""Random blocks of every structure: operator and implicit steps, against dense matrices.

An implicit step is tested as the problem that its docstring states: ``X + tau * pull(X) = start``,
with the pull written with the dense matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from retain.curvature.blocks.base import Block, Reader
from retain.curvature.blocks.diagonal import DiagonalBlock
from retain.curvature.blocks.eigen import EigenBlock
from retain.curvature.blocks.factor import DenseFactor, Factor, ScalarFactor, SketchFactor
from retain.curvature.blocks.identity import IdentityBlock
from retain.curvature.blocks.kronecker import KroneckerBlock
from tiny import relative

F64 = torch.float64
OUT, IN = 7, 5
SIDES = {
    "dense-dense": ("dense", "dense"),
    "sketch-sketch": ("sketch", "sketch"),
    "sketch-dense": ("sketch", "dense"),
    "dense-sketch": ("dense", "sketch"),
    "dense-scalar": ("dense", "scalar"),
    "sketch-scalar": ("sketch", "scalar"),
    "scalar-dense": ("scalar", "dense"),
    "scalar-sketch": ("scalar", "sketch"),
    "scalar-scalar": ("scalar", "scalar"),
}
"""Kronecker products: the kinds of their (inputs, outputs)."""

BLOCKS = ("identity", "diagonal", "ekfac", *SIDES)


class Random:
    """Draws of one seed."""

    def __init__(self, seed: int, dtype: torch.dtype = F64) -> None:
        self.generator, self.dtype = torch.Generator().manual_seed(seed), dtype

    def matrix(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=F64).to(self.dtype)

    def psd(self, size: int, rank: int) -> Tensor:
        root = torch.randn(size, rank, generator=self.generator, dtype=F64)
        whole = root @ root.T / size
        return ((whole + whole.T) / 2).to(self.dtype)  # not every processor's product is symmetric

    def basis(self, size: int) -> Tensor:
        square = torch.randn(size, size, generator=self.generator, dtype=F64)
        return torch.linalg.qr(square)[0].to(self.dtype)

    def factor(self, kind: str, size: int, *, flat: bool = False) -> Factor:
        if kind == "dense":
            return DenseFactor(self.psd(size, max(1, size // 2) if flat else size + 3))
        if kind == "scalar":
            return ScalarFactor(self.matrix().abs() + 0.1, size)
        vectors = self.matrix(size, 1 if flat else max(1, size // 2))
        diagonal = self.matrix(size).square()
        if flat:
            diagonal[size // 2 :] = 0
        return SketchFactor(vectors, diagonal, self.matrix().abs())

    def block(
        self, structure: str, d_out: int = OUT, d_in: int = IN, *, flat: bool = False
    ) -> Block:
        """A random block; a `flat` one has directions that cost nothing (not the identity)."""
        if structure == "identity":
            return IdentityBlock(self.matrix().abs() + 0.1, (d_out, d_in))
        if structure in SIDES:
            inputs, outputs = SIDES[structure]
            return KroneckerBlock(
                self.factor(inputs, d_in, flat=flat), self.factor(outputs, d_out, flat=flat)
            )
        values = self.matrix(d_out, d_in).square()
        if flat:
            values[: d_out // 2] = 0
            values[:, d_in // 2 :] = 0
        if structure == "diagonal":
            return DiagonalBlock(values)
        return EigenBlock(self.basis(d_in), self.basis(d_out), values)


def vec(d: Tensor) -> Tensor:
    return d.reshape(-1)


def dense_quadratic(full: Tensor, d: Tensor) -> Tensor:
    return 0.5 * vec(d) @ full @ vec(d)


SHAPES = st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 3))
SEEDS = st.integers(0, 2**31 - 1)


@pytest.mark.parametrize("structure", BLOCKS)
@settings(max_examples=25, deadline=None)
@given(shape=SHAPES, seed=SEEDS)
def test_thin_is_value_and_gradient_of_the_dense_quadratic(
    structure: str, shape: tuple[int, int, int], seed: int
) -> None:
    d_out, d_in, k = shape
    random = Random(seed)
    block = random.block(structure, d_out, d_in)
    left = random.matrix(d_out, k).requires_grad_()
    right = random.matrix(k, d_in).requires_grad_()
    value = dense_quadratic(block.to_dense(), left @ right)
    value.backward()
    thin = block.thin(left.detach(), right.detach())
    assert relative(thin.value, value.detach()) < 1e-10
    assert relative(thin.left, left.grad) < 1e-10
    assert relative(thin.right, right.grad) < 1e-10
    d = (left @ right).detach()
    assert relative(0.5 * (d * block.matvec(d)).sum(), value.detach()) < 1e-10


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("structure", BLOCKS)
@settings(max_examples=25, deadline=None)
@given(shape=SHAPES, seed=SEEDS)
def test_matvec_trace_and_definiteness_of_the_dense_matrix(
    structure: str, flat: bool, shape: tuple[int, int, int], seed: int
) -> None:
    d_out, d_in, _ = shape
    random = Random(seed)
    block, d = random.block(structure, d_out, d_in, flat=flat), random.matrix(d_out, d_in)
    full = block.to_dense()
    assert full.shape == (d_out * d_in, d_out * d_in)
    assert relative(vec(block.matvec(d)), full @ vec(d)) < 1e-10
    assert block.trace() == pytest.approx(float(full.trace()), rel=1e-12)
    assert relative(full, full.T) < 1e-14 if structure == "ekfac" else torch.equal(full, full.T)
    assert float(torch.linalg.eigvalsh(full).min()) > -1e-12 * max(1.0, float(full.trace()))


@pytest.mark.parametrize("structure", BLOCKS)
def test_tensors_define_the_block(structure: str) -> None:
    block = Random(0).block(structure)
    copies = {f"x/{name}": t.clone() for name, t in block.tensors().items()}
    again = type(block).unpack(Reader(copies, "x/", {}), block.shape)
    assert again.shape == block.shape == (OUT, IN)
    assert torch.equal(again.to_dense(), block.to_dense())
    assert all(t is copies[f"x/{name}"] for name, t in again.tensors().items())
    block.check("x", set())
    for name in block.tensors():
        with pytest.raises((KeyError, ValueError)):
            type(block).unpack(
                Reader({k: t for k, t in copies.items() if k != f"x/{name}"}, "x/", {}), block.shape
            )


@pytest.mark.parametrize("c", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("structure", BLOCKS)
def test_a_multiple_keeps_what_may_be_shared(structure: str, c: float) -> None:
    block = Random(1).block(structure)
    before = block.to_dense()
    times = block.scaled(c)
    assert relative(times.to_dense(), c * before) < 1e-14
    assert torch.equal(block.to_dense(), before)
    if structure in SIDES or isinstance(block, EigenBlock):
        assert times.inputs is block.inputs


# --- implicit steps ---

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
