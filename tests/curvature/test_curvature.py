"""The whole curvature: its value, its gradients, its gauge and the models it belongs to."""

from __future__ import annotations

from functools import cache
from typing import Any

import peft
import pytest
import torch
from torch import nn

from quadratics import dense_quadratic
from retain import Curvature, fit_curvature
from retain.data.sources import encode
from retain.errors import ConfigError, CurvatureError, MismatchError, ModelError, SourceError
from retain.models.sites import LinearSite, find_sites, lora_sites
from retain.types import SPACES
from tiny import KINDS, ROWS, STRUCTURES, base, move, relative, tiny

FIT = {"batch_size": 2, "progress": False, "seed": 2}
EACH = pytest.mark.parametrize(
    ("kind", "space", "structure"), [(k, p, s) for k in KINDS for p in SPACES for s in STRUCTURES]
)


@cache
def fitted(kind: str, moved: bool, space: str, structure: str) -> Curvature:
    return fit_curvature(tiny(kind, moved=moved), ROWS[kind], structure, space=space, **FIT)


@pytest.mark.parametrize("anchored", [False, True])
@EACH
def test_value_and_pulls_are_those_of_the_dense_quadratic(
    kind: str, space: str, structure: str, anchored: bool
) -> None:
    model, curvature = tiny(kind, moved=anchored), fitted(kind, anchored, space, structure)
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
    model, curvature = tiny(kind, moved=anchored), fitted(kind, anchored, space, structure)
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
    model, curvature = tiny(kind, moved=anchored), fitted(kind, anchored, "weight", structure)
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
    curvature = fitted("llama", anchored, "weight", structure)
    for rank in (1, 3):
        other = tiny("llama", rank=rank, moved=True)
        want = dense_quadratic(curvature, other).detach()
        assert relative(curvature.quadratic(other), want) < 1e-10


@pytest.mark.parametrize("structure", STRUCTURES)
def test_layers_of_several_ranks_and_anchors(structure: str) -> None:
    model = tiny("llama", targets=["q_proj", "v_proj", "down_proj"])
    sites = lora_sites(model)
    with torch.no_grad():
        for site in sites[:2]:
            site.b.add_(0.3)
    curvature = fit_curvature(model, ROWS["llama"], structure, **FIT)
    assert list(curvature.anchor) == [site.name for site in sites[:2]]
    move(model, seed=9)
    value = dense_quadratic(curvature, model)
    value.backward()
    nats, pulls = curvature.pulls(sites)
    assert relative(nats, value.detach()) < 1e-10
    assert all(relative(gradient, p.grad) < 1e-10 for p, gradient in pulls)


def test_load_anchor_brings_the_adapter_back() -> None:
    model = tiny("llama", moved=True)
    curvature = fit_curvature(model, ROWS["llama"], space="adapter", **FIT)
    move(model, seed=9)
    assert not curvature.at_anchor(lora_sites(model))
    curvature.load_anchor(model)
    assert curvature.at_anchor(lora_sites(model))
    assert curvature.quadratic(model) == 0.0


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "activation", "tridiagonal"])
def test_shared_inputs_are_kept_once(structure: str) -> None:
    curvature = fitted("llama", False, "weight", structure)
    blocks = curvature.blocks
    for layer in range(2):
        at = f"model.layers.{layer}."
        attention = {id(blocks[f"{at}self_attn.{n}_proj"].inputs) for n in "qkv"}
        mlp = {id(blocks[f"{at}mlp.{n}_proj"].inputs) for n in ("gate", "up")}
        others = {id(blocks[f"{at}{n}"].inputs) for n in ("self_attn.o_proj", "mlp.down_proj")}
        assert (len(attention), len(mlp), len(attention | mlp | others)) == (1, 1, 4)
    every = sum(8 * t.numel() for block in blocks.values() for t in block.tensors().values())
    for (i, j), link in curvature.links.items():
        shared = blocks[i].inputs is blocks[j].inputs
        assert shared is (link.inputs is blocks[i].inputs.dense())
        every += 8 * (link.outputs.numel() + (0 if shared else link.inputs.numel()))
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
        ({"rank": 0}, "rank is too small"),
        ({"rank": 2, "structure": "ekfac"}, "keeps no sketches"),
        ({"share": 0.0}, "the share is no share"),
        ({"share": 1.5}, "the share is no share"),
        ({"temperature": 0.0}, "the temperature is no temperature"),
        ({"temperature": float("nan")}, "the temperature is no temperature"),
        ({"calibrate": False, "share": 0.5}, "no true scale"),
    ],
)
def test_unknown_names_and_small_numbers_are_refused(options: dict, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        fit_curvature(tiny("llama"), ROWS["llama"], **{**FIT, **options})
    assert hint in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("LoHa", {}),
        ("LoKr", {}),
        ("AdaLora", {"total_step": 10}),
        ("Vera", {"r": 4}),
        ("IA3", {"feedforward_modules": []}),
    ],
)
def test_an_adapter_of_another_kind_is_named(kind: str, options: dict[str, Any]) -> None:
    config = getattr(peft, f"{kind}Config")(target_modules=["q_proj"], **options)
    model = peft.get_peft_model(base("llama", dtype=torch.float32), config)
    with pytest.raises(ModelError, match=f"no LoRA adapter; got: .* {kind.upper()}; .*LoraConfig"):
        fit_curvature(model, ROWS["llama"], **FIT)


