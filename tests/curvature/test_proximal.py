"""The implicit step of a whole curvature: each weight's own problem, one after the other."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from fits import dense_quadratic, fit, known
from retain import Curvature
from retain.curvature.anchor import anchors_for_steps, proximal
from retain.models.sites import Site, find_sites, lora_sites
from retain.types import SPACES
from tiny import KINDS, STRUCTURES, base, move, relative, tiny

EACH = pytest.mark.parametrize(
    ("kind", "space", "structure", "anchored"),
    [(k, p, s, m) for k in KINDS for p in SPACES for s in STRUCTURES for m in (False, True)],
)


def stepped(curvature: Curvature) -> Curvature:
    """What a step is of: the curvature, or the bound of one with links."""
    if not curvature.links:
        return curvature
    return 2.0 * Curvature(curvature.blocks, curvature.anchor, curvature.info)


def parts(site: Site) -> list[nn.Parameter]:
    """What a site trains, in the order of the steps."""
    return [site.b, site.a] if hasattr(site, "lora_a") else [site.weight]


def taus(sites: list[Site], seed: int) -> dict[int, float]:
    """A step of its own for each weight."""
    random = torch.Generator().manual_seed(seed)
    return {id(p): float(torch.rand((), generator=random)) for s in sites for p in parts(s)}


@EACH
def test_a_step_is_a_minimum_in_each_half(
    kind: str, space: str, structure: str, anchored: bool
) -> None:
    model = tiny(kind, moved=anchored)
    curvature = known(kind, space, structure, anchored)
    bound = stepped(curvature)
    full = bound.to_dense()
    move(model, seed=9)
    tau_b, tau_a = 0.7, 1.3
    sites = lora_sites(model)
    site, before = sites[1], deepcopy(model)
    a, b = site.a.detach().clone(), site.b.detach().clone()
    nats = proximal(curvature, sites, {id(site.b): tau_b, id(site.a): tau_a})
    assert (nats is not None) == (space == "weight" and structure in ("kfac", "shampoo"))
    if nats is not None:
        assert float(nats) == pytest.approx(curvature.quadratic(model), rel=1e-9)
    new_a, new_b = site.a.detach().clone(), site.b.detach().clone()
    for old, new in zip(lora_sites(before), sites, strict=True):
        if new is not site:
            assert relative(new.a.detach(), old.a.detach()) < 1e-14
            assert relative(new.b.detach(), old.b.detach()) < 1e-14

    def pull(parameter: nn.Parameter) -> Tensor:
        model.zero_grad()
        dense_quadratic(bound, model, full).backward()
        return parameter.grad

    # First B at the old A, then A at the new B.
    with torch.no_grad():
        site.a.copy_(a)
    assert relative(new_b - b, -tau_b * pull(site.b)) < 1e-9
    with torch.no_grad():
        site.a.copy_(new_a)
    if space == "adapter" and not anchored and structure != "identity":
        assert relative(new_a, a) < 1e-14
    else:
        assert relative(new_a - a, -tau_a * pull(site.a)) < 1e-9


@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_some_rows_take_the_step_of_their_own_problem(structure: str, anchored: bool) -> None:
    """While the others stay, wherever these are."""
    model, rows = tiny("llama", moved=anchored), slice(1, None)
    curvature = known("llama", "weight", structure, anchored)
    bound = stepped(curvature)
    full = bound.to_dense()
    move(model, seed=9)
    tau_b, tau_a = 0.7, 1.3
    sites = lora_sites(model)
    site = sites[1]
    a, b = site.a.detach().clone(), site.b.detach().clone()
    held = anchors_for_steps(curvature, sites, rows)
    proximal(curvature, sites, {id(site.b): tau_b, id(site.a): tau_a}, rows, held)
    new_a, new_b = site.a.detach().clone(), site.b.detach().clone()
    for parameter, other, moved, tau, place in (
        (site.b, a, new_b - b, tau_b, (slice(None), rows)),
        (site.a, new_a, new_a - a, tau_a, rows),
    ):
        with torch.no_grad():
            site.a.copy_(other)
        model.zero_grad()
        dense_quadratic(bound, model, full).backward()
        wanted = torch.zeros_like(moved)
        wanted[place] = -tau * parameter.grad[place]
        assert relative(moved, wanted) < 1e-9


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_full_weights_is_a_minimum(kind: str, structure: str) -> None:
    model = base(kind)
    curvature = fit(model, kind, structure)
    sites = find_sites(model)
    move(model, seed=3, size=0.1)
    for site in (sites[0], sites[3], sites[-1]):
        before = site.weight.detach().clone()
        proximal(curvature, sites, {id(site.weight): 1.7})
        model.zero_grad()
        dense_quadratic(stepped(curvature), model).backward()
        assert relative(site.weight.detach() - before, -1.7 * site.weight.grad) < 1e-9


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_all_sites_at_once_are_one_after_the_other(structure: str, space: str) -> None:
    together, apart = (tiny("llama", moved=True) for _ in range(2))
    curvature = known("llama", space, structure, True)
    for model in (together, apart):
        move(model, seed=9)
    proximal(curvature, lora_sites(together), taus(lora_sites(together), seed=1))
    sites = lora_sites(apart)
    steps = taus(sites, seed=1)
    for site in sites:
        for parameter in parts(site):
            proximal(curvature, sites, {id(parameter): steps[id(parameter)]})
    for one, two in zip(lora_sites(together), sites, strict=True):
        assert relative(one.a.detach(), two.a.detach()) < 1e-12
        assert relative(one.b.detach(), two.b.detach()) < 1e-12


@EACH
def test_a_step_never_makes_the_quadratic_grow(
    kind: str, space: str, structure: str, anchored: bool
) -> None:
    model, curvature = tiny(kind, moved=anchored), known(kind, space, structure, anchored)
    sites = lora_sites(model)
    for power in range(-3, 13):
        move(model, seed=power + 3)
        before = curvature.quadratic(model)
        proximal(curvature, sites, {id(p): 10.0**power for s in sites for p in parts(s)})
        after = curvature.quadratic(model)
        assert -1e-12 <= after <= before * (1 + 1e-12) + 1e-12, power
        assert all(bool(p.isfinite().all()) for s in sites for p in parts(s))


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_frozen_weights_stay(structure: str, space: str) -> None:
    model = tiny("llama", moved=True)
    move(model, seed=9)
    sites = lora_sites(model)
    sites[0].a.requires_grad_(False)
    sites[1].b.requires_grad_(False)
    frozen = [sites[0].a.detach().clone(), sites[1].b.detach().clone()]
    steps = {id(p): 1.0 for s in sites for p in parts(s)}
    proximal(known("llama", space, structure, True), sites, steps)
    assert torch.equal(sites[0].a, frozen[0])
    assert torch.equal(sites[1].b, frozen[1])
