"""Kinds of LoRA models: rsLoRA, DoRA, tied embeddings, modules trained beside LoRA, 4-bit bases."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

import fits
from fits import dense_quadratic, dora, same
from oracles import How, Oracle, ekfac_given, kfac, shampoo
from retain import Curvature, Retention, fit_curvature, load_curvature
from retain.errors import CurvatureError, MismatchError, ModelError, SourceError
from retain.models.sites import is_idle, lora_sites, row_scales
from retain.retention.force import Force
from tiny import KINDS, ROWS, STRUCTURES, base, move, relative, tiny

TASK = {"llama": "CAUSAL_LM", "bert": "SEQ_CLS"}


def peft(kind: str, model: nn.Module | None = None, **options: Any) -> PeftModel:
    config = {"r": 2, "target_modules": "all-linear", "task_type": TASK[kind]} | options
    inner = base(kind) if model is None else model
    return get_peft_model(inner, LoraConfig(**config), autocast_adapter_dtype=False).eval()


def fit(model: nn.Module, kind: str, structure: str = "kfac", **options: Any) -> Curvature:
    return fits.fit(model, kind, structure, **{"fisher": "exact"} | options)


# --- rsLoRA and tied embeddings ---


@pytest.mark.parametrize("kind", KINDS)
def test_rank_stabilised_scaling(kind: str) -> None:
    model = peft(kind, use_rslora=True, lora_alpha=3)
    assert all(s.scaling == pytest.approx(3 / 2**0.5) for s in lora_sites(model))
    curvature, plain = fit(model, kind), fit(tiny(kind), kind)
    same(curvature, plain)
    move(model, 4)
    want = float(dense_quadratic(curvature, model))
    assert want > 0
    for c in (curvature, plain):  # a weight has moved as far, whatever made it
        assert c.quadratic(model) == pytest.approx(want, rel=1e-9)
    other = peft(kind, r=4, use_rslora=True, lora_alpha=3)
    assert curvature.quadratic(other) == 0
    adapter = fit(model, kind, space="adapter")
    assert adapter.quadratic(model) == 0
    with pytest.raises(MismatchError, match="one rank and scaling"):
        adapter.quadratic(peft(kind, lora_alpha=3))


def tied() -> LlamaForCausalLM:
    config = base("llama").config
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    return LlamaForCausalLM(config).double().eval()


@pytest.mark.parametrize("full", [False, True])
def test_tied_embeddings(full: bool) -> None:
    model = tied()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    curvature = fit(model if full else peft("llama", model), "llama")
    assert len(curvature.blocks) == 14
    assert not any("lm_head" in n or "embed" in n for n in curvature.blocks)
    same(curvature, fit(peft("llama", tied()), "llama"))


# --- DoRA ---


@cache
def oracle(kind: str) -> Oracle:
    # PEFT's own graph holds the norm fixed, so the frozen weight's gradient is that of an update.
    return Oracle(dora(kind), ROWS[kind], causal=kind == "llama")


def factors(model: nn.Module) -> dict[str, Tensor]:
    """``m / ||W + s B A||`` by rows."""
    found = {}
    for site in lora_sites(model):
        whole = site.layer.base_layer.weight + site.scaling * site.b @ site.a
        magnitude = site.layer.lora_magnitude_vector["default"].weight
        found[site.name] = (magnitude / whole.square().sum(1).sqrt()).detach()
    return found


def test_the_oracle_of_dora_is_that_of_the_effective_weight() -> None:
    model, plain = dora("llama"), base("llama")
    by_row = factors(model)
    moves = {
        f"{s.name}.weight": torch.zeros(s.shape, dtype=torch.float64, requires_grad=True)
        for s in lora_sites(model)
    }
    effective = {}
    for s in lora_sites(model):
        whole = (s.layer.base_layer.weight + s.scaling * s.b @ s.a).detach()
        effective[f"{s.name}.weight"] = by_row[s.name][:, None] * (
            whole + moves[f"{s.name}.weight"]
        )
    for number, row in enumerate(ROWS["llama"][:2]):
        ids = torch.tensor([row["input_ids"][:-1]])
        logits = functional_call(plain, effective, args=(), kwargs={"input_ids": ids}).logits[0]
        assert relative(logits.detach(), model(input_ids=ids).logits[0].detach()) < 1e-10
        log_p = logits.log_softmax(-1)
        for t, y in ((0, 3), (len(log_p) - 1, 7)):
            found = torch.autograd.grad(log_p[t, y], list(moves.values()), retain_graph=True)
            for name, gradient in zip(moves, found, strict=True):
                want = oracle("llama").sequences[number].in_weights[name.removesuffix(".weight")]
                assert float((gradient - want[t, y]).abs().max()) < 1e-12


@pytest.mark.parametrize("structure", [s for s in STRUCTURES if s != "activation"])
@pytest.mark.parametrize("kind", KINDS)
def test_dora_in_weight_space(kind: str, structure: str, tmp_path: Path) -> None:
    model, o = dora(kind), oracle(kind)
    curvature, dense = fit(model, kind, structure), o.dense("weight", How("exact"))
    c, (f, g) = (
        factors(model),
        (kfac(o, "weight", How("exact")), shampoo(o, "weight", How("exact"))),
    )
    mean = sum(b.trace() for b in dense.values()) / sum(len(b) for b in dense.values())
    for name, block in curvature.blocks.items():
        full, one = dense[name], torch.eye(len(dense[name]), dtype=torch.float64)
        if structure == "ekfac":
            want = ekfac_given(full, block.outputs, block.inputs)
        elif structure in ("kfac", "tridiagonal"):
            s, outputs = f[name]
            want = torch.kron(c[name][:, None] * outputs * c[name], s)
        elif structure == "shampoo":
            want = torch.kron(g[name][1], g[name][0])
        else:
            want = mean * one if structure == "identity" else torch.diag(full.diagonal())
        if structure not in ("identity", "diagonal", "ekfac"):
            want = want * full.trace() / want.trace()
        assert relative(block.to_dense(), want) < 1e-9, name
    assert abs(curvature.quadratic(model)) < 1e-20
    move(model, 6, size=0.1)
    value = float(dense_quadratic(curvature, model))
    assert curvature.quadratic(model) == pytest.approx(value, rel=1e-9)
    again = load_curvature(curvature.save(tmp_path / "c"))
    assert again.quadratic(model) == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_activation_of_dora(kind: str, tmp_path: Path) -> None:
    # What moves is the output: 0.5 gamma E||c * D x||^2 / E||y||^2 with one gamma for all.
    model, o = dora(kind), oracle(kind)
    curvature, c, found = fit(model, kind, "activation"), factors(model), []
    for name, block in curvature.blocks.items():
        rows = torch.cat([s.inputs[name] for s in o.sequences])
        seen: list[Tensor] = []
        site = next(s for s in lora_sites(model) if s.name == name)
        handle = site.layer.register_forward_hook(lambda _m, _a, y, to=seen: to.append(y.detach()))
        for row in ROWS[kind]:
            ids = row["input_ids"][:-1] if kind == "llama" else row["input_ids"]
            model(input_ids=torch.tensor([ids]))
        handle.remove()
        energy = sum(float(y.square().sum()) for y in seen) / len(rows)
        want = torch.kron(torch.diag(c[name].square()), rows.T @ rows / len(rows)) / energy
        found.append(block.trace() / float(want.trace()))
        assert relative(block.to_dense() / found[-1], want) < 1e-9, name
    assert max(found) == pytest.approx(min(found), rel=1e-9)
    again = load_curvature(curvature.save(tmp_path / "c"))
    same(again, curvature, 1e-15)
    same(curvature + curvature, 2.0 * curvature)


def test_activation_of_dora_is_whole_where_its_factors_are() -> None:
    auto, whole = (fit(dora("llama"), "llama", "activation", rank=n) for n in ("auto", None))
    assert auto.info.rank is None
    older = replace(whole.info, rank=0)
    for other in (whole, Curvature(whole.blocks, whole.anchor, older, whole.links)):
        same(auto + other, 2.0 * auto)


def test_dora_has_no_adapter_space() -> None:
    with pytest.raises(CurvatureError, match="needs plain LoRA factors; got: DoRA"):
        fit(dora("llama"), "llama", space="adapter")


def test_dora_is_held() -> None:
    model = dora("llama")
    retention = Force(model, fit(model, "llama"))
    assert retention.predicted() == pytest.approx(0, abs=1e-12)
    assert not any("magnitude" in n for n, p in model.named_parameters() if p.grad is not None)


# --- modules that are trained beside LoRA ---


@pytest.mark.parametrize(
    ("kind", "options", "named"),
    [
        ("llama", {"modules_to_save": ["embed_tokens"]}, "embed_tokens"),
        ("llama", {"modules_to_save": ["lm_head"]}, "lm_head"),
        ("llama", {"modules_to_save": ["norm"]}, "norm"),
        ("bert", {"modules_to_save": ["pooler"], "target_modules": ["query"]}, "pooler"),
        ("bert", {"bias": "all"}, "bias"),
        ("bert", {"bias": "lora_only"}, "bias"),
    ],
)
def test_pre_trained_modules_that_nothing_holds(kind: str, options: dict, named: str) -> None:
    model = peft(kind, **options)
    with pytest.raises(ModelError, match="no curvature holds") as caught:
        Force(model, fit(model, kind))
    assert named in str(caught.value) and "modules_to_save" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_new_head_is_free_to_learn() -> None:
    model = peft("bert")
    assert any(".modules_to_save." in n for n, p in model.named_parameters() if p.requires_grad)
    retention = Force(model, fit(model, "bert"))
    held = {id(p) for p in retention.parameters()}
    assert all(id(p) not in held for n, p in model.named_parameters() if "classifier" in n)


def test_new_tokens_are_free_to_learn() -> None:
    model = peft("llama", trainable_token_indices={"embed_tokens": [1, 2]})
    curvature = fit(model, "llama")
    Force(model, curvature)
    tokens = [p for n, p in model.named_parameters() if "trainable_tokens" in n]
    with torch.no_grad():
        tokens[0].add_(0.5)
    assert curvature.quadratic(model) == 0  # the base model is still the same
    Force(model, curvature, resuming=True)
    assert fit(tiny("llama"), "llama").quadratic(model) == 0


# --- 4-bit base weights ---


@pytest.mark.parametrize("structure", ["kfac", "shampoo", "activation"])
def test_a_four_bit_base(structure: str, tiny_folder: Path, tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import BitsAndBytesConfig

    four = AutoModelForCausalLM.from_pretrained(
        tiny_folder, quantization_config=BitsAndBytesConfig(load_in_4bit=True), device_map="cpu"
    ).eval()
    plain = AutoModelForCausalLM.from_pretrained(tiny_folder).eval()
    quantised = {n: m for n, m in four.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    assert len(quantised) == 14
    with torch.no_grad():
        for name, layer in quantised.items():
            weight = bitsandbytes.functional.dequantize_4bit(
                layer.weight.data, layer.weight.quant_state
            )
            plain.get_submodule(name).weight.copy_(weight)
    models = [peft("llama", m) for m in (four, plain)]
    got, want = (fit(m, "llama", structure, fisher="empirical", products="float32") for m in models)
    for name, block in got.blocks.items():
        assert relative(block.to_dense(), want.blocks[name].to_dense()) < 1e-2, name
    retention = Force(models[0], load_curvature(got.save(tmp_path / "c")))
    move(models[0], 3)
    assert retention.predicted() > 0
    assert all(torch.equal(m.weight, quantised[n].weight) for n, m in quantised.items())


# --- other ways to apply a LoRA ---


def test_a_lora_that_is_silent_at_some_tokens_is_refused() -> None:
    """An activated LoRA acts from its invocation on; its curvature would be of all tokens."""
    model = peft("llama", alora_invocation_tokens=[3])
    with pytest.raises(ModelError, match="in a way that no curvature knows; got: ALora at"):
        lora_sites(model)
    with pytest.raises(ModelError, match="ALora"):
        fit_curvature(model, ROWS["llama"], progress=False)


def test_a_merged_adapter_is_refused_before_anything_is_fitted_or_held() -> None:
    model = tiny("llama", moved=True)
    curvature = fit(model, "llama")
    model.merge_adapter()
    for call in (
        lambda: fit_curvature(model, ROWS["llama"], progress=False),
        lambda: curvature.quadratic(model),
        lambda: Retention(model, curvature, parts=["force"]),
    ):
        with pytest.raises(ModelError, match=r"is merged into the base.*model.unmerge_adapter\(\)"):
            call()
    model.unmerge_adapter()
    Retention(model, curvature, parts=["force"]).step(torch.optim.SGD(model.parameters(), lr=0.1))


def test_repeated_layers_are_refused_before_a_fit() -> None:
    model = peft("llama", layer_replication=[[0, 2], [1, 2]])
    with pytest.raises(ModelError, match=r"repeats layers.*leave layer_replication out"):
        fit_curvature(model, ROWS["llama"], progress=False)


# --- heads and layers of other kinds ---


def test_dora_on_transposed_weights() -> None:
    """GPT-2 keeps W as [d_in, d_out]: factors of a fresh DoRA are 1 there too."""
    config = GPT2Config(
        vocab_size=17, n_positions=32, n_embd=8, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2
    )
    torch.manual_seed(0)
    inner = GPT2LMHeadModel(config).double()
    for targets in (["c_attn"], ["c_fc"], ["attn.c_proj"]):
        model = peft("llama", deepcopy(inner), target_modules=targets, use_dora=True)
        (site,) = lora_sites(model)
        torch.testing.assert_close(
            row_scales([site])[site.name], torch.ones(site.b.shape[0], dtype=torch.float64)
        )
        plain = peft("llama", deepcopy(inner), target_modules=targets)
        same(fit(model, "llama"), fit(plain, "llama"))


def test_biases_of_b_are_held_by_nothing() -> None:
    model = peft("llama", lora_bias=True)
    with pytest.raises(ModelError, match="no curvature holds") as caught:
        Force(model, fit(model, "llama"))
    assert "lora_bias=False" in str(caught.value)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name and name.endswith(".bias"):
                parameter.add_(0.5)
    assert not is_idle(lora_sites(model))


def test_labels_that_do_not_exclude_each_other() -> None:
    inner = base("bert")
    inner.config.problem_type = "multi_label_classification"
    with pytest.raises(ModelError, match="do not exclude each other"):
        fit(peft("bert", inner), "bert")


@pytest.mark.parametrize("fisher", ["empirical", "reversed"])
@pytest.mark.parametrize(
    ("label", "said"),
    [(None, "a row without a label; allowed: 0 to 2"), (3, "label 3; allowed: .* 0 to 2")],
)
def test_fishers_of_the_datas_labels_want_labels(fisher: str, label: object, said: str) -> None:
    rows = [*ROWS["bert"][:3], {"input_ids": [3, 4, 5], "label": label}]
    with pytest.raises(SourceError, match=said):
        fit_curvature(tiny("bert"), rows, fisher=fisher, batch_size=2, progress=False)
    if label is None:
        assert fit_curvature(tiny("bert"), rows, batch_size=2, progress=False).info.sequences == 4


def test_a_model_that_writes_into_a_layers_output() -> None:
    """As Falcon adds attention to its MLP's output in place."""

    class Written(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.weight = inner, inner.weight

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.inner(x)
            out += 0.0
            return out

    model = tiny("llama", targets=["q_proj"])
    want = fit(model, "llama")
    for layer in model.get_base_model().model.layers:
        layer.self_attn.q_proj = Written(layer.self_attn.q_proj)
    got = fit(model, "llama")
    for (_, a), (_, b) in zip(want.blocks.items(), got.blocks.items(), strict=True):
        torch.testing.assert_close(a.to_dense(), b.to_dense())


def test_a_layer_that_gradients_do_not_pass_is_named() -> None:
    """As 4-bit weights on a CPU once they were evaluated."""

    class Stopped(torch.autograd.Function):
        @staticmethod
        def forward(_: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(_: Any, *__: Tensor) -> None:
            return None

    model = tiny("llama")
    norm = model.get_base_model().model.norm
    norm.register_forward_pre_hook(lambda _, args: (Stopped.apply(args[0]),))
    with pytest.raises(CurvatureError, match=r"no gradient passes the model.*down_proj"):
        fit(model, "llama")


@pytest.mark.parametrize("structure", [s for s in STRUCTURES if s != "activation"])
def test_a_layer_that_the_predictions_do_not_read_is_named(structure: str) -> None:
    class Twice(nn.Linear):
        """A head with another one beside it."""

        def forward(self, x: Tensor) -> Tensor:
            self.aux(x)
            return super().forward(x)

    model: Any = base("llama")
    model.lm_head = Twice(8, 13, bias=False).double()
    model.lm_head.aux = nn.Linear(8, 4).double()
    for options in ({"target_modules": ["q_proj", "aux"]}, None):
        chosen = model if options is None else peft("llama", deepcopy(model), **options)
        with pytest.raises(CurvatureError, match=r"no gradient at all; got: 1 layers.*aux"):
            fit(chosen, "llama", structure, fisher="mc")


def test_a_wrapped_model_is_measured() -> None:
    model = tiny("llama")
    same(fit(nn.DataParallel(model), "llama"), fit(model, "llama"))
