"""What the recipe is said to hold is what it holds."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import retain
from retain.curvature.blocks.factor import DenseFactor, Factor, SketchFactor
from retain.curvature.plan import kept_bytes
from retain.models.sites import lora_sites
from retain.retention.cost import held, rows_rank
from retain.retention.filter import InputFilter
from retain.retention.moments import Moments
from retain.retention.wiener import WIDE


def test_by_hand() -> None:
    """Two layers that read one input of 6, and one that reads 4."""
    layers, shared = {"q": (4, 6), "k": (2, 6), "o": (6, 4)}, {"q": "q", "k": "q", "o": "o"}
    whole = held(layers, shared, rank=3, factor_rank=None)
    a = 3 * (6 + 6 + 4)
    assert asdict(whole) == {
        "filter": 4 * (36 + 16), "copies": 4 * 2 * a, "gradients": 4 * 2 * a,
        "start": 4 * (3 * (36 + 16) + a),
    }  # fmt: skip
    thin = held(layers, shared, rank=3, factor_rank=2)
    made = (3 * 6 + 2 * 6 + 2 * 9) + (3 * 4 + 2 * 4 + 2 * 9)
    assert thin.filter == 4 * made
    streamed = (14 * 6 + 2 * 6) + (12 * 4 + 2 * 4)  # 6 and 4 columns, and 8 probes
    assert thin.start == 4 * (max(streamed, (3 * 6 + 2 * 6) + (3 * 4 + 2 * 4) + made) + a)
    assert thin.step == thin.filter + 4 * 4 * a


def size(*tensors: Tensor) -> int:
    """Bytes of the stores behind tensors, each once."""
    stores = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(stores.values())


def test_a_layer_as_wide_as_those_of_8b_models() -> None:
    """14,336 inputs, sketches of 256 directions, as `auto` makes them."""
    width, k, r = 14336, 256, 16

    layer = nn.Linear(width, 8, bias=False)
    model = nn.Sequential(layer)
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(model, LoraConfig(r=r, target_modules=["0"]))
    (site,) = lora_sites(model)
    random = torch.Generator().manual_seed(0)

    def sketch(k: int) -> Factor:
        vectors = torch.randn(width, k, generator=random)
        return SketchFactor(vectors, torch.rand(width, generator=random), torch.zeros(()))

    name = site.name
    moments = [Moments({name: sketch(n)}, {name: name}) for n in (rows_rank(k), k)]
    kept = InputFilter([site], *moments)
    found = held({site.name: (8, width)}, {site.name: site.name}, rank=r)
    filters = [t for p in kept.filters for t in vars(p).values() if isinstance(t, Tensor)]
    assert found.filter == pytest.approx(size(*filters), rel=0.05)
    assert found.copies == pytest.approx(size(*kept._kept, *kept._before), rel=0.05)


@pytest.mark.parametrize(("wide", "bf16"), [(64, True), (WIDE, True), (WIDE, False)])
def test_a_model_with_whole_inputs(wide: int, bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retain.retention.wiener.has_bf16", lambda _: bf16)
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=32, intermediate_size=wide, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, pad_token_id=0,
        )
    )  # fmt: skip
    model = retain.attach_lora(base, rank=4)
    rows = [{"input_ids": torch.randint(1, 32, (8,)).tolist()} for _ in range(16)]
    curvature = retain.fit_curvature(model, rows, progress=False)
    from retain.models.view import ModelView

    retention = retain.Retention(
        model, curvature, rows=ModelView(model).read(rows, 16, max_length=8)
    )
    kept = retention.recipe.filter
    assert kept is not None
    shapes = {s.name: s.shape for s in lora_sites(model)}
    first: dict[int, str] = {}
    shared = {n: first.setdefault(id(p), n) for n, p in zip(shapes, kept.filters, strict=True)}
    found = held(shapes, shared, rank=4)
    filters = [t for p in kept.filters for t in vars(p).values() if isinstance(t, Tensor)]
    half = {id(p): p.p.numel() for p in kept.filters if vars(p)["p"].dtype == torch.bfloat16}
    assert bool(half) is (bf16 and wide == WIDE)
    assert found.filter == size(*filters) + 2 * sum(half.values())
    assert found.copies == size(*kept._kept, *kept._before)
    assert kept_bytes("kfac", shapes, shared) == curvature.memory()
    assert all(isinstance(b.inputs, DenseFactor) for b in curvature.blocks.values())
    retention.finish()
