"""The whole curvature: its value, its gradients, its gauge and the models it belongs to."""

from __future__ import annotations

import pytest
import torch

from retain import Curvature, fit_curvature
from retain.errors import ConfigError, CurvatureError, MismatchError, ModelError, SourceError
from retain.models.adapter import lora_sites
from retain.types import SPACES, STRUCTURES
from tiny import KINDS, ROWS, base, move, relative, tiny

FIT = {"batch_size": 2, "progress": False, "seed": 2}
EACH = pytest.mark.parametrize(
    ("kind", "space", "structure"), [(k, p, s) for k in KINDS for p in SPACES for s in STRUCTURES]
)


def dense_quadratic(curvature: Curvature, model: torch.nn.Module) -> torch.Tensor:
    """The quadratic in the model's own A and B, written with dense blocks, for autograd."""
    total = torch.zeros((), dtype=torch.float64)
    for site in lora_sites(model):
        if curvature.info.space == "weight":
            d = site.scaling * site.b @ site.a
            if site.name in curvature.anchor:
                b0, a0 = curvature.anchor[site.name]
                d = d - b0 @ a0
            moves = {site.name: d}
        else:
            b0, a0 = curvature.anchor[site.name]
            moves = {f"{site.name}.lora_A": site.a - a0, f"{site.name}.lora_B": site.b - b0}
        for name, d in moves.items():
            v = d.reshape(-1)
            total = total + 0.5 * v @ curvature.blocks[name].to_dense() @ v
    return total


@pytest.mark.parametrize("anchored", [False, True])
@EACH
def test_value_and_pulls_are_those_of_the_dense_quadratic(
    kind: str, space: str, structure: str, anchored: bool
) -> None:
    model = tiny(kind, moved=anchored)
    curvature = fit_curvature(model, ROWS[kind], structure, space=space, **FIT)
    assert bool(curvature.anchor) is (anchored or space == "adapter")
    move(model, seed=9)
    value = dense_quadratic(curvature, model)
    value.backward()
    nats, pulls = curvature.pulls(lora_sites(model))
    assert relative(nats, value.detach()) < 1e-10
    assert nats > 0
    assert len(pulls) == 2 * len(lora_sites(model))
    for parameter, gradient in pulls:
        assert relative(gradient, parameter.grad) < 1e-10
        parameter.grad = None


@pytest.mark.parametrize("anchored", [False, True])
@EACH
def test_value_is_zero_at_the_anchor(kind: str, space: str, structure: str, anchored: bool) -> None:
    model = tiny(kind, moved=anchored)
    curvature = fit_curvature(model, ROWS[kind], structure, space=space, **FIT)
    nats, pulls = curvature.pulls(lora_sites(model))
    exact = space == "adapter" or not anchored
    assert abs(nats) <= (0.0 if exact else 1e-14)
    assert max(float(g.abs().max()) for _, g in pulls) <= (0.0 if exact else 1e-13)


@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_weight_space_does_not_see_how_the_update_is_split(
    kind: str, structure: str, anchored: bool
) -> None:
    model = tiny(kind, moved=anchored)
    curvature = fit_curvature(model, ROWS[kind], structure, **FIT)
    move(model, seed=9)
    before = curvature.quadratic(model)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for site in lora_sites(model):
            r = torch.eye(site.rank) * 2 + torch.randn(site.rank, site.rank, generator=random)
            r = r.double()
            site.b.copy_(site.b @ r)
            site.a.copy_(torch.linalg.solve(r, site.a))
    assert before > 0
    assert relative(curvature.quadratic(model), before) < 1e-10


def test_adapter_space_does_see_how_the_update_is_split() -> None:
    model = tiny("llama", moved=True)
    curvature = fit_curvature(model, ROWS["llama"], space="adapter", **FIT)
    with torch.no_grad():
        for site in lora_sites(model):
            site.b.mul_(2)
            site.a.div_(2)
    assert curvature.quadratic(model) > 0


@EACH
@pytest.mark.parametrize("anchored", [False, True])
def test_proximal_step_is_a_minimum_in_each_half(
    kind: str, space: str, structure: str, anchored: bool
) -> None:
    model = tiny(kind, moved=anchored)
    curvature = fit_curvature(model, ROWS[kind], structure, space=space, **FIT)
    move(model, seed=9)
    tau_b, tau_a = 0.7, 1.3
    site = lora_sites(model)[1]
    a, b = site.a.detach().clone(), site.b.detach().clone()
    curvature.proximal(site, tau_b, tau_a)
    new_a, new_b = site.a.detach().clone(), site.b.detach().clone()

    def pull(which: str) -> torch.Tensor:
        model.zero_grad()
        dense_quadratic(curvature, model).backward()
        return (site.a if which == "a" else site.b).grad

    # First B at the old A, then A at the new B.
    with torch.no_grad():
        site.a.copy_(a)
    assert relative(new_b - b, -tau_b * pull("b")) < 1e-9
    with torch.no_grad():
        site.a.copy_(new_a)
    if space == "adapter" and not anchored and structure != "identity":
        assert relative(new_a, a) < 1e-14
    else:
        assert relative(new_a - a, -tau_a * pull("a")) < 1e-9


