"""Many tasks in one curvature: which ones add, anchors that move, and constant memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from retain import Curvature, load_curvature, reanchored
from retain.errors import MismatchError
from retain.models.sites import lora_sites
from retain.retention.force import Force
from retain.types import SPACES
from sums import definite, fit, measure, same
from tiny import KINDS, STRUCTURES, move, tiny

SOME = pytest.mark.parametrize(
    ("kind", "space", "structure"),
    [(k, p, s) for k, p in zip(KINDS, SPACES, strict=True) for s in STRUCTURES],
)


def split_anew(model: nn.Module) -> None:
    """The same updates from other factors: (B R, R^-1 A)."""
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for site in lora_sites(model):
            r = torch.randn(site.rank, site.rank, generator=random, dtype=site.b.dtype)
            r = r + 2 * torch.eye(site.rank, dtype=site.b.dtype)
            site.b.copy_(site.b @ r)
            site.a.copy_(torch.linalg.solve(r, site.a))


# --- what adds ---


@pytest.mark.parametrize(
    ("other", "what", "got"),
    [
        ({"structure": "shampoo"}, "structures", "kfac and shampoo"),
        ({"structure": "tridiagonal"}, "structures", "kfac and tridiagonal"),
        ({"space": "adapter"}, "spaces", "weight and adapter"),
        ({"fisher": "empirical"}, "Fishers", "mc and empirical"),
        ({"rank": 2}, "ranks of sketches", "None and 2"),
    ],
)
def test_fits_of_other_settings_do_not_add(other: dict, what: str, got: str) -> None:
    a = fit("llama", "weight", "kfac", 1)
    b = fit(**{"kind": "llama", "space": "weight", "structure": "kfac", "seed": 1} | other)
    for pair, names in (((a, b), got), ((b, a), " and ".join(reversed(got.split(" and "))))):
        with pytest.raises(MismatchError, match=f"different {what} do not add") as caught:
            pair[0] + pair[1]
        assert f"got: {names}" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_tempered_fits_of_other_temperatures_do_not_add() -> None:
    a, b = (fit("llama", "weight", "kfac", 1, fisher="tempered", temperature=t) for t in (2.0, 3.0))
    assert (a + a).info.temperature == 2
    with pytest.raises(MismatchError, match="different temperatures do not add"):
        a + b


@pytest.mark.parametrize("structure", STRUCTURES)
def test_fits_of_other_models_do_not_add(structure: str) -> None:
    a = fit("llama", "weight", structure, 1)
    for model, what in (
        (tiny("llama", moved=True, seed=5), "base models"),
        (tiny("bert", moved=True), "base models"),
        (tiny("llama", moved=True, targets=["q_proj", "down_proj"]), "layers"),
    ):
        with pytest.raises(MismatchError, match=f"different {what} do not add"):
            a + measure(model, 1, structure)


@SOME
def test_fits_around_other_anchors_do_not_add(kind: str, space: str, structure: str) -> None:
    a, away = fit(kind, space, structure, 1), tiny(kind, moved=True)
    move(away, 4, size=1e-3)
    b = measure(away, 2, structure, space=space)
    for x, y in ((a, b), (b, a), (a, fit(kind, space, structure, 2, False))):
        with pytest.raises(MismatchError, match=r"different anchors do not add; .*reanchored"):
            x + y


def test_a_curvature_adds_to_nothing_else() -> None:
    with pytest.raises(TypeError):
        fit("llama", "weight", "kfac", 1) + 1
    with pytest.raises(TypeError):
        sum([fit("llama", "weight", "kfac", 1)])


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_split_of_an_update_is_no_part_of_the_anchor(structure: str) -> None:
    model = tiny("llama", moved=True)
    a, c = (measure(model, 1, structure, space=space) for space in ("weight", "adapter"))
    split_anew(model)
    b, d = (measure(model, 2, structure, space=space) for space in ("weight", "adapter"))
    same(a + b, a + fit("llama", "weight", structure, 2), 1e-6)
    assert (a + b).quadratic(model) == pytest.approx(0, abs=1e-12)
    with pytest.raises(MismatchError, match="different anchors"):
        c + d

    # At B = 0 there is no update, whatever A or the rank.
    e = measure(tiny("llama"), 1, structure) + measure(tiny("llama", seed=0, rank=3), 2, structure)
    assert e.anchor == {}


@SOME
def test_a_loaded_curvature_is_as_good_as_a_fresh_one(
    kind: str, space: str, structure: str, tmp_path: Path
) -> None:
    a, b = fit(kind, space, structure, 1), fit(kind, space, structure, 2)
    total = a + b
    x, y, z = (
        load_curvature(c.save(tmp_path / f"{n}.safetensors")) for n, c in enumerate((a, b, total))
    )
    for again in (x + b, a + y, x + y, z):
        same(again, total, 1e-12)
        assert again.memory() == total.memory()
        assert again.info.merge_loss == pytest.approx(total.info.merge_loss, abs=1e-8)
    assert torch.equal(z.to_dense(), total.to_dense())


# --- anchors that move ---


@SOME
def test_reanchoring_moves_the_zero(kind: str, space: str, structure: str) -> None:
    model = tiny(kind, moved=True)
    a = measure(model, 1, structure, space=space)
    move(model, 7)
    assert a.quadratic(model) > 1e-6
    moved = reanchored(a, model)
    assert a.quadratic(model) > 1e-6
    for name, block in a.blocks.items():
        assert moved.blocks[name] is block
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
    for c in (moved, b, total):
        assert c.quadratic(model) > 1e-6


def test_reanchoring_needs_the_curvatures_own_model() -> None:
    a = fit("llama", "weight", "kfac", 1)
    with pytest.raises(MismatchError, match="another base model"):
        reanchored(a, tiny("llama", seed=5))
    with pytest.raises(MismatchError, match="one rank"):
        reanchored(fit("llama", "adapter", "kfac", 1), tiny("llama", rank=3))
    assert reanchored(a, tiny("llama", rank=3)).anchor == {}


CONSOLIDATED = [("weight", s, None) for s in STRUCTURES]
CONSOLIDATED += [("adapter", "tridiagonal", None), ("weight", "kfac", 2)]


@pytest.mark.parametrize(("space", "structure", "rank"), CONSOLIDATED)
def test_twenty_tasks_at_constant_memory(space: str, structure: str, rank: int | None) -> None:
    model, options = tiny("llama", moved=True), {"space": space, "rank": rank, "batch_size": 4}
    total = measure(model, 0, structure, **options)
    size, traces = total.memory(), {n: b.trace() for n, b in total.blocks.items()}
    for task in range(1, 20):
        retention = Force(model, total, 1.0, update="proximal")
        optimizer = torch.optim.SGD(retention.parameters(), lr=0.1)
        move(model, task, size=0.05)
        before = retention.predicted()
        assert 0 <= retention.apply_proximal(optimizer) < 2 * before
        new = measure(model, task, structure, **options)
        total = reanchored(total, model) + new
        traces = {n: t + new.blocks[n].trace() for n, t in traces.items()}
        assert total.memory() == size
        assert abs(total.quadratic(model)) < 1e-10
    assert total.info.merged == 20
    for name, block in total.blocks.items():
        assert block.trace() == pytest.approx(traces[name], rel=1e-9)
    definite(total.to_dense())
    files = [len(set(names)) for names in (total.blocks, total.anchor)]
    assert files[1] == 14 and files[0] == (14 if space == "weight" else 28)


def test_the_anchor_of_a_sum_is_that_of_its_parts() -> None:
    a, b = fit("llama", "weight", "kfac", 1), fit("llama", "weight", "kfac", 2)
    total: Curvature = a + b
    assert set(total.anchor) == set(a.anchor)
    model = tiny("llama", moved=True)
    move(model, 6)
    loss = total.info.merge_loss
    parts = a.quadratic(model) + b.quadratic(model)
    assert total.quadratic(model) == pytest.approx(parts, rel=10 * loss)
    assert 0 < loss < 0.5
