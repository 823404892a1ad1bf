"""Every kind of adapter passes the same checks, on every family of models."""

from __future__ import annotations

from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import (
    DECODERS,
    MODELS,
    MORE,
    OPTIONS,
    attached,
    batch_of,
    examples_of,
    logits,
    plain,
    step,
)
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertModel,
    MambaConfig,
    MambaForCausalLM,
)

from families import ENCODERS, built
from retain.errors import ConfigError, ModelError
from retain.evaluation.forgetting import Reference
from retain.models.adapters.base import new_heads, same_base
from retain.models.adapters.registry import ADAPTERS, adapter_kind, attach_adapter
from retain.models.fingerprint import fingerprint
from retain.models.forward import forward_logits
from retain.models.load import load_model
from retain.models.lora import attach_lora
from retain.models.names import drawn_layers, inner_model
from retain.models.off import adapter_off
from tiny import base as plain_base
from tiny import relative, save_tiny

every = pytest.mark.parametrize("name", MODELS)
wide = pytest.mark.parametrize("name", MODELS + MORE)
kinds = pytest.mark.parametrize("how", OPTIONS)


@wide
@kinds
def test_a_fresh_adapter_computes_the_base_exactly(name: str, how: str) -> None:
    want = logits(plain(name), name)
    adapter = attached(name, how)
    got = logits(adapter.model, name)
    if adapter.kind == "prefix":  # which cannot, and whose docstring says so
        assert relative(got, want) > 1e-3
        assert "does not begin as the base model" in str(type(adapter).__doc__)
    else:
        assert torch.equal(got, want)


@wide
@kinds
def test_off_is_the_base_exactly_after_training(name: str, how: str) -> None:
    want = logits(plain(name), name)
    adapter = attached(name, how)
    step(adapter, name, 3)
    trained = logits(adapter.model, name)
    assert relative(trained, want) > 1e-4
    with adapter.off() as model:
        assert torch.equal(logits(model, name), want)
        with adapter_off(adapter.model):  # nested, by the other way in
            assert torch.equal(logits(adapter.model, name), want)
        assert torch.equal(logits(adapter.model, name), want)
    assert torch.equal(logits(adapter.model, name), trained)
    with pytest.raises(KeyError), adapter.off():
        raise KeyError
    assert torch.equal(logits(adapter.model, name), trained)


@every
@kinds
def test_training_goes_on_after_off_as_if_nothing_had_been(name: str, how: str) -> None:
    batch = batch_of(name)
    grads = []
    for look in (False, True):
        adapter = attached(name, how)
        step(adapter, name, 2)
        flags = {n: p.requires_grad for n, p in adapter.model.named_parameters()}
        loss = forward_logits(adapter.model, batch).square().sum()
        if look:  # between the forward pass and the backward pass
            with adapter.off(), torch.no_grad():
                forward_logits(adapter.model, batch)
        loss.backward()
        assert flags == {n: p.requires_grad for n, p in adapter.model.named_parameters()}
        grads.append({n: p.grad for n, p in adapter.parameters().items()})
    for parameter, grad in grads[0].items():
        assert grad is not None and torch.equal(grad, grads[1][parameter])


@every
@kinds
def test_off_leaves_a_frozen_weight_frozen(name: str, how: str) -> None:
    adapter = attached(name, how)
    first = min(adapter.parameters())
    adapter.parameters()[first].requires_grad_(False)
    with adapter.off():
        pass
    assert first not in adapter.parameters()


@every
@kinds
def test_gradients_reach_every_trainable_parameter_and_nothing_else(name: str, how: str) -> None:
    adapter = attached(name, how)
    frozen = {n: p.clone() for n, p in adapter.model.named_parameters() if not p.requires_grad}
    before = adapter.state()
    step(adapter, name, 3)
    for parameter, value in adapter.state().items():
        if not parameter.endswith("key.bias"):  # which softmax does not see
            assert not torch.equal(value, before[parameter]), parameter
    for parameter, value in frozen.items():
        assert torch.equal(dict(adapter.model.named_parameters())[parameter], value), parameter
    assert bool(frozen) == (how != "full")


