"""A grown adapter is what it was, with room."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from retain.errors import ConfigError, ModelError
from retain.models.lora import grow_lora
from retain.models.off import adapter_off
from retain.models.sites import lora_sites
from tiny import KINDS, ROWS, base, move, tiny, weights


def answer(model: torch.nn.Module, kind: str) -> torch.Tensor:
    ids = torch.tensor([ROWS[kind][0]["input_ids"]])
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=ids).logits
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_it_says_what_it_said(kind: str) -> None:
    model = tiny(kind, moved=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".modules_to_save." in name:  # a head that has learned
                parameter.add_(0.5)
    before, old = answer(model, kind), weights(model)
    with adapter_off(model):
        untuned = answer(model, kind)
    assert not torch.allclose(untuned, before)
    scaling = lora_sites(model)[0].scaling
    grown = grow_lora(model, 3, seed=7)
    torch.testing.assert_close(answer(grown, kind), before, rtol=1e-12, atol=1e-12)
    with adapter_off(grown):
        assert torch.equal(answer(grown, kind), untuned)
    config = grown.peft_config["default"]
    assert (config.r, config.lora_alpha) == (5, 5 * scaling)
    for site in lora_sites(grown):
        assert (site.rank, site.scaling) == (5, scaling)
        assert torch.equal(site.a[:2], old[f"{site.name}.lora_A"])
        assert torch.equal(site.b[:, :2], old[f"{site.name}.lora_B"])
        assert float(site.b[:, 2:].abs().max()) == 0
        assert float(site.a[2:].abs().max()) > 0
        assert site.a.dtype == site.b.dtype == torch.float64
        assert site.a.requires_grad


def test_the_fresh_rows_come_from_the_seed() -> None:
    drawn = [lora_sites(grow_lora(tiny("llama"), 3, seed=s))[0].a[2:] for s in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_patterns_that_make_all_layers_alike_are_given_up() -> None:
    config = LoraConfig(
        r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM",
        alpha_pattern={"q_proj": 8}, rank_pattern={"v_proj": 2},
    )  # fmt: skip
    model: Any = get_peft_model(base("llama"), config, autocast_adapter_dtype=False)
    move(model, 3)
    before = answer(model, "llama")
    grown = grow_lora(model, 3)
    assert {(s.rank, s.scaling) for s in lora_sites(grown)} == {(5, 4.0)}
    torch.testing.assert_close(answer(grown, "llama"), before, rtol=1e-12, atol=1e-12)


def test_other_factors_take_the_place_of_the_old() -> None:
    model = tiny("llama", moved=True)
    factors = {
        s.name: (s.b.detach().sum(1, keepdim=True), s.a.detach()[:1]) for s in lora_sites(model)
    }
    for site in lora_sites(grow_lora(model, 2, factors=factors)):
        assert site.rank == 3
        assert torch.equal(site.b[:, :1], factors[site.name][0])
        assert torch.equal(site.a[:1], factors[site.name][1])


def test_an_adapter_loaded_for_inference_trains_again(tmp_path: Path) -> None:
    tiny("llama", moved=True).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base("llama"), tmp_path, autocast_adapter_dtype=False)
    loaded.peft_config["default"].init_lora_weights = "pissa"  # as it may have begun
    before = answer(loaded, "llama")
    grown = grow_lora(loaded, 2)
    torch.testing.assert_close(answer(grown, "llama"), before)
    assert all(s.a.requires_grad and s.b.requires_grad for s in lora_sites(grown))
    assert all(float(s.b[:, 2:].detach().abs().max()) == 0 for s in lora_sites(grown))


@pytest.mark.parametrize(
    ("what", "options"),
    [
        ("more than A and B", {"use_dora": True}),
        ("not of one rank", {"rank_pattern": {"v_proj": 3}}),
    ],
)
def test_what_cannot_grow_is_refused(what: str, options: dict[str, Any]) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **options)
    model: Any = get_peft_model(base("llama"), config)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=what):
        grow_lora(model, 2)
    with pytest.raises(ModelError, match=r"no peft.PeftModel; got: LlamaForCausalLM"):
        grow_lora(cast("Any", tiny("llama").get_base_model()))
    with pytest.raises(ConfigError, match="too few rows to add"):
        grow_lora(tiny("llama"), 0)


def test_other_adapters_are_not_lost_without_a_word() -> None:
    model = tiny("llama", moved=True)
    model.add_adapter("ref", LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ModelError, match=r"several adapters.*default, ref.*delete_adapter"):
        grow_lora(model, 2)
    model.delete_adapter("ref")
    assert lora_sites(grow_lora(model, 2))[0].rank == 4