def test_a_frozen_model_without_adapter_is_refused() -> None:
    with pytest.raises(ModelError, match="no LoRA adapter"):
        fit_curvature(base("llama").requires_grad_(False), ROWS["llama"], **FIT)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_model_without_adapter_has_the_curvature_of_its_weights(
    kind: str, structure: str
) -> None:
    # That of a LoRA update in weight space, at W in place of at zero.
    model = base(kind)
    curvature = fit_curvature(model, ROWS[kind], structure, **FIT)
    sites = find_sites(model)
    assert all(isinstance(site, LinearSite) for site in sites)
    want = fitted(kind, False, "weight", structure)
    assert list(curvature.blocks) == list(want.blocks) == list(curvature.anchor)
    dense = curvature.to_dense()
    assert relative(dense, want.to_dense()) < 1e-9
    assert curvature.quadratic(model) == 0.0

    shift(model, seed=9)
    value = dense_quadratic(curvature, model, dense)
    value.backward()
    nats, pulls = curvature.pulls(sites)
    assert nats > 0 and relative(nats, value.detach()) < 1e-10
    assert [id(p) for p, _ in pulls] == [id(site.weight) for site in sites]
    for parameter, gradient in pulls:
        assert relative(gradient, parameter.grad) < 1e-10
    curvature.load_anchor(model)
    assert curvature.at_anchor(sites)
    assert curvature.quadratic(model) == 0.0


def shift(model: nn.Module, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for site in find_sites(model):
            step = torch.randn(site.weight.shape, generator=random, dtype=torch.float64)
            site.weight.add_(0.1 * step)


def test_adapter_space_refuses_a_model_without_adapter() -> None:
    with pytest.raises(CurvatureError, match="plain LoRA factors"):
        fit_curvature(base("llama"), ROWS["llama"], space="adapter", **FIT)


def test_a_trained_model_and_an_adapter_do_not_share_a_curvature() -> None:
    with pytest.raises(MismatchError, match="no weights to hold"):
        fitted("llama", False, "weight", "kfac").quadratic(base("llama"))


def test_a_source_smaller_than_a_batch_is_refused() -> None:
    with pytest.raises(SourceError, match="smaller than one batch"):
        fit_curvature(tiny("llama"), ROWS["llama"], batch_size=5, progress=False)


def test_a_layer_that_gets_no_gradient_is_an_error() -> None:
    # With one position, attention does not depend on its query and key.
    with pytest.raises(CurvatureError, match="no gradient at all"):
        fit_curvature(tiny("llama"), [{"input_ids": [3, 7]}], batch_size=1, progress=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("structure", ["kfac", "activation", "shampoo"])
def test_rounded_factors_pull_nearly_as_whole_ones(kind: str, structure: str) -> None:
    model = tiny(kind).float()
    curvature = fit_curvature(model, ROWS[kind], structure, **FIT)
    move(model, seed=9)
    sites = curvature.bind(model)
    nats, pulls = curvature.pulls(sites)
    rounded, near = curvature.pulls(sites, rounded=True)
    assert rounded == pytest.approx(nats, rel=1e-2)
    assert rounded != nats
    assert all(p.parameter is n.parameter for p, n in zip(pulls, near, strict=True))
    exact, other = (torch.cat([p.gradient.flatten() for p in found]) for found in (pulls, near))
    assert 0 < relative(other, exact) < 2e-2
    assert curvature.pulls(sites)[0] == nats  # the factors themselves are as they were


@pytest.mark.parametrize("kind", KINDS)
def test_around_a_later_anchor_and_in_double_precision_nothing_is_rounded(kind: str) -> None:
    for model, moved in ((tiny(kind), False), (tiny(kind, moved=True).float(), True)):
        curvature = fit_curvature(model, ROWS[kind], "kfac", **FIT)
        move(model, seed=9)
        sites = curvature.bind(model)
        assert bool(curvature.anchor) is moved
        assert curvature.pulls(sites, rounded=True)[0] == curvature.pulls(sites)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_tokenised_rows_are_taken_as_they_are(kind: str) -> None:
    model = tiny(kind)
    ready = encode(ROWS[kind], None, max_length=16, causal=kind == "llama")
    want = fit_curvature(model, ROWS[kind], "kfac", **FIT)
    got = fit_curvature(model, ready, "kfac", **FIT)
    for name, block in want.blocks.items():
        for key, tensor in block.tensors().items():
            assert torch.equal(got.blocks[name].tensors()[key], tensor)