@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_proximal_step_never_makes_the_quadratic_grow(
    structure: str, space: str, anchored: bool
) -> None:
    model = tiny("llama", moved=anchored)
    curvature = fit_curvature(model, ROWS["llama"], structure, space=space, **FIT)
    for power in range(-3, 13):
        move(model, seed=power + 3)
        before = curvature.quadratic(model)
        for site in lora_sites(model):
            curvature.proximal(site, 10.0**power, 10.0**power)
        assert 0 <= curvature.quadratic(model) + 1e-12 <= before + 1e-12


@pytest.mark.parametrize("space", SPACES)
def test_another_base_model_is_refused(space: str) -> None:
    curvature = fit_curvature(tiny("llama"), ROWS["llama"], space=space, **FIT)
    for other in (tiny("llama", seed=5), tiny("bert")):
        with pytest.raises(MismatchError, match="another base model"):
            curvature.quadratic(other)


def test_one_changed_base_weight_is_another_base_model() -> None:
    model = tiny("llama")
    curvature = fit_curvature(model, ROWS["llama"], **FIT)
    with torch.no_grad():
        lora_sites(model)[3].layer.base_layer.weight[0, 0] += 0.1
    with pytest.raises(MismatchError, match="another base model"):
        curvature.quadratic(model)


@pytest.mark.parametrize("space", SPACES)
def test_other_target_modules_are_refused(space: str) -> None:
    curvature = fit_curvature(tiny("llama"), ROWS["llama"], space=space, **FIT)
    with pytest.raises(MismatchError, match="other layers"):
        curvature.quadratic(tiny("llama", targets=["q_proj", "down_proj"]))


def test_adapter_space_refuses_another_rank() -> None:
    curvature = fit_curvature(tiny("llama"), ROWS["llama"], space="adapter", **FIT)
    with pytest.raises(MismatchError, match="one rank and scaling"):
        curvature.quadratic(tiny("llama", rank=3))


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("anchored", [False, True])
def test_weight_space_fits_any_rank(structure: str, anchored: bool) -> None:
    curvature = fit_curvature(tiny("llama", moved=anchored), ROWS["llama"], structure, **FIT)
    for rank in (1, 3):
        other = tiny("llama", rank=rank, moved=True)
        want = dense_quadratic(curvature, other).detach()
        assert relative(curvature.quadratic(other), want) < 1e-10


def test_load_anchor_brings_the_adapter_back() -> None:
    model = tiny("llama", moved=True)
    curvature = fit_curvature(model, ROWS["llama"], space="adapter", **FIT)
    move(model, seed=9)
    assert not curvature.at_anchor(lora_sites(model))
    curvature.load_anchor(model)
    assert curvature.at_anchor(lora_sites(model))
    assert curvature.quadratic(model) == 0.0


def test_shared_inputs_are_kept_once() -> None:
    model = tiny("llama")
    curvature = fit_curvature(model, ROWS["llama"], "kfac", **FIT)
    blocks = curvature.blocks
    for layer in range(2):
        at = f"model.layers.{layer}."
        attention = {blocks[f"{at}self_attn.{n}_proj"].inputs.data_ptr() for n in "qkv"}
        mlp = {blocks[f"{at}mlp.{n}_proj"].inputs.data_ptr() for n in ("gate", "up")}
        others = {
            blocks[f"{at}{n}"].inputs.data_ptr() for n in ("self_attn.o_proj", "mlp.down_proj")
        }
        assert (len(attention), len(mlp), len(attention | mlp | others)) == (1, 1, 4)
    every = sum(block.memory() for block in blocks.values())
    assert curvature.memory() == every - 2 * 8 * (2 * 8 * 8 + 8 * 8)


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"structure": "kfca"}, "did you mean 'kfac'"),
        ({"structure": "diag"}, "did you mean 'diagonal'"),
        ({"space": "weights"}, "did you mean 'weight'"),
        ({"fisher": "emprical"}, "did you mean 'empirical'"),
        ({"samples": 0}, "samples is too small"),
        ({"rows": 0}, "rows is too small"),
        ({"batch_size": 0}, "batch_size is too small"),
    ],
)
def test_unknown_names_and_small_numbers_are_refused(options: dict, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        fit_curvature(tiny("llama"), ROWS["llama"], **{**FIT, **options})
    assert hint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_base_model_without_adapter_is_refused() -> None:
    with pytest.raises(ModelError, match="no LoRA adapter"):
        fit_curvature(base("llama"), ROWS["llama"], **FIT)


def test_a_source_smaller_than_a_batch_is_refused() -> None:
    with pytest.raises(SourceError, match="smaller than one batch"):
        fit_curvature(tiny("llama"), ROWS["llama"], batch_size=5, progress=False)


def test_a_layer_that_gets_no_gradient_is_an_error() -> None:
    # With one position, attention does not depend on its query and key.
    with pytest.raises(CurvatureError, match="no gradient at all"):
        fit_curvature(tiny("llama"), [{"input_ids": [3, 7]}], batch_size=1, progress=False)
