"""Bottleneck adapters against their formula, and the architectures they know."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapter_cases import attached, batch_of, logits, plain, step
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from families import ENCODERS, FAMILIES, built
from retain.errors import ModelError
from retain.models.adapters.bottleneck import Bottleneck
from retain.models.adapters.registry import attach_adapter
from retain.models.forward import forward_logits


@pytest.mark.parametrize("nonlinearity", ["gelu", "relu"])
@pytest.mark.parametrize("name", ["llama", "bert", "neox", "gpt2"])
def test_it_adds_its_formula_to_the_sublayers(name: str, nonlinearity: str) -> None:
    """The same logits from hooks on an untouched model, written out with matrices."""
    adapter = attached(name, "houlsby", nonlinearity=nonlinearity, scaling=0.7)
    step(adapter, name, 3)
    state = adapter.state()
    bare = plain(name)
    for layer in adapter.layers:  # type: ignore[attr-defined]
        part = {n: state[f"{layer}.{n}"] for n in
                ("down.weight", "down.bias", "up.weight", "up.bias")}  # fmt: skip

        def add(_m: nn.Module, _x: Any, h: torch.Tensor, part: Any = part) -> torch.Tensor:
            inner = h @ part["down.weight"].T + part["down.bias"]
            if nonlinearity == "relu":
                inner = inner.clamp(min=0)
            else:
                inner = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
            return h + 0.7 * (inner @ part["up.weight"].T + part["up.bias"])

        bare.get_submodule(layer).register_forward_hook(add)
    heads = {n: p for n, p in state.items() if n.startswith("classifier")}
    bare.load_state_dict(heads, strict=False)
    got, want = logits(adapter.model, name), logits(bare, name)
    assert torch.allclose(got, want, atol=1e-12, rtol=1e-12)
    assert not torch.allclose(want, logits(plain(name), name), atol=1e-3)


def test_houlsby_follows_both_sublayers_and_pfeiffer_the_mlp() -> None:
    expected = {
        "llama": ("self_attn.o_proj", "mlp.down_proj"),
        "bert": ("attention.output.dense", "output.dense"),
        "roberta": ("attention.output.dense", "output.dense"),
        "neox": ("attention.dense", "mlp.dense_4h_to_h"),
        "gpt2": ("attn.c_proj", "mlp.c_proj"),
    }
    for name, (attention, mlp) in expected.items():
        both: Any = attached(name, "houlsby")
        assert len(both.layers) == 4
        assert all(n.endswith(attention) for n in both.layers[::2])
        assert all(n.endswith(mlp) for n in both.layers[1::2])
        alone: Any = attached(name, "pfeiffer")
        assert alone.layers == both.layers[1::2]


def test_reduction_gives_the_width() -> None:
    def width(**options: Any) -> int:
        adapter = attach_adapter(plain("llama"), "bottleneck", **options)
        (width,) = {m.down.out_features for m in adapter.model.modules()
                    if isinstance(m, Bottleneck)}  # fmt: skip
        return width

    assert width(reduction=4) == 2
    assert width(reduction=8) == width() == 1
    assert width(size=5) == 5


@pytest.mark.parametrize("family", ["DistilBert", "OPT", "Phi"])
def test_other_families_are_known(family: str) -> None:
    name, auto = "llama", AutoModelForCausalLM
    if family == "DistilBert":
        name, auto = "bert", AutoModelForSequenceClassification
    base = built(auto, family, **(FAMILIES | ENCODERS).get(family, {})).eval()
    with torch.no_grad():
        want = forward_logits(base, batch_of(name))
    adapter = attach_adapter(base, "bottleneck", size=3, placement="houlsby")
    assert len(adapter.layers) == 4  # type: ignore[attr-defined]
    assert torch.equal(logits(adapter.model, name), want)
    if name == "llama":
        step(adapter, name, 2)
        assert not torch.equal(logits(adapter.model, name), want)


def test_an_unknown_architecture_is_refused_with_those_that_are_known() -> None:
    base = built(AutoModelForSequenceClassification, "Albert")
    with pytest.raises(ModelError, match="architecture") as caught:
        attach_adapter(base, "bottleneck", size=2)
    assert "self_attn.o_proj and mlp.down_proj (llama)" in str(caught.value)
    half: Any = plain("llama")
    half.model.layers[1].mlp.down_proj = nn.Identity()  # as a block of experts has none
    with pytest.raises(ModelError, match="1 known blocks of 2"):
        attach_adapter(half, "bottleneck", size=2)
