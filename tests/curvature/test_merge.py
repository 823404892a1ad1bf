"""``a + b``: what a sum keeps, and how near it is, against dense matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from retain import Curvature, fit_curvature
from retain.curvature.blocks.base import Block
from retain.curvature.blocks.factor import SketchFactor
from retain.types import SPACES
from sums import definite, dense, fit, measure, pair, same, text
from tiny import KINDS, STRUCTURES, move, relative, tiny

F64 = torch.float64
PRODUCTS = ("kfac", "shampoo", "activation", "tridiagonal")
EACH = pytest.mark.parametrize(
    ("kind", "space", "structure"), [(k, p, s) for k in KINDS for p in SPACES for s in STRUCTURES]
)
SOME = pytest.mark.parametrize(
    ("kind", "space", "structure"),
    [(k, p, s) for k, p in zip(KINDS, SPACES, strict=True) for s in STRUCTURES],
)


@EACH
def test_a_sum_commutes_and_keeps_traces(kind: str, space: str, structure: str) -> None:
    a, b = pair(kind, space, structure)
    total = a + b
    same(b + a, total)
    same(2.0 * a + 2.0 * b, 2.0 * total)
    lost = whole = 0.0
    for name, block in total.blocks.items():
        x, y, kept = a.blocks[name].to_dense(), b.blocks[name].to_dense(), block.to_dense()
        definite(kept)
        assert block.trace() == pytest.approx(float((x + y).trace()), rel=1e-10), name
        if structure in ("identity", "diagonal"):
            assert relative(kept, x + y) < 1e-14
        lost += float((x + y - kept).square().sum())
        whole += float((x + y).square().sum())
    assert total.info.merge_loss == pytest.approx((lost / whole) ** 0.5, abs=1e-7)
    assert set(total.links) == set(a.links)
    definite(total.to_dense())
    for key in ("tokens", "predictions", "sequences", "merged"):
        assert getattr(total.info, key) == getattr(a.info, key) + getattr(b.info, key)
    assert 0 < total.info.error < max(a.info.error, b.info.error) or structure == "activation"

    # A block's quadratic is wrong by no more than the Frobenius norm of what was lost.
    random = torch.Generator().manual_seed(0)
    d = {n: torch.randn(x.shape, generator=random, dtype=F64) for n, x in a.blocks.items()}
    parts = [Curvature(c.blocks, c.anchor, c.info).quadratic(d) for c in (total, a, b)]
    bound = 0.5 * sum(float(x.square().sum()) ** 2 for x in d.values()) ** 0.5 * lost**0.5
    assert abs(parts[0] - parts[1] - parts[2]) <= bound + 1e-9 * parts[0]


@SOME
def test_a_sum_takes_the_memory_of_a_part(kind: str, space: str, structure: str) -> None:
    a, b = pair(kind, space, structure)
    total = a + b
    assert total.memory() == a.memory()
    for _ in range(20):
        total = total + b
        assert total.memory() == a.memory()
    assert total.info.merged == 22
    assert (0.5 * total).memory() == a.memory()
    for name, block in total.blocks.items():
        want = a.blocks[name].trace() + 21 * b.blocks[name].trace()
        assert block.trace() == pytest.approx(want, rel=1e-9, abs=1e-300)
    definite(total.to_dense())


@SOME
def test_a_curvature_and_itself_are_exactly_two_of_it(
    kind: str, space: str, structure: str
) -> None:
    a, _ = pair(kind, space, structure)
    total = a + a
    same(total, 2.0 * a, 1e-10)
    assert total.info.merge_loss < 1e-7
    model = tiny(kind, moved=True)
    move(model, 9)
    assert total.quadratic(model) == pytest.approx(2 * a.quadratic(model), rel=1e-10)


def rearranged(a: Block, b: Block) -> Tensor:
    """The sum as Van Loan has it: each ``G (x) S`` becomes ``vec(G) vec(S)^T``."""
    (out, into), block = a.shape, a.to_dense() + b.to_dense()
    return block.reshape(out, into, out, into).permute(0, 2, 1, 3).reshape(out * out, into * into)


@pytest.mark.parametrize("structure", PRODUCTS)
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_kept_product_is_the_nearest(kind: str, space: str, structure: str) -> None:
    a, b = pair(kind, space, structure)
    total, random = a + b, torch.Generator().manual_seed(0)
    assert sharing(total) == sharing(a)
    for names in sharing(a):
        sums = [rearranged(a.blocks[n], b.blocks[n]) for n in names]
        left, values, right = torch.linalg.svd(torch.cat(sums), full_matrices=False)
        s = total.blocks[names[0]].inputs.dense().reshape(-1)
        gs = [total.blocks[n].outputs.dense().reshape(-1) for n in names]
        sign = torch.sign(s @ right[0])
        assert relative(s / s.norm(), sign * right[0]) < 1e-7
        for g, part in zip(gs, left[:, 0].split([len(g) for g in gs]), strict=True):
            assert relative(g / g.norm(), sign * part / part.norm()) < 1e-7
        if len(names) > 1:
            continue
        wide, g = sums[0], gs[0]
        scale = (g @ wide @ s) / (g.square().sum() * s.square().sum())  # undoes that of the trace
        reached = float((wide - scale * torch.outer(g, s)).square().sum())
        best, size = float(values[1:].square().sum()), float(values[0].square())
        assert reached == pytest.approx(best, rel=1e-6, abs=1e-12 * size)
        for power in range(-4, 1):
            more = [
                x + 10.0**power * x.norm() / len(x) ** 0.5
                * torch.randn(x.shape, generator=random, dtype=x.dtype)
                for x in (scale * g, s)
            ]  # fmt: skip
            assert float((wide - torch.outer(*more)).square().sum()) > reached


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("kind", KINDS)
def test_ekfac_keeps_the_diagonal_of_the_sum_in_its_basis(kind: str, space: str) -> None:
    a, b = pair(kind, space, "ekfac")
    total = a + b
    for name, block in total.blocks.items():
        x, y = a.blocks[name].to_dense(), b.blocks[name].to_dense()
        basis = torch.kron(block.outputs, block.inputs)
        assert relative(basis.T @ basis, torch.eye(len(basis), dtype=basis.dtype)) < 1e-12
        want = (basis.T @ (x + y) @ basis).diagonal().reshape(block.shape)
        assert relative(block.values, want) < 1e-12
    assert sharing(total) == sharing(a)


def sharing(curvature: Curvature) -> list[list[str]]:
    groups: dict[int, list[str]] = {}
    for name, block in curvature.blocks.items():
        groups.setdefault(id(block.inputs), []).append(name)
    return list(groups.values())


@pytest.mark.parametrize("structure", ["kfac", "shampoo", "activation"])
def test_sums_of_sketches_stay_within_their_bounds(structure: str) -> None:
    whole = pair("llama", "weight", structure)
    for rank in (1, 2, 4):
        a, b = (fit("llama", "weight", structure, seed, rank=rank) for seed in (1, 2))
        total = a + b
        assert total.memory() == a.memory()
        for names in sharing(a):
            ours, theirs = [a.blocks[n] for n in names], [b.blocks[n] for n in names]
            blocks, _, _, ways = type(ours[0]).merge(ours, theirs)
            for n, block, way in zip(names, blocks, ways, strict=True):
                assert total.blocks[n].trace() == pytest.approx(
                    a.blocks[n].trace() + b.blocks[n].trace(), rel=1e-10
                )
                for side, factor in block.factors().items():
                    x, y = (c.blocks[n].factors()[side].dense() for c in whole)
                    p, q = way[side == "inputs"]
                    truth = p * x + q * y
                    off = torch.linalg.matrix_norm(factor.dense() - truth, 2)
                    bound = factor.bound if isinstance(factor, SketchFactor) else 0.0
                    assert float(off) <= float(bound) + 1e-10 * float(truth.trace())
                    kept = total.blocks[n].factors()[side].tensors()
                    for key, tensor in factor.tensors().items():
                        assert torch.equal(kept[key], tensor)
        definite(total.to_dense())


@pytest.mark.parametrize("structure", ["identity", "diagonal"])
def test_two_halves_add_up_to_the_whole(structure: str) -> None:
    # A curvature is a mean over predictions, so halves are weighted by theirs.
    model, rows = tiny("llama", moved=True), text(1, 8)
    options = {"fisher": "empirical", "batch_size": 2, "progress": False}
    a, b, whole = (
        fit_curvature(model, part, structure, **options) for part in (rows[:3], rows[3:], rows)
    )
    n, m = a.info.predictions, b.info.predictions
    same(n / (n + m) * a + m / (n + m) * b, whole, 1e-12)


# --- zero blocks ---


@pytest.mark.parametrize(("kind", "dtype"), [("llama", F64), ("bert", torch.float32)])
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_zero_blocks(kind: str, space: str, structure: str, dtype: torch.dtype) -> None:
    # In adapter space at B = 0 the block of A is zero. A weight of zero makes all blocks zero.
    model = tiny(kind, dtype=dtype)
    a, b = (measure(model, seed, structure, space=space) for seed in (1, 2))
    tolerance = 1e-9 if dtype == F64 else 1e-4
    total = a + b
    for name, block in total.blocks.items():
        definite(block.to_dense())
        want = a.blocks[name].trace() + b.blocks[name].trace()
        assert block.trace() == pytest.approx(want, rel=tolerance, abs=1e-300)
    same(0.0 * a + b, b, tolerance)
    same(b + 0.0 * a, b, tolerance)
    nothing = 0.0 * a + 0.0 * b
    assert nothing.info.merge_loss == 0
    assert all(bool((t == 0).all()) for t in dense(nothing).values())