@every
@kinds
def test_state_and_restore_are_exact(name: str, how: str) -> None:
    adapter = attached(name, how)
    step(adapter, name, 2)
    state = adapter.state()
    step(adapter, name, 2)
    want = adapter.state()
    adapter.restore(state)
    assert all(torch.equal(v, state[n]) for n, v in adapter.state().items())
    step(adapter, name, 2)
    assert all(torch.equal(v, want[n]) for n, v in adapter.state().items())
    fresh = attached(name, how)  # as a resumed run has it
    fresh.restore(state)
    step(fresh, name, 2)
    assert all(torch.equal(v, want[n]) for n, v in fresh.state().items())
    with pytest.raises(ModelError, match="another adapter"):
        adapter.restore(dict(list(state.items())[1:]))


@wide
@kinds
def test_it_counts_what_it_trains_without_a_new_head(name: str, how: str) -> None:
    model: Any = plain(name)
    head = {id(p) for h in new_heads(model).values() for p in h.parameters()}
    assert bool(head) == (name in ("bert", "roberta"))
    size = sum(p.numel() for p in model.parameters() if id(p) not in head)
    linear = [
        sum(m.weight.shape)
        for n, m in model.named_modules()
        if (isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D")
        and m is not (model.get_output_embeddings() if name in DECODERS else None)
        and not n.startswith("classifier")
    ]
    tables = {
        id(m.weight): m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding)
    }
    width, layers = 8, 2
    key_width = 4 if name == "llama" else 8
    bottleneck = layers * (2 * width * 3 + 3 + width)
    encoder = 3 * width + width * width + width + (width + 1) * 2 * layers * key_width
    want = {
        "lora": 2 * sum(linear), "full": size, "full-but-embeddings": size - sum(tables.values()),
        "pfeiffer": bottleneck, "houlsby": 2 * bottleneck,
        "prefix": 3 * 2 * layers * key_width, "projected": encoder,
    }  # fmt: skip
    if name == "llama":  # PEFT takes the width of the keys for that of the projection's input
        want["projected"] = 3 * 4 + 4 * width + width + (width + 1) * 2 * layers * key_width
    assert attached(name, how).count() == (want[how], size)


@every
@kinds
def test_it_is_drawn_from_its_seed_alone(name: str, how: str) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = attached(name, how).state()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again, other = attached(name, how).state(), attached(name, how, seed=6).state()
    assert all(torch.equal(v, again[n]) for n, v in first.items())
    same = all(torch.equal(v, other[n]) for n, v in first.items())
    assert same == (OPTIONS[how]["kind"] == "full")


@every
@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_keeps_the_precision(name: str, how: str, dtype: torch.dtype) -> None:
    adapter = attached(name, how, dtype=dtype)
    step(adapter, name, 2)
    for parameter, value in adapter.model.named_parameters():
        wide = "prompt_encoder" in parameter  # which would not feel a step in bfloat16
        assert value.dtype == (torch.float32 if wide else dtype), parameter
    assert logits(adapter.model, name).dtype == dtype
    with adapter.off():
        assert torch.equal(logits(adapter.model, name), logits(plain(name, dtype=dtype), name))


@every
@kinds
def test_a_copy_is_independent(name: str, how: str) -> None:
    model = attached(name, how).model
    copy = deepcopy(model)
    adapter: Any = copy.retain_adapter
    assert adapter.model is copy
    want, fresh = logits(plain(name), name), logits(model, name)
    step(adapter, name, 2)
    with adapter_off(copy):
        assert torch.equal(logits(copy, name), want)
    assert torch.equal(logits(model, name), fresh)


@pytest.mark.parametrize("name", DECODERS)
@kinds
def test_it_generates_what_it_ranks_first(name: str, how: str) -> None:
    adapter = attached(name, how)
    step(adapter, name, 3)
    prompts = [[3, 7, 1], [3, 7, 1, 12, 5]]
    ids = torch.tensor([[0, 0, *prompts[0]], prompts[1]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    more = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    for reference, switch in ((adapter.model, nullcontext()), (plain(name), adapter.off())):
        with switch, torch.no_grad():
            out = adapter.model.generate(input_ids=ids, attention_mask=mask, **more)
            for row, prompt in zip(out, prompts, strict=True):
                text = torch.tensor([prompt])
                for _ in range(6):
                    last = reference(input_ids=text, use_cache=False).logits[:, -1]
                    text = torch.cat([text, last.argmax(-1)[None]], 1)
                assert row[5 - len(prompt) :].tolist() == text[0].tolist()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "bert", "neox"])
