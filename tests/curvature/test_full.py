"""Full fine-tuning: a curvature of a plain model's own linear weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quadratics import dense_quadratic
from retain import Curvature, fit_curvature, load_curvature, reanchored
from retain.errors import CurvatureError, MismatchError, ModelError
from retain.models.sites import find_sites, lora_sites
from retain.retention.force import Force
from sums import definite, same, text
from tiny import KINDS, ROWS, STRUCTURES, base, move, relative, tiny

EACH = pytest.mark.parametrize(("kind", "structure"), [(k, s) for k in KINDS for s in STRUCTURES])
HEADS = {"llama": "lm_head", "bert": "classifier"}


def fit(model: nn.Module, kind: str, structure: str = "kfac", **options: Any) -> Curvature:
    options = {"batch_size": 2, "seed": 2, "progress": False} | options
    return fit_curvature(model, options.pop("source", ROWS[kind]), structure, **options)


def train(model: nn.Module, seed: int = 0, size: float = 0.1) -> nn.Module:
    """Moves each weight that is held."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for site in find_sites(model):
            step = torch.randn(site.shape, generator=random, dtype=torch.float64)
            site.weight.add_((size * step).to(site.weight.dtype))
    return model


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {site.name: site.weight.detach().clone() for site in find_sites(model)}


@EACH
def test_a_plain_models_blocks_are_those_of_lora_at_its_start(kind: str, structure: str) -> None:
    model = base(kind)
    curvature = fit(model, kind, structure)
    same(curvature, fit(tiny(kind), kind, structure))
    assert not any(HEADS[kind] in name for name in curvature.blocks)
    for name, (anchor,) in curvature.anchor.items():
        assert torch.equal(anchor, model.get_submodule(name).weight)
        assert anchor.data_ptr() != model.get_submodule(name).weight.data_ptr()
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@EACH
def test_value_and_force_are_those_of_the_dense_quadratic(kind: str, structure: str) -> None:
    model = base(kind)
    curvature = fit(model, kind, structure)
    retention = Force(model, curvature, strength=3.0)
    assert retention.predicted() == 0
    retention.add_force()
    assert all(bool((p.grad == 0).all()) for p in retention.parameters())
    model.zero_grad()

    train(model)
    value = dense_quadratic(curvature, model)
    value.backward()
    want = [3.0 * p.grad for p in retention.parameters()]
    model.zero_grad()
    assert retention.add_force() == pytest.approx(float(value), rel=1e-9)
    assert curvature.quadratic(model) == pytest.approx(float(value), rel=1e-9)
    for p, gradient in zip(retention.parameters(), want, strict=True):
        assert relative(p.grad, gradient) < 1e-9
    held = {id(p) for p in retention.parameters()}
    assert len(held) == len(curvature.blocks)
    assert all(p.grad is None for p in model.parameters() if id(p) not in held)


@pytest.mark.parametrize("strength", [1e-3, 1.0, 1e6])
@EACH
def test_proximal_step(kind: str, structure: str, strength: float) -> None:
    model = base(kind)
    curvature = fit(model, kind, structure)
    retention = Force(model, curvature, strength, update="proximal")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    train(model)
    before, old = retention.predicted(), weights(model)
    frozen = {n: p.clone() for n, p in model.named_parameters() if n[:-7] not in old}
    bound = 2 if curvature.links else 1  # between linked blocks it is twice the blocks
    assert 0 <= retention.apply_proximal(optimizer) < bound * before
    for name, new in weights(model).items():
        d = new - curvature.anchor[name][0]
        pull = bound * 0.5 * strength * curvature.blocks[name].matvec(d)
        size = float(old[name].abs().max() + pull.abs().max())
        slack = 1e-9 * size + 1e-14 * strength  # of the rounding of d, which the strength magnifies
        assert float((new - old[name] + pull).abs().max()) < slack, name
    for name, p in model.named_parameters():
        assert name not in frozen or torch.equal(p, frozen[name])


