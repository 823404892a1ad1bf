"""Base models are told apart, however their weights are stored, and known again when they are."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import retain
from retain.errors import MismatchError, RetainWarning
from retain.models.fingerprint import alike, fingerprint, signature, storage
from retain.models.lora import attach_lora
from retain.models.sites import base_layers, lora_sites
from tiny import base, deep

ROWS = [{"input_ids": torch.arange(1 + i, 17 + i).tolist()} for i in range(8)]


def folder(path: Path, seed: int) -> Path:
    """A model wide enough for blocks of 64 values."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def stored(path: Path, kind: str) -> Any:
    """The model of a folder, its weights in 4 or 8 bits or as they are."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import BitsAndBytesConfig

    ways: dict[str, Any] = {
        "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        "fp4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
        "twice": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        ),
        "int8": BitsAndBytesConfig(load_in_8bit=True),
    }
    options = {} if kind == "float" else {"quantization_config": ways[kind], "device_map": "cpu"}
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, **options).eval()


@pytest.mark.parametrize("kind", ["float", "nf4", "fp4", "twice", "int8"])
def test_two_bases_are_told_apart_in_any_storage(kind: str, tmp_path: Path) -> None:
    here, other = folder(tmp_path / "here", 0), folder(tmp_path / "other", 1)
    assert fingerprint(stored(here, kind)) == fingerprint(stored(here, kind))
    adapted = attach_lora(stored(here, kind), rank=2)
    assert fingerprint(adapted) == fingerprint(stored(here, kind))
    assert fingerprint(stored(here, kind)) != fingerprint(stored(other, kind))
    if kind != "float":
        assert fingerprint(stored(here, kind)) != fingerprint(stored(here, "float"))


def test_the_first_pass_of_an_8_bit_model_leaves_its_fingerprint(tmp_path: Path) -> None:
    model = stored(folder(tmp_path / "here", 0), "int8")
    before = fingerprint(model)
    model(torch.tensor([[1, 2, 3]]))
    assert fingerprint(model) == before


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_model_runs_as_before_once_its_signature_is_known(kind: str, tmp_path: Path) -> None:
    model, ids = attach_lora(stored(folder(tmp_path / "here", 0), kind), rank=2), torch.ones(1, 3)
    layers = base_layers(lora_sites(model))
    weights = {name: layer.weight for name, layer in layers.items()}
    with torch.no_grad():
        before = model(ids.long()).logits
        assert signature(model, layers)
        assert all(layer.weight is weights[name] for name, layer in layers.items())
        assert torch.equal(model(ids.long()).logits, before)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "twice", "int8"])
def test_a_curvature_of_a_base_holds_it_in_other_storage(kind: str, tmp_path: Path) -> None:
    here, other = folder(tmp_path / "here", 0), folder(tmp_path / "other", 1)
    plain = attach_lora(stored(here, "float"), rank=2)
    curvature = retain.fit_curvature(plain, ROWS, progress=False)
    curvature = retain.load_curvature(curvature.save(tmp_path / "c"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        curvature.bind(plain)
    packed = attach_lora(stored(here, kind), rank=2)
    name = {"twice": "nf4", "int8": "Int8Params"}.get(kind, kind)
    with pytest.warns(RetainWarning, match=f"stored as float, and here they are {name}"):
        curvature.bind(packed)
    with pytest.raises(MismatchError, match="another base model"):
        curvature.bind(attach_lora(stored(other, kind), rank=2))
    with pytest.raises(MismatchError, match="another base model"):
        curvature.bind(attach_lora(stored(other, "float"), rank=2))


def test_a_curvature_of_a_packed_base_holds_the_plain_one(tmp_path: Path) -> None:
    here, other = folder(tmp_path / "here", 0), folder(tmp_path / "other", 1)
    curvature = retain.fit_curvature(attach_lora(stored(here, "nf4"), rank=2), ROWS, progress=False)
    with pytest.warns(RetainWarning, match="stored as nf4, and here they are float"):
        curvature.bind(attach_lora(stored(here, "float"), rank=2))
    for kind in ("float", "nf4", "int8"):
        with pytest.raises(MismatchError, match="another base model"):
            curvature.bind(attach_lora(stored(other, kind), rank=2))


def test_a_curvature_from_before_signatures_is_of_its_own_storage(tmp_path: Path) -> None:
    here = folder(tmp_path / "here", 0)
    curvature = retain.fit_curvature(attach_lora(stored(here, "nf4"), rank=2), ROWS, progress=False)
    object.__setattr__(curvature.info, "weights", "")
    with pytest.raises(MismatchError, match="another base model"):
        curvature.bind(attach_lora(stored(here, "float"), rank=2))


def test_a_tuned_base_in_the_same_storage_is_another(tmp_path: Path) -> None:
    """Only a change of storage is forgiven, never one of weights."""
    here = folder(tmp_path / "here", 0)
    model = attach_lora(stored(here, "float"), rank=2)
    curvature = retain.fit_curvature(model, ROWS, progress=False)
    tuned = stored(here, "float")
    with torch.no_grad():
        for p in tuned.parameters():
            p.mul_(1.05)
    with pytest.raises(MismatchError, match="another base model"):
        curvature.bind(attach_lora(tuned, rank=2))


@pytest.mark.parametrize("fitted", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loaded", [torch.float32, torch.float16, torch.bfloat16])
def test_a_base_in_float16_is_said_to_be_in_another_precision(
    fitted: torch.dtype, loaded: torch.dtype
) -> None:
    curvature = retain.fit_curvature(attach_lora(deep(2).to(fitted), rank=2), ROWS, progress=False)
    model = attach_lora(deep(2).to(loaded), rank=2)
    if torch.float16 not in (fitted, loaded) or fitted == loaded:
        curvature.bind(model)
        return
    name = str(loaded).removeprefix("torch.")
    with pytest.raises(MismatchError, match=rf"in another precision; .*, in {name}; .*load the"):
        curvature.bind(model)
    other = attach_lora(deep(2).to(loaded), rank=2)
    for layer in base_layers(lora_sites(other)).values():
        layer.reset_parameters()  # type: ignore[operator]
    with pytest.raises(MismatchError, match=r"another base model; .*fix: fit the curvature on"):
        curvature.bind(other)


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_biases_that_an_adapter_trained_are_named(bias: Any) -> None:
    rows = [{"input_ids": [3, 7, 1, 12, 5]}, {"input_ids": [2, 9]}]
    plain = get_peft_model(base("bert"), LoraConfig(r=2, target_modules=["query"]))
    curvature = retain.fit_curvature(plain, rows, progress=False)
    config = LoraConfig(r=2, target_modules=["query"], bias=bias)
    model = get_peft_model(base("bert"), config)
    curvature.bind(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and name.endswith("bias"):
                p.add_(0.1)
    with pytest.raises(MismatchError, match=rf"its biases; .*bias='{bias}'.*with bias='none'"):
        curvature.bind(model)


class Packed(nn.Module):
    """As GPTQ's and AWQ's layers: all they have are buffers."""

    def __init__(self, seed: int, scale: float = 1.0) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        codes = torch.randint(-(2**31), 2**31 - 1, (8, 64), generator=random, dtype=torch.int64)
        self.register_buffer("qweight", codes.to(torch.int32))
        self.register_buffer("scales", torch.full((2, 64), scale))


def test_layers_that_are_buffers_alone_count() -> None:
    models = [nn.Sequential(Packed(*args)) for args in ((0,), (1,), (0, 2.0))]
    assert len({fingerprint(m) for m in models}) == 3
    assert fingerprint(models[0]) == fingerprint(nn.Sequential(Packed(0)))
    assert storage(models[0]) == "Packed"
    assert signature(models[0], {"0": models[0][0]}) == ""  # none, rather than a wrong one


def test_hqq_scales_count() -> None:
    """HQQ keeps its codes in ``W_q`` and its scales in a dictionary."""

    def layer(scale: float) -> nn.Module:
        found = nn.Module()
        found.W_q = nn.Parameter(torch.arange(64, dtype=torch.uint8), requires_grad=False)
        found.meta = {"scale": torch.full((4,), scale), "nbits": 4}
        return nn.Sequential(found)

    assert fingerprint(layer(1.0)) != fingerprint(layer(2.0))


def test_signatures_bear_rounding_and_nothing_else() -> None:
    torch.manual_seed(0)
    layers = {str(i): nn.Linear(64, 64) for i in range(6)}
    rounded = {n: nn.Linear(64, 64) for n in layers}
    random = {n: nn.Linear(64, 64) for n in layers}
    with torch.no_grad():
        for n, layer in layers.items():
            size = layer.weight.square().mean().sqrt()
            rounded[n].weight.copy_(layer.weight + 0.1 * size * torch.randn(64, 64))
    float_ = SimpleNamespace(modules=lambda: iter(()))
    own, near, far = (signature(float_, x) for x in (layers, rounded, random))  # type: ignore[arg-type]
    packed = [text.replace("float:", "nf4:") for text in (near, far)]
    assert alike(own, packed[0])
    assert not alike(own, packed[1])
    assert not alike(own, near)  # stored in one way: the fingerprint has the say
    assert not alike(own, "nf4:" + own[6:-8])  # another number of layers
    assert not alike("", packed[0])
    assert not alike(own, "nf4:!")


def test_base_layers_are_bare() -> None:
    found = base_layers(lora_sites(attach_lora(deep(1))))
    assert len(found) == 7
    assert all(type(layer) is nn.Linear for layer in found.values())