@kinds
def test_gradient_checkpointing_changes_no_gradient(name: str, how: str, reentrant: bool) -> None:
    def gradients(on: bool) -> dict[str, Any]:
        adapter = attached(name, how)
        step(adapter, name, 2)
        model = adapter.model.train()
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        forward_logits(model, batch_of(name)).square().sum().backward()
        return {n: p.grad for n, p in adapter.parameters().items()}

    if OPTIONS[how]["kind"] == "prefix":  # else the prefix would be dropped without a word
        with pytest.raises(ModelError, match="gradient checkpointing"):
            gradients(True)
        return
    want = gradients(False)
    for parameter, got in gradients(True).items():
        assert got is not None, parameter
        assert relative(got, want[parameter]) < 1e-9 or got.abs().max() < 1e-12, parameter


@every
@kinds
def test_forgetting_is_measured_against_the_base(name: str, how: str) -> None:
    adapter = attached(name, how)
    rows = examples_of(name)
    untouched = Reference(adapter.model, rows, batch_size=2).measure(adapter.model)
    assert (untouched.kl == 0) == (adapter.kind != "prefix")
    step(adapter, name, 3)
    reference = Reference(adapter.model, rows, batch_size=2)
    assert reference.measure(adapter.model).kl > 0
    with adapter.off():
        assert reference.measure(adapter.model).kl == 0


def test_unknown_names_are_answered_with_the_near_one() -> None:
    with pytest.raises(ConfigError, match="did you mean 'lora'") as caught:
        attach_adapter(plain("llama"), "lora2")
    assert all(kind in str(caught.value) for kind in ADAPTERS)
    for kind, wrong, right in [
        ("lora", "rnak", "rank"), ("full", "embedding", "embeddings"),
        ("bottleneck", "placment", "placement"), ("osf", "presrve", "preserve"),
        ("prefix", "num_virtual_token", "num_virtual_tokens"),
    ]:  # fmt: skip
        with pytest.raises(ConfigError, match=f"did you mean '{right}'"):
            attach_adapter(plain("llama"), kind, **{wrong: 1})
        assert adapter_kind(kind).check({}).model_dump()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("lora", {"rank": 0}), ("lora", {"dropout": 1.0}), ("lora", {"targets": ["no_such_layer"]}),
        ("full", {"embeddings": "some"}), ("bottleneck", {"size": 0}), ("bottleneck", {"size": 8}),
        ("bottleneck", {"size": 2, "reduction": 4}), ("bottleneck", {"placement": "pfeifer"}),
        ("bottleneck", {"nonlinearity": "tanh"}), ("bottleneck", {"scaling": 0.0}),
        ("prefix", {"num_virtual_tokens": 0}), ("prefix", {"std": -1.0}),
        ("osf", {"preserve": 1.0}), ("osf", {"targets": ["no_such_layer"]}),
    ],
)  # fmt: skip
def test_a_bad_option_is_refused_and_the_model_left_alone(
    kind: str, options: dict[str, Any]
) -> None:
    model = plain("llama")
    with pytest.raises(ConfigError) as caught:
        attach_adapter(model, kind, **options)
    assert "\n" not in str(caught.value) and "fix:" in str(caught.value)
    assert [n for n, _ in model.named_parameters()] == [
        n for n, _ in plain("llama").named_parameters()
    ]
    attach_adapter(model, "lora", rank=1)


@kinds
def test_a_model_takes_one_adapter(how: str) -> None:
    for taken in (attached("llama", how).model, attach_lora(plain("llama"), rank=1)):
        with pytest.raises(ModelError, match="carries an adapter already"):
            attach_adapter(taken, **OPTIONS[how])


