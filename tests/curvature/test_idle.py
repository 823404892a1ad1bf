"""A fresh adapter is not run while a curvature is measured, and is as it was afterwards."""

from __future__ import annotations

import pytest
import torch

from retain.models.sites import bypassed, is_idle, lora_sites
from tiny import tiny


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_bypassed_adapter_is_the_base_and_stays_as_it_was(kind: str) -> None:
    model = tiny(kind, moved=True)
    sites = lora_sites(model)
    sites[0].a.requires_grad_(False)  # PEFT's own switch would make it trainable again
    ids = torch.arange(6)[None]
    trained = {n: p.requires_grad for n, p in model.named_parameters()}
    with torch.no_grad():
        tuned = model(ids).logits
        with bypassed(sites):
            off = model(ids).logits
        again = model(ids).logits
        with model.disable_adapter():
            base = model(ids).logits
    assert torch.equal(off, base) and torch.equal(tuned, again) and not torch.equal(off, tuned)
    sites[0].a.requires_grad_(False)  # as it has done by now
    assert {n: p.requires_grad for n, p in model.named_parameters()} == trained


def test_idle_is_plain_lora_with_b_zero() -> None:
    sites = lora_sites(tiny("llama"))
    assert is_idle(sites)
    with torch.no_grad():
        sites[-1].b[0, 0] = 1e-3
    assert not is_idle(sites)


def test_an_error_inside_switches_the_adapter_on_again() -> None:
    model = tiny("llama", moved=True)
    with pytest.raises(RuntimeError, match="inside"), bypassed(lora_sites(model)):
        raise RuntimeError("inside")
    assert not any(s.layer.disable_adapters for s in lora_sites(model))
