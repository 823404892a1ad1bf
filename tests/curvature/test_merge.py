"""``a + b``: what adds, what a sum keeps, and how near it is, against dense matrices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fits import definite, dense, fit, known, measure, pair, same, split_anew, text
from retain import Curvature, load_curvature, reanchored
from retain.curvature.blocks.base import Block
from retain.curvature.blocks.factor import SketchFactor
from retain.errors import MismatchError
from retain.models.lora import attach_lora
from retain.types import SPACES
from tiny import KINDS, STRUCTURES, base, move, relative, tiny

F64 = torch.float64
PRODUCTS = ("kfac", "shampoo", "activation", "tridiagonal")
EACH = pytest.mark.parametrize(
    ("kind", "space", "structure"), [(k, p, s) for k in KINDS for p in SPACES for s in STRUCTURES]
)
SOME = pytest.mark.parametrize(
    ("kind", "space", "structure"),
    [(k, p, s) for k, p in zip(KINDS, SPACES, strict=True) for s in STRUCTURES],
)


# --- what adds ---


@pytest.mark.parametrize(
    ("other", "what", "got"),
    [
        ({"structure": "shampoo"}, "structures", "kfac and shampoo"),
        ({"structure": "tridiagonal"}, "structures", "kfac and tridiagonal"),
        ({"space": "adapter"}, "spaces", "weight and adapter"),
        ({"fisher": "empirical"}, "Fishers", "mc and empirical"),
        ({"rank": 2}, "ranks of sketches", "None and 2"),
        ({"fisher": "tempered", "temperature": 3.0}, "temperatures", "2.0 and 3.0"),
    ],
)
def test_fits_of_other_settings_do_not_add(other: dict, what: str, got: str) -> None:
    a = known("llama", fisher="tempered" if "temperature" in other else "mc")
    b = known("llama", **other)
    for one, two, names in ((a, b, got), (b, a, " and ".join(reversed(got.split(" and "))))):
        with pytest.raises(MismatchError, match=f"different {what} do not add") as caught:
            one + two
        assert f"got: {names}" in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_fits_of_other_models_do_not_add(structure: str) -> None:
    a = known("llama", "weight", structure)
    for model, what in (
        (tiny("llama", moved=True, seed=5), "base models"),
        (tiny("bert", moved=True), "base models"),
        (tiny("llama", moved=True, targets=["q_proj", "down_proj"]), "layers"),
    ):
        with pytest.raises(MismatchError, match=f"different {what} do not add"):
            a + measure(model, 1, structure)


@pytest.mark.parametrize("space", SPACES)
def test_fits_of_a_and_b_in_other_scalings_do_not_add(space: str) -> None:
    fits = [
        measure(attach_lora(base("llama"), rank=2, alpha=alpha, seed=1), 1, "kfac", space=space)
        for alpha in (2, 8)
    ]
    if space == "weight":  # of the update, however it is scaled
        same(fits[0] + fits[1], fits[0] + fits[0], 1e-9)
    else:
        with pytest.raises(MismatchError, match="different scalings do not add"):
            fits[0] + fits[1]


@SOME
def test_fits_around_other_anchors_do_not_add(kind: str, space: str, structure: str) -> None:
    a, away = pair(kind, space, structure)[0], tiny(kind, moved=True)
    move(away, 4, size=1e-3)
    b = measure(away, 2, structure, space=space)
    for x, y in ((a, b), (b, a), (a, pair(kind, space, structure, moved=False)[1])):
        with pytest.raises(MismatchError, match=r"different anchors do not add; .*reanchored"):
            x + y


def test_a_curvature_adds_to_nothing_else() -> None:
    for wrong in (lambda: known("llama") + 1, lambda: sum([known("llama")])):
        with pytest.raises(TypeError):
            wrong()


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_split_of_an_update_is_no_part_of_the_anchor(structure: str) -> None:
    model = tiny("llama", moved=True)
    a, c = (measure(model, 1, structure, space=space) for space in SPACES)
    split_anew(model)
    b, d = (measure(model, 2, structure, space=space) for space in SPACES)
    same(a + b, a + pair("llama", "weight", structure)[1], 1e-6)
    assert (a + b).quadratic(model) == pytest.approx(0, abs=1e-12)
    with pytest.raises(MismatchError, match="different anchors"):
        c + d

    # At B = 0 there is no update, whatever A or the rank.
    e = measure(tiny("llama"), 1, structure) + measure(tiny("llama", rank=3), 2, structure)
    assert e.anchor == {}


# --- what a sum keeps ---


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
    assert set(total.links) == set(a.links) and set(total.anchor) == set(a.anchor)
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


def test_the_error_of_a_sum_is_that_of_its_trace() -> None:
    a, b = pair("llama", "weight", "diagonal")
    assert a.info.error != b.info.error
    assert (a + 1e6 * b).info.error == pytest.approx(b.info.error, rel=1e-3)
    assert (1e6 * a + b).info.error == pytest.approx(a.info.error, rel=1e-3)
    x, y = (sum(block.trace() for block in c.blocks.values()) for c in (a, b))
    wanted = ((a.info.error * x) ** 2 + (b.info.error * y) ** 2) ** 0.5 / (x + y)
    assert (a + b).info.error == pytest.approx(wanted)


@SOME
def test_a_sum_takes_the_memory_of_a_part(
    kind: str, space: str, structure: str, tmp_path: Path
) -> None:
    a, b = pair(kind, space, structure)
    total = a + b
    loaded = [load_curvature(c.save(tmp_path / str(n))) for n, c in enumerate((a, b, total))]
    for again in (loaded[0] + b, a + loaded[1], loaded[0] + loaded[1], loaded[2]):
        same(again, total, 1e-12)
        assert again.memory() == total.memory() == a.memory()
        assert again.info.merge_loss == pytest.approx(total.info.merge_loss, abs=1e-8)
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
    assert total.groups() == a.groups()
    for names in a.groups():
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
    assert total.groups() == a.groups()


@pytest.mark.parametrize("structure", ["kfac", "shampoo", "activation"])
def test_sums_of_sketches_stay_within_their_bounds(structure: str) -> None:
    whole = pair("llama", "weight", structure)
    for rank in (1, 2, 4):
        a, b = pair("llama", "weight", structure, rank=rank)
        total = a + b
        assert total.memory() == a.memory()
        for names in a.groups():
            ours, theirs = [a.blocks[n] for n in names], [b.blocks[n] for n in names]
            merged = type(ours[0]).merge(ours, theirs)
            for n, block, way in zip(names, merged.blocks, merged.weights, strict=True):
                want = a.blocks[n].trace() + b.blocks[n].trace()
                assert total.blocks[n].trace() == pytest.approx(want, rel=1e-10)
                for side, factor in block.factors().items():
                    x, y = (c.blocks[n].factors()[side].dense() for c in whole)
                    p, q = way[side == "inputs"]
                    truth = p * x + q * y
                    off = torch.linalg.matrix_norm(factor.dense() - truth, 2)
                    bound = factor.bound if isinstance(factor, SketchFactor) else 0.0
                    assert float(off) <= float(bound) + 1e-10 * float(truth.trace())
                    kept = total.blocks[n].factors()[side].tensors()
                    assert all(torch.equal(kept[k], t) for k, t in factor.tensors().items())
        definite(total.to_dense())


@pytest.mark.parametrize("structure", ["identity", "diagonal"])
def test_two_halves_add_up_to_the_whole(structure: str) -> None:
    # A curvature is a mean over predictions, so halves are weighted by theirs.
    model, rows = tiny("llama", moved=True), text(1, 8)
    a, b, whole = (
        fit(model, "llama", structure, source=part, fisher="empirical")
        for part in (rows[:3], rows[3:], rows)
    )
    n, m = a.info.predictions, b.info.predictions
    same(n / (n + m) * a + m / (n + m) * b, whole, 1e-12)


@pytest.mark.parametrize(("kind", "dtype"), [("llama", F64), ("bert", torch.float32)])
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_zero_blocks(kind: str, space: str, structure: str, dtype: torch.dtype) -> None:
    # In adapter space at B = 0 the block of A is zero. A weight of zero makes all blocks zero.
    model = tiny(kind, dtype=dtype)
    a, b = (measure(model, seed, structure, space=space) for seed in (1, 2))
    tolerance = 1e-9 if dtype == F64 else 1e-4
    for name, block in (a + b).blocks.items():
        definite(block.to_dense())
        want = a.blocks[name].trace() + b.blocks[name].trace()
        assert block.trace() == pytest.approx(want, rel=tolerance, abs=1e-300)
    same(0.0 * a + b, b, tolerance)
    same(b + 0.0 * a, b, tolerance)
    nothing = 0.0 * a + 0.0 * b
    assert nothing.info.merge_loss == 0
    assert all(bool((t == 0).all()) for t in dense(nothing).values())


# --- anchors that move ---


@SOME
def test_reanchoring_moves_the_zero(kind: str, space: str, structure: str) -> None:
    model = tiny(kind, moved=True)
    a = measure(model, 1, structure, space=space)
    move(model, 7)
    moved = reanchored(a, model)
    assert a.quadratic(model) > 1e-6
    assert all(moved.blocks[name] is block for name, block in a.blocks.items())
    assert moved.links == a.links
    nats, pulls = moved.pulls(moved.bind(model))
    assert abs(nats) <= (0 if space == "adapter" else 1e-12)
    assert max(float(g.abs().max()) for _, g in pulls) <= (0 if space == "adapter" else 1e-12)
    b = measure(model, 2, structure, space=space)
    with pytest.raises(MismatchError, match="different anchors"):
        a + b
    total = moved + b
    split_anew(model)
    if space == "weight":
        assert total.quadratic(model) == pytest.approx(0, abs=1e-12)
        same(reanchored(a, model) + b, total, 1e-12)
    move(model, 8)
    assert all(c.quadratic(model) > 1e-6 for c in (moved, b, total))


def test_reanchoring_needs_the_curvatures_own_model() -> None:
    a = known("llama")
    with pytest.raises(MismatchError, match="another base model"):
        reanchored(a, tiny("llama", seed=5))
    with pytest.raises(MismatchError, match="one rank"):
        reanchored(known("llama", "adapter"), tiny("llama", rank=3))
    assert reanchored(a, tiny("llama", rank=3)).anchor == {}


CONSOLIDATED: list[tuple[str, str, Any]] = [("weight", s, None) for s in STRUCTURES]
CONSOLIDATED += [("adapter", "tridiagonal", None), ("weight", "kfac", 2)]


@pytest.mark.parametrize(("space", "structure", "rank"), CONSOLIDATED)
def test_twenty_tasks_at_constant_memory(space: str, structure: str, rank: int | None) -> None:
    model, options = tiny("llama", moved=True), {"space": space, "rank": rank, "batch_size": 4}
    total = measure(model, 0, structure, **options)
    size, traces = total.memory(), {n: b.trace() for n, b in total.blocks.items()}
    for task in range(1, 20):
        move(model, task, size=0.05)
        new = measure(model, task, structure, **options)
        total = reanchored(total, model) + new
        traces = {n: t + new.blocks[n].trace() for n, t in traces.items()}
        assert total.memory() == size
        assert abs(total.quadratic(model)) < 1e-10
    assert total.info.merged == 20
    for name, block in total.blocks.items():
        assert block.trace() == pytest.approx(traces[name], rel=1e-9)
    definite(total.to_dense())
    assert len(total.anchor) == 14 and len(total.blocks) == (14 if space == "weight" else 28)