@EACH
def test_a_file_keeps_the_anchor(kind: str, structure: str, tmp_path: Path) -> None:
    model = base(kind)
    curvature, start = fit(model, kind, structure), weights(model)
    again = load_curvature(curvature.save(tmp_path / "c.safetensors"))
    same(again, curvature, 1e-15)
    assert again.info == curvature.info
    assert again.memory() == curvature.memory()
    assert set(again.anchor) == set(start)
    for name, (anchor,) in again.anchor.items():
        assert torch.equal(anchor, start[name])
    assert again.quadratic(model) == 0
    train(model)
    assert again.quadratic(model) == pytest.approx(curvature.quadratic(model), rel=1e-12)
    again.load_anchor(model)
    assert again.quadratic(model) == 0
    assert all(torch.equal(w, start[name]) for name, w in weights(model).items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_away_from_the_anchor(kind: str) -> None:
    model = base(kind)
    curvature = fit(model, kind)
    train(model, size=1e-6)
    with pytest.raises(MismatchError, match=r"does not start where .* other values of its weights"):
        Force(model, curvature)
    with pytest.raises(MismatchError, match="does not start where"):
        Force(base(kind, seed=5), curvature)
    retention = Force(model, curvature, resuming=True)
    assert 0 < retention.predicted() < 1e-6
    curvature.load_anchor(model)
    assert Force(model, curvature).predicted() == 0


@pytest.mark.parametrize("structure", STRUCTURES)
def test_lora_and_plain_models(structure: str) -> None:
    plain, lora = base("llama"), tiny("llama")
    of_plain, of_lora = fit(plain, "llama", structure), fit(lora, "llama", structure)
    # LoRA's own update is a displacement from the weights that the plain model is held at.
    move(lora, 3)
    assert of_plain.quadratic(lora) == pytest.approx(of_lora.quadratic(lora), rel=1e-9)
    assert of_plain.quadratic(lora) > 0
    with pytest.raises(MismatchError, match="no weights to hold a fully trained model at"):
        of_lora.quadratic(plain)
    with pytest.raises(MismatchError, match="no weights to hold"):
        fit(tiny("llama", moved=True), "llama", structure).quadratic(plain)
    with pytest.raises(MismatchError, match=r"no weights to hold|one rank"):
        fit(lora, "llama", structure, space="adapter").quadratic(plain)
    with pytest.raises(CurvatureError, match="needs plain LoRA factors; got: a fully trained"):
        fit(plain, "llama", structure, space="adapter")
    other = tiny("llama", seed=5)
    with pytest.raises(MismatchError, match="another base model"):
        of_plain.quadratic(other)
    with pytest.raises(MismatchError, match="anchors do not add"):
        of_plain + fit(tiny("llama"), "llama", structure)


def test_frozen_layers_are_left_out() -> None:
    model = base("llama")
    for name, p in model.named_parameters():
        p.requires_grad_("layers.1" in name)
    curvature = fit(model, "llama")
    assert len(curvature.blocks) == 7
    assert all("layers.1" in name for name in curvature.blocks)
    assert all(p.requires_grad is ("layers.1" in n) for n, p in model.named_parameters())
    with pytest.raises(MismatchError, match="other layers"):
        curvature.quadratic(base("llama"))
    with pytest.raises(ModelError, match="no LoRA adapter"):
        fit(model.requires_grad_(False), "llama")


@pytest.mark.parametrize("reentrant", [True, False])
@EACH
def test_gradient_checkpointing(kind: str, structure: str, reentrant: bool) -> None:
    want, model = fit(base(kind), kind, structure), base(kind)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    same(fit(model.train(), kind, structure), want)
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_lower_precision(kind: str, dtype: torch.dtype) -> None:
    model = base(kind, dtype=dtype)
    curvature = fit(model, kind, fisher="empirical")
    assert {t.dtype for b in curvature.blocks.values() for t in b.tensors().values()} == {
        torch.float32
    }
    assert {t.dtype for (t,) in curvature.anchor.values()} == {torch.float32}
    retention = Force(model, curvature, 1.0, update="proximal")
    assert retention.predicted() == 0
    train(model)
    before = retention.predicted()
    assert retention.apply_proximal(torch.optim.SGD(model.parameters(), lr=1.0)) < before
    assert {p.dtype for p in retention.parameters()} == {dtype}


@pytest.mark.parametrize("structure", STRUCTURES)
def test_tasks_add_up_around_the_trained_weights(structure: str) -> None:
    model = base("llama")
    total = fit(model, "llama", structure, source=text(0))
    size, traces = total.memory(), {n: b.trace() for n, b in total.blocks.items()}
    for task in range(1, 4):
        train(model, seed=task)
        new = fit(model, "llama", structure, source=text(task))
        traces = {n: t + new.blocks[n].trace() for n, t in traces.items()}
        with pytest.raises(MismatchError, match="do not add"):
            total + new
        total = reanchored(total, model) + new
        assert total.memory() == size
        assert total.quadratic(model) == 0
        assert Force(model, total).predicted() == 0
    for name, block in total.blocks.items():
        assert block.trace() == pytest.approx(traces[name], rel=1e-9)
    definite(total.to_dense())
    assert len(lora_sites(tiny("llama"))) == len(total.blocks)
