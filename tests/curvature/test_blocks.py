"""The algebra of one block, against dense matrices and autograd."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from random_blocks import BLOCKS, IN, OUT, SIDES, Random, dense_quadratic, vec
from retain.curvature.blocks.base import Reader
from retain.curvature.blocks.eigen import EigenBlock
from tiny import relative

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
