"""Full fine-tuning: a curvature of a plain model's own linear weights.

That its value and pulls are those of the dense matrix, that it is nothing at the anchor, and that a
file keeps it, is in `test_properties` and `test_artifact`; the implicit step in `test_proximal`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from families import OLDER, built
from fits import definite, dense_quadratic, fit, known, same, tensors, text
from retain import reanchored
from retain.errors import CurvatureError, MismatchError, ModelError
from retain.models.sites import find_sites
from retain.retention.force import Force
from tiny import KINDS, STRUCTURES, base, move, relative, tiny

EACH = pytest.mark.parametrize(("kind", "structure"), [(k, s) for k in KINDS for s in STRUCTURES])
HEADS = {"llama": "lm_head", "bert": "classifier"}


@EACH
def test_a_plain_models_blocks_are_those_of_lora_at_its_start(kind: str, structure: str) -> None:
    model = base(kind)
    curvature = fit(model, kind, structure)
    same(curvature, known(kind, "weight", structure, moved=False))
    assert not any(HEADS[kind] in name for name in curvature.blocks)
    for name, (anchor,) in curvature.anchor.items():
        assert torch.equal(anchor, model.get_submodule(name).weight)
        assert anchor.data_ptr() != model.get_submodule(name).weight.data_ptr()
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@EACH
def test_the_force_is_that_of_the_dense_quadratic(kind: str, structure: str) -> None:
    model = base(kind)
    curvature = fit(model, kind, structure)
    retention = Force(model, curvature, strength=3.0)
    assert retention.add_force() == 0
    assert all(bool((p.grad == 0).all()) for p in retention.parameters())
    model.zero_grad()
    move(model, 0, size=0.1)
    value = dense_quadratic(curvature, model)
    value.backward()
    want = [3.0 * p.grad for p in retention.parameters()]
    model.zero_grad()
    assert retention.add_force() == pytest.approx(float(value.detach()), rel=1e-9)
    for p, gradient in zip(retention.parameters(), want, strict=True):
        assert relative(p.grad, gradient) < 1e-9
    held = {id(p) for p in retention.parameters()}
    assert len(held) == len(curvature.blocks)
    assert all(p.grad is None for p in model.parameters() if id(p) not in held)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_away_from_the_anchor(kind: str) -> None:
    model = base(kind)
    curvature = fit(model, kind)
    move(model, 0, size=1e-6)
    for other, said in ((model, "other values of its weights"), (base(kind, seed=5), "does not")):
        with pytest.raises(MismatchError, match=said):
            Force(other, curvature)
    assert 0 < Force(model, curvature, resuming=True).predicted() < 1e-6
    curvature.load_anchor(model)
    assert curvature.at_anchor(curvature.bind(model))
    assert Force(model, curvature).predicted() == 0


@pytest.mark.parametrize("structure", STRUCTURES)
def test_lora_and_plain_models(structure: str) -> None:
    plain, lora = base("llama"), tiny("llama")
    of_plain = fit(plain, "llama", structure)
    of_lora = known("llama", "weight", structure, moved=False)
    # LoRA's own update is a displacement from the weights that the plain model is held at.
    move(lora, 3)
    assert of_plain.quadratic(lora) == pytest.approx(of_lora.quadratic(lora), rel=1e-9)
    assert of_plain.quadratic(lora) > 0
    for other in (of_lora, known("llama", "weight", structure), known("llama", "adapter")):
        with pytest.raises(MismatchError, match=r"no weights to hold|one rank"):
            other.quadratic(plain)
    with pytest.raises(CurvatureError, match="needs plain LoRA factors; got: a fully trained"):
        fit(plain, "llama", structure, space="adapter")
    with pytest.raises(MismatchError, match="another base model"):
        of_plain.quadratic(tiny("llama", seed=5))
    with pytest.raises(MismatchError, match="anchors do not add"):
        of_plain + of_lora


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
    model = base(kind)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    same(fit(model.train(), kind, structure), known(kind, "weight", structure, moved=False))
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_lower_precision(kind: str, dtype: torch.dtype) -> None:
    model: Any = base(kind, dtype=dtype)
    curvature = fit(model, kind, fisher="empirical")
    kept = [t for (t,) in curvature.anchor.values()]
    assert {t.dtype for t in [*tensors(curvature), *kept]} == {torch.float32}
    retention = Force(model, curvature, 1.0, update="proximal")
    assert retention.predicted() == 0
    move(model, 0, size=0.1)
    before = retention.predicted()
    assert retention.apply_proximal(torch.optim.SGD(model.parameters(), lr=1.0)) < before
    assert {p.dtype for p in retention.parameters()} == {dtype}


@pytest.mark.parametrize("structure", STRUCTURES)
def test_tasks_add_up_around_the_trained_weights(structure: str) -> None:
    model = base("llama")
    total = fit(model, "llama", structure, source=text(0))
    size, traces = total.memory(), {n: b.trace() for n, b in total.blocks.items()}
    for task in range(1, 4):
        move(model, task, size=0.1)
        new = fit(model, "llama", structure, source=text(task))
        traces = {n: t + new.blocks[n].trace() for n, t in traces.items()}
        with pytest.raises(MismatchError, match="do not add"):
            total + new
        total = reanchored(total, model) + new
        assert total.memory() == size
        assert total.quadratic(model) == 0
    for name, block in total.blocks.items():
        assert block.trace() == pytest.approx(traces[name], rel=1e-9)
    definite(total.to_dense())
    assert len(find_sites(tiny("llama"))) == len(total.blocks)


def test_weights_that_are_kept_transposed_are_named() -> None:
    with pytest.raises(ModelError, match=r"full fine-tuning; got: 8 layers.*Conv1D.*c_attn"):
        fit(built(AutoModelForCausalLM, "GPT2", **OLDER), "llama")
