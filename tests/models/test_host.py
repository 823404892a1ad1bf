"""What the host has switched on does not reach what we measure, and is on again afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from accelerate.utils.operations import convert_outputs_to_fp32
from torch import nn

from retain import fit_curvature, measure_forgetting, reanchored, soften
from retain.errors import ModelError
from retain.models.forward import no_autocast, own_forwards
from retain.models.generating import sample_rows
from retain.models.sites import lora_sites
from retain.retention.filter import Filter, InputFilter
from retain.retention.force import Force
from retain.retention.head import fit_head
from retain.retention.moments import input_moments
from retain.retention.soften.truncate import truncated
from tiny import KINDS, ROWS, STRUCTURES, tiny, weights


def wrapped(model: nn.Module, kind: torch.dtype, how: str) -> nn.Module:
    """As a trainer, a script or a class leaves a model behind."""
    cast = torch.autocast("cpu", dtype=kind)
    if how == "accelerate":
        function = cast(model.forward.__func__)  # type: ignore[attr-defined]
        model.forward = convert_outputs_to_fp32(function).__get__(model)
    elif how == "accelerate, no method":
        model.forward = convert_outputs_to_fp32(cast(model.forward))
    elif how == "twice":
        wrapped(wrapped(model, kind, "accelerate"), kind, "accelerate")
    elif how == "a script":
        model.forward = cast(model.forward)
    else:
        own = type(model)
        model.__class__ = type(own.__name__, (own,), {"forward": cast(own.forward)})
    return model


HOWS = ["accelerate", "accelerate, no method", "twice", "a script", "its class"]
HALVES = [torch.bfloat16, torch.float16]


@contextmanager
def around(where: str) -> Iterator[None]:
    """What a script may stand in."""
    with ExitStack() as stack:
        if "autocast" in where:
            stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16))
        if "off" in where:
            stack.enter_context(torch.autocast("cpu", enabled=False))
        if "on again" in where:
            stack.enter_context(torch.autocast("cpu", dtype=torch.float16))
        if "inference" in where:
            stack.enter_context(torch.inference_mode())
        if "no_grad" in where:
            stack.enter_context(torch.no_grad())
        yield


WHERES = [
    "autocast", "autocast, off", "autocast, off, on again", "inference", "no_grad",
    "autocast, inference",
]  # fmt: skip


def flags() -> tuple[bool, ...]:
    kinds = ("cpu", "cuda", "xpu")
    return (
        *(torch.is_autocast_enabled(k) for k in kinds),
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
    )


@pytest.mark.parametrize("where", ["", *WHERES])
def test_all_is_off_inside_and_on_again_after(where: str) -> None:
    with around(where):
        before = flags()
        for _ in range(2):
            with no_autocast(), no_autocast():
                assert flags()[:4] == (False,) * 4
                assert torch.is_grad_enabled() is (not before[3] and before[4])
                x = torch.ones(2, 2)
                assert (x @ x).dtype == torch.float32 and not x.is_inference()
            assert flags() == before
            with pytest.raises(ZeroDivisionError), no_autocast():
                _ = 1 / 0
            assert flags() == before
        torch.set_autocast_enabled("cuda", True)  # of a device that is not even there
        try:
            with no_autocast():
                assert not torch.is_autocast_enabled("cuda")
            assert torch.is_autocast_enabled("cuda")
        finally:
            torch.set_autocast_enabled("cuda", False)


@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("how", HOWS)
def test_a_models_forward_is_its_own_inside(how: str, half: torch.dtype) -> None:
    ids = torch.tensor([ROWS["llama"][0]["input_ids"]])
    plain = tiny("llama", moved=True, dtype=torch.float32)
    model = wrapped(tiny("llama", moved=True, dtype=torch.float32), half, how)
    with torch.no_grad():
        want, cast = plain(input_ids=ids).logits, model(input_ids=ids).logits
        assert not torch.equal(cast.float(), want)
        before = vars(model).get("forward")
        with own_forwards(model), own_forwards(model):
            assert torch.equal(model(input_ids=ids).logits, want)
        assert torch.equal(model(input_ids=ids).logits, cast)
    assert vars(model).get("forward") is before


def measures(model: Any, kind: str, structure: str) -> list[Any]:
    """All that is computed from a model."""
    rows = ROWS[kind]
    curvature = fit_curvature(model, rows, structure, batch_size=2, progress=False)
    later = reanchored(curvature, model)
    ones = {name: torch.ones(b.shape) for name, b in curvature.blocks.items()}
    found: list[Any] = list(curvature.matvec(ones).values())
    found += [curvature.quadratic(model), later.quadratic(model)]
    forgotten = measure_forgetting(model, rows)
    return [*found, forgotten.kl, forgotten.ppl, forgotten.ppl_base]


def same(got: list[Any], want: list[Any]) -> bool:
    return len(got) == len(want) and all(
        torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(got, want, strict=True)
    )


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_structure_of_a_model_that_a_trainer_has_prepared(structure: str, kind: str) -> None:
    want = measures(tiny(kind, moved=True, dtype=torch.float32), kind, structure)
    model = wrapped(tiny(kind, moved=True, dtype=torch.float32), torch.bfloat16, "accelerate")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same(measures(model, kind, structure), want)
    assert same(measures(model, kind, structure), want)


@pytest.mark.parametrize("where", WHERES)
def test_every_product_in_what_a_script_stands_in(where: str) -> None:
    untuned = fresh()

    def all_of_it(model: Any) -> list[Any]:
        found = measures(model, "llama", "kfac")
        curvature = fit_curvature(model, ROWS["llama"], batch_size=2, progress=False)
        soft = soften(model, fit_curvature(untuned, ROWS["llama"], batch_size=2, progress=False))
        found.append(soft.predicted(0.5))
        factors, lost = truncated(lora_sites(model), curvature, 1)
        found += [lost, *(t for pair in factors.values() for t in pair)]
        examples = rows_of(model)
        new = input_moments(model, lora_sites(model), examples, answers=0.5)
        found += [new.of(site.name) for site in lora_sites(model)]
        held = InputFilter(lora_sites(model), new, None, Filter(weight=2.0))
        held.after_step()
        found += list(weights(model).values())
        held.hooks.detach()
        retention = Force(model, curvature, 3.0, resuming=True)
        found.append(retention.predicted())
        retention.add_force()
        return [*found, *(site.b.grad for site in lora_sites(model))]

    want = all_of_it(tiny("llama", moved=True, dtype=torch.float32))
    model = tiny("llama", moved=True, dtype=torch.float32)
    with around(where):
        got = all_of_it(model)
    assert same(got, want)
    assert not any(p.is_inference() for p in model.parameters())


def fresh() -> Any:
    return tiny("llama", dtype=torch.float32)


def rows_of(model: Any) -> list[Any]:
    from retain.data.sources import encode

    return list(encode(ROWS["llama"], None, max_length=8, causal=True))


def test_a_hook_in_a_layer_with_autocast_of_its_own() -> None:
    """Such as remote code has it: its inputs are in bfloat16, and products with them are not."""
    model = fresh()
    mlp = model.base_model.model.model.layers[1].mlp
    run = mlp.forward

    def own(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return run(x).float()  # type: ignore[no-any-return]

    mlp.forward = own
    new = input_moments(model, lora_sites(model), rows_of(model))
    assert all(s.dense().dtype == torch.float32 for s in new.factors.values())
    assert len(fit_curvature(model, ROWS["llama"], batch_size=2, progress=False).blocks) == 14


def test_samples_and_heads(tiny_folder: Any) -> None:
    from retain import attach_lora, load_model

    base, tokenizer, _ = load_model(tiny_folder)
    model = attach_lora(base)
    want = sample_rows(model, tokenizer, count=4, max_length=16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = wrapped(base, torch.bfloat16, "accelerate")
        assert sample_rows(model, tokenizer, count=4, max_length=16) == want
    assert vars(cast)["forward"]
    rows = [{**row, "label": i % 3} for i, row in enumerate(ROWS["bert"] * 4)]
    fits = []
    for half in (False, True):
        head = tiny("bert", dtype=torch.float32)
        if half:
            wrapped(head, torch.bfloat16, "accelerate")
        with around("autocast" if half else ""):
            fits.append(fit_head(head, rows, progress=False))
    assert fits[0] == fits[1]


def test_weights_that_cannot_be_trained_with_are_refused() -> None:
    with torch.inference_mode():
        model = fresh()
    with pytest.raises(ModelError, match=r"made in torch.inference_mode.*fix: load it outside"):
        fit_curvature(model, ROWS["llama"], batch_size=2, progress=False)
    assert measure_forgetting(model, ROWS["llama"]).kl == 0


def test_layers_that_run_under_autocast_alone_are_refused() -> None:
    model = fresh()
    model.base_model.model.model.layers[1].mlp.to(torch.bfloat16)
    for call in (fit_curvature, measure_forgetting):
        options = {"batch_size": 2, "progress": False}
        with pytest.raises(ModelError, match=r"differ in precision.*bfloat16, float32.*fix: model"):
            call(model, ROWS["llama"], **options)
    model.to(torch.bfloat16)  # what the error says
    assert measure_forgetting(model, ROWS["llama"]).kl == 0
