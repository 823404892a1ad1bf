"""Prefix tuning: that the prefix is seen, by whom, and what PEFT gets wrong by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapter_cases import attached, logits, plain, step
from transformers import AutoModelForSequenceClassification, DynamicCache

from families import DEBERTA, ENCODERS, built
from retain.errors import ModelError
from retain.models.adapters.registry import attach_adapter
from tiny import relative

IDS = torch.tensor([[3, 7, 1, 12, 5], [2, 9, 4, 0, 0]])
MASK = torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])


@pytest.mark.parametrize("name", ["llama", "neox", "gpt2"])
def test_it_is_a_cache_of_learned_keys_and_values(name: str) -> None:
    """The same logits from the base with such a cache; the table is [token, layer, k or v, ...]."""
    adapter = attached(name, "prefix")
    step(adapter, name, 2)
    base: Any = plain(name)
    heads, width = (1, 4) if name == "llama" else (2, 4)
    (table,) = adapter.parameters().values()
    parts = table.detach().view(3, 2, 2, heads, width)
    cache = DynamicCache()
    for layer in range(2):
        keys, values = (parts[:, layer, i].transpose(0, 1).expand(2, -1, -1, -1) for i in (0, 1))
        cache.update(keys, values, layer)
    mask = torch.cat([torch.ones(2, 3, dtype=torch.long), MASK], 1)
    model: Any = adapter.model
    with torch.no_grad():
        want = base(input_ids=IDS, attention_mask=mask, past_key_values=cache).logits
        got = model(input_ids=IDS, attention_mask=MASK, use_cache=False).logits
    real = MASK.bool()
    assert torch.allclose(got[real], want[real], atol=1e-12)


@pytest.mark.parametrize("name", ["llama", "neox", "gpt2"])
def test_it_begins_as_a_text_of_random_tokens(name: str) -> None:
    model: Any = attached(name, "prefix").model
    base: Any = plain(name)
    random = torch.Generator().manual_seed(5)
    before = torch.randint(base.config.vocab_size, (1, 3), generator=random).expand(2, -1)
    mask = torch.cat([torch.ones_like(before), MASK], 1)
    with torch.no_grad():
        want = base(input_ids=torch.cat([before, IDS], 1), attention_mask=mask).logits[:, 3:]
        got = model(input_ids=IDS, attention_mask=MASK).logits
    real = MASK.bool()
    assert torch.allclose(got[real], want[real], atol=1e-12)
    drawn: Any = attached(name, "prefix", init="normal").model
    with torch.no_grad():
        other = drawn(input_ids=IDS, attention_mask=MASK).logits
    assert relative(other[real], got[real]) > 1e-3


@pytest.mark.parametrize("name", ["llama", "neox", "gpt2", "bert", "roberta"])
def test_padding_changes_nothing(name: str) -> None:
    model: Any = attached(name, "prefix").model
    with torch.no_grad():
        padded = model(input_ids=IDS, attention_mask=MASK).logits[1]
        alone = model(input_ids=IDS[1:, :3], attention_mask=MASK[1:, :3]).logits[0]
    rows = 3 if padded.dim() == 2 else len(padded)
    assert torch.allclose(padded[:rows], alone, atol=1e-12)


@pytest.mark.parametrize("name", ["llama", "neox", "gpt2"])
def test_a_cache_that_it_gave_can_be_gone_on_from(name: str) -> None:
    """As when options are ranked after one pass of their prompt; PEFT would drop the prompt."""
    model: Any = attached(name, "prefix").model
    with torch.no_grad():
        want = model(input_ids=IDS[:1], attention_mask=MASK[:1]).logits[:, 3:]
        cache = model(input_ids=IDS[:1, :3], use_cache=True).past_key_values
        got = model(input_ids=IDS[:1, 3:], attention_mask=MASK[:1], past_key_values=cache).logits
        assert torch.allclose(got, want, atol=1e-12)
        cache = model(input_ids=IDS[:1, :3], use_cache=True).past_key_values
        places = torch.tensor([[3, 4]])
        got = model(input_ids=IDS[:1, 3:], past_key_values=cache, position_ids=places).logits
        assert torch.allclose(got, want, atol=1e-12)


def test_segments_reach_an_encoder() -> None:
    model: Any = attached("bert", "prefix").model
    one, two = torch.zeros_like(IDS), torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 0, 0]])
    with torch.no_grad():
        logits = [
            model(input_ids=IDS, attention_mask=MASK, token_type_ids=t).logits for t in (one, two)
        ]
        left_out = model(input_ids=IDS, attention_mask=MASK).logits
    assert torch.equal(logits[0], left_out)
    assert relative(logits[1], logits[0]) > 1e-4


def test_no_initial_value_is_the_base() -> None:
    want = logits(plain("llama"), "llama")
    assert relative(logits(attached("llama", "prefix").model, "llama"), want) > 1e-4
    for std in (1.0, 0.02, 0.0):
        adapter = attached("llama", "prefix", init="normal", std=std)
        (table,) = adapter.parameters().values()
        assert std == 0 or 0.5 * std < float(table.detach().std()) < 1.5 * std
        assert std > 0 or not table.any()
        assert relative(logits(adapter.model, "llama"), want) > 1e-4


def test_gradient_checkpointing_is_refused_at_once_and_later() -> None:
    base: Any = plain("llama")
    base.gradient_checkpointing_enable()
    with pytest.raises(ModelError, match="gradient checkpointing"):
        attach_adapter(base, "prefix")
    base.gradient_checkpointing_disable()
    model: Any = attach_adapter(base, "prefix").model
    model.gradient_checkpointing_enable()
    model.eval()(IDS)  # evaluation does not checkpoint
    with pytest.raises(ModelError, match="gradient checkpointing"):
        model.train()(IDS)


@pytest.mark.parametrize("family", ["DistilBert", "ModernBert", "MPNet", "DebertaV2", "Albert"])
@pytest.mark.parametrize("projection", [False, True])
def test_an_encoder_that_takes_no_cache_is_refused(family: str, projection: bool) -> None:
    more = ENCODERS.get(family, DEBERTA if family == "DebertaV2" else {"embedding_size": 16})
    base = built(AutoModelForSequenceClassification, family, **more)
    with pytest.raises(ModelError, match=f"keys and values of past tokens.*got: {family}For"):
        attach_adapter(base, "prefix", projection=projection)
    attach_adapter(base, "lora", rank=2)  # it is what it was