def test_a_plain_model_has_nothing_to_switch_off() -> None:
    with pytest.raises(ModelError, match="no adapter to switch off"), adapter_off(plain("llama")):
        pass
    model = attach_lora(plain("llama"), rank=2)  # without the study, as before
    with adapter_off(model):
        assert torch.equal(logits(model, "llama"), logits(plain("llama"), "llama"))


def test_all_linear_leaves_out_every_layer_that_peft_trains_whole() -> None:
    """DistilBERT has two: PEFT takes ``pre_classifier`` for a head as well."""
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    from retain.models.sites import lora_sites

    config = DistilBertConfig(vocab_size=17, dim=8, hidden_dim=12, n_layers=1, n_heads=2)
    model = attach_lora(DistilBertForSequenceClassification(config), rank=2)
    found = [site.name.rsplit(".", 1)[-1] for site in lora_sites(model)]
    assert found == ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"]
    trained = {
        n.split(".modules_to_save")[0]
        for n, p in model.named_parameters()
        if p.requires_grad and "lora" not in n
    }
    assert {n.rsplit(".", 1)[-1] for n in trained} == {"pre_classifier", "classifier"}


def test_what_peft_says_of_targets_that_are_there_is_passed_on() -> None:
    config = MambaConfig(vocab_size=17, hidden_size=8, state_size=4, num_hidden_layers=1)
    said = "not for LoRA; got: all-linear: .*'out_proj' is incompatible with Mamba.*; allowed: dt_"
    with pytest.raises(ConfigError, match=said) as caught:
        attach_lora(MambaForCausalLM(config), rank=2)
    assert "out_proj" not in str(caught.value).partition("; allowed: ")[2]


def test_a_pattern_of_targets_that_does_not_end_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"not for LoRA; got: \.\*\(q: .*unterminated"):
        attach_lora(plain_base("llama"), rank=2, targets=".*(q")


def test_osf_leaves_out_every_layer_that_peft_trains_whole() -> None:
    """PEFT itself breaks off on DistilBERT, whose ``pre_classifier`` it both splits and keeps."""
    base: Any = built(AutoModelForSequenceClassification, "DistilBert", **ENCODERS["DistilBert"])
    adapter: Any = attach_adapter(deepcopy(base), "osf")
    split = {name.rsplit(".", 1)[-1] for name in adapter.layers()}
    assert split == {"q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"}
    whole = {n for n in adapter.parameters() if "classifier" in n}
    assert len(whole) == 4 and all("modules_to_save" in n for n in whole)
    with pytest.raises(ConfigError, match="OSF cannot split these layers"):
        attach_adapter(base, "osf", targets=["pre_classifier"])


@pytest.mark.parametrize("how", [*OPTIONS, "osf"])
def test_what_no_checkpoint_has_trains_whole_in_every_kind(tmp_path: Path, how: str) -> None:
    """As the head does: transformers draws such a pooler anew at each loading."""
    bare = BertModel.from_pretrained(save_tiny(tmp_path, kind="bert"), add_pooling_layer=False)
    bare.save_pretrained(tmp_path)
    made: list[Any] = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        made.append(load_model(tmp_path, num_labels=3).model)
    assert drawn_layers(made[0]) == {"bert.pooler.dense"}
    assert same_base(made[0]) == same_base(made[1])
    assert fingerprint(made[0]) != fingerprint(made[1])
    pooler = made[0].bert.pooler.dense.weight.detach().clone()
    adapter = attach_adapter(made[0], seed=5, **OPTIONS.get(how, {"kind": how}))
    trained = {n: p for n, p in adapter.parameters().items() if "pooler" in n}
    assert {p.shape for p in trained.values()} == {(16, 16), (16,)}
    assert not any("lora" in n or "osf" in n for n in trained)
    counted = sum(p.numel() for n, p in adapter.parameters().items() if "pooler" not in n)
    assert adapter.count()[0] == counted - 3 * 17
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(1.0)
    with adapter.off() as off:
        inner: Any = inner_model(off).bert.pooler.dense
        assert torch.equal(getattr(inner, "original_module", inner).weight, pooler)
