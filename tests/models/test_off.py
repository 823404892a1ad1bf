"""Switched off, an adapter is the base that was there before, or is refused."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from retain import fit_curvature, grow_lora, measure_forgetting, soften
from retain.errors import ModelError, RetainError, RetainWarning
from retain.models import off
from retain.models.off import KINDS, adapter_off, base_to_sample
from retain.models.saved import load_adapter, save_adapter
from retain.models.sites import lora_sites
from retain.retention.telling import tell_begun_from
from tiny import ROWS, base, tiny

IDS = torch.tensor([[3, 7, 1, 12, 5]])
TEXT = ROWS["llama"]


def plain(**options: Any) -> Any:
    return base("llama", dtype=torch.float32, **options)


def answer(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


def moved(model: Any, size: float = 0.2) -> Any:
    """Trained, as it were: all that is trainable is elsewhere."""
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(size * torch.randn(p.shape, generator=random).to(p))
    return model.eval()


def off_is(model: Any, want: torch.Tensor, *, near: bool = False) -> None:
    """Switched off, also nested, the model answers `want`; afterwards all is as it was."""
    before, on = state(model), answer(model)
    same = partial(torch.testing.assert_close, atol=1e-5, rtol=1e-4) if near else torch.equal
    with adapter_off(model):
        assert same(answer(model), want) is not False
        with adapter_off(model):
            assert same(answer(model), want) is not False
        assert same(answer(model), want) is not False
    assert state(model) == before
    assert torch.equal(answer(model), on)


def lora(**options: Any) -> LoraConfig:
    common = {"task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj", "v_proj"]}
    return LoraConfig(**{**common, **options})


def state(model: nn.Module) -> list[Any]:
    flags = [(n, p.requires_grad) for n, p in model.named_parameters()]
    modes = [m.training for m in model.modules()]
    switches = [getattr(m, "_disable_adapters", None) for m in model.modules()]
    own = [sorted(n for n in vars(m) if n in ("forward", "generate")) for m in model.modules()]
    return [flags, modes, switches, own, getattr(model, "active_adapter", None)]


SMALL: dict[str, dict[str, Any]] = {
    "IA3": {"feedforward_modules": []},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [3]},
    "OFT": {"oft_block_size": 2, "r": 0}, "BOFT": {"boft_block_size": 2},
    "ADALORA": {"total_step": 10}, "FOURIERFT": {"n_frequency": 4}, "WAVEFT": {"n_frequency": 4},
    "C3A": {"block_size": 2}, "ROAD": {"group_size": 2}, "VBLORA": {"vector_length": 2},
}  # fmt: skip
"""What the kinds need for layers as small as these."""

PROMPTS = ["PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING"]


def attached(kind: str) -> Any:
    config = next(c for t, c in PEFT_TYPE_TO_CONFIG_MAPPING.items() if t.value == kind)
    known = inspect.signature(config).parameters
    usual = {"target_modules": ["q_proj", "v_proj"], "r": 2, "num_virtual_tokens": 2}
    options = {k: v for k, v in usual.items() if k in known} | SMALL.get(kind, {})
    torch.manual_seed(0)
    return get_peft_model(plain(), config(task_type="CAUSAL_LM", **options))


@pytest.mark.parametrize("kind", [*sorted(KINDS), *PROMPTS])
def test_every_kind_is_exactly_off_and_left_as_it_was(kind: str) -> None:
    model, want = moved(attached(kind)), answer(plain())
    on = answer(model)
    assert on.shape != want.shape or not torch.equal(on, want)
    off_is(model, want)


def test_a_kind_that_nobody_has_looked_at_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = attached("IA3")
    monkeypatch.setattr(off, "KINDS", KINDS - {"IA3"})
    with pytest.raises(ModelError, match="an adapter of the kind IA3"):
        measure_forgetting(model, TEXT)


@pytest.mark.parametrize(
    "options",
    [
        {"lora_bias": True}, {"use_dora": True}, {"use_rslora": True}, {"lora_dropout": 0.5},
        {"modules_to_save": ["lm_head", "embed_tokens"]}, {"modules_to_save": ["norm"]},
        {"trainable_token_indices": {"embed_tokens": [3, 4]}}, {"init_lora_weights": False},
        {"init_lora_weights": "gaussian"}, {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "mica"}, {"rank_pattern": {"q_proj": 1}},
        {"target_modules": ["embed_tokens", "q_proj"]},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("frozen", [None, "lora_A", "lora_B", ""])
def test_options_of_lora(options: dict[str, Any], frozen: str | None) -> None:
    model = moved(get_peft_model(plain(), lora(**options)).train())
    for name, p in model.named_parameters():
        if frozen is not None and frozen in name:
            p.requires_grad_(False)
    before = state(model)
    assert not torch.equal(answer(model), answer(plain()))
    off_is(model, answer(plain()))
    measure_forgetting(model, TEXT)
    assert state(model) == before


def test_two_adapters_and_the_way_of_transformers() -> None:
    model = moved(get_peft_model(plain(), lora(), adapter_name="first"))
    model.add_adapter("second", lora(target_modules=["down_proj"]))
    model.set_adapter("second")
    off_is(moved(model), answer(plain()))
    assert model.active_adapter == "second"
    native = plain()
    native.add_adapter(lora())  # no PeftModel
    off_is(moved(native), answer(plain()))
    with base_to_sample(native):
        assert torch.equal(answer(native), answer(plain()))
    assert not torch.equal(answer(native), answer(plain()))


def wide(seed: int = 0, size: int = 16) -> Any:
    """Of layers that have r directions to spare, and biases."""
    torch.manual_seed(seed)
    shape = {"vocab_size": 13, "hidden_size": size, "intermediate_size": 24, "num_hidden_layers": 2}
    return LlamaForCausalLM(
        LlamaConfig(**shape, num_attention_heads=2, pad_token_id=0, attention_bias=True)
    ).eval()


TAKERS = ["pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "lora_ga"]
TRAINED_ALONE = ["pissa_niter_4", "corda", "lora_ga"]
"""PEFT cannot load them on the base: CorDA raises, LoRA-GA leaves the base's weights whole, and
PiSSA's random decomposition is drawn anew."""


def taker(kind: str, inner: Any = None, autocast: bool = True, **options: Any) -> Any:
    torch.manual_seed(1)
    model, config = inner or wide(), lora(**{"r": 4, "init_lora_weights": kind, **options})

    def run() -> None:
        for row in torch.arange(3, 12).view(3, 3):
            loss = model(input_ids=row[None], labels=row[None]).loss
            if torch.is_grad_enabled():
                loss.backward()

    if kind == "corda":
        config.corda_config = peft.tuners.lora.config.CordaConfig(corda_method="kpm")
        preprocess_corda(model, config, run_model=run)
    if kind == "lora_ga":
        config.lora_ga_config = peft.tuners.lora.config.LoraGAConfig()
        preprocess_loraga(model, config, run)
    model.zero_grad()
    return get_peft_model(model, config, autocast_adapter_dtype=autocast)


@pytest.mark.parametrize("kind", TAKERS)
def test_a_start_in_the_bases_weights_is_known_where_it_was_seen(kind: str, tmp_path: Path) -> None:
    model, want = taker(kind), answer(wide())
    whole = answer(model)
    torch.testing.assert_close(whole, want, atol=1e-4, rtol=1e-3)
    assert measure_forgetting(model, TEXT).kl == 0.0  # seen as it was made
    tuned = answer(moved(model))
    off_is(model, whole, near=True)
    inside = measure_forgetting(model, TEXT).kl
    with base_to_sample(model):
        torch.testing.assert_close(answer(model), whole, atol=1e-5, rtol=1e-4)
    if kind in TRAINED_ALONE:
        return
    model.save_pretrained(tmp_path)
    loaded = load_adapter(wide(), tmp_path)
    torch.testing.assert_close(answer(loaded), tuned, atol=1e-4, rtol=1e-3)
    off_is(loaded, want)
    assert measure_forgetting(loaded, TEXT).kl == pytest.approx(inside, rel=1e-3)
    with pytest.raises(RetainError, match=f"init_lora_weights='{kind.lower()}'"):
        soften(loaded, fit_curvature(wide_lora(), TEXT, batch_size=4, progress=False))
    off_is(grow_lora(loaded, 2), want)


@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, {"alpha_pattern": {"v_proj": 3}, "lora_alpha": 5}],
    ids=str,
)
@pytest.mark.parametrize("kind", TRAINED_ALONE)
def test_a_start_that_cannot_be_made_again_is_saved_as_plain_lora(
    kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model = taker(kind, wide(size=64), **options)
    measure_forgetting(model, TEXT)
    tuned, inside = answer(moved(model, 0.05)), measure_forgetting(model, TEXT).kl
    before = state(model)
    model.save_pretrained(tmp_path / "peft")
    with pytest.raises(ModelError, match=rf"{kind}.*cannot be made|cannot be made.*{kind}"):
        load_adapter(wide(size=64), tmp_path / "peft")
    saved = save_adapter(model, tmp_path / "ours", "base")
    assert state(model) == before and torch.equal(answer(model), tuned)
    by_peft = peft.PeftModel.from_pretrained(wide(size=64), str(saved))
    for loaded in (load_adapter(wide(size=64), saved), by_peft):
        torch.testing.assert_close(answer(loaded), tuned, atol=1e-4, rtol=1e-3)
        assert measure_forgetting(loaded, TEXT).kl == pytest.approx(inside, rel=1e-3)
        off_is(loaded, answer(wide(size=64)))
        assert loaded.peft_config["default"].r == lora_sites(loaded)[0].rank == 8
    unseen = moved(taker(kind, wide(size=64)))
    with pytest.warns(RetainWarning, match="will not be this model.*start was not seen"):
        save_adapter(unseen, tmp_path / "unseen", "base")


@pytest.mark.parametrize("kind", ["pissa", "olora", "lora_ga"])
def test_such_a_start_that_has_grown(kind: str, tmp_path: Path) -> None:
    model = taker(kind)
    whole = answer(model)
    curvature = fit_curvature(model, TEXT, batch_size=4, progress=False)
    moved(model)
    grown = moved(grow_lora(model, 2))
    off_is(grown, whole, near=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RetainWarning)
        assert not tell_begun_from(grown, curvature, told=True)
        saved = save_adapter(grown, tmp_path / "grown", "base")
    loaded = load_adapter(wide(), saved)
    torch.testing.assert_close(answer(loaded), answer(grown), atol=1e-4, rtol=1e-3)
    off_is(loaded, answer(wide()))
    if kind == "lora_ga":
        return
    unseen = moved(taker(kind))
    unseen.save_pretrained(tmp_path / "peft")
    for other in (unseen, load_adapter(wide(), tmp_path / "peft")):
        with pytest.warns(RetainWarning, match="will not be this model"):
            save_adapter(grow_lora(other, 2), tmp_path / "unseen", "base")


def wide_lora() -> Any:
    return get_peft_model(wide(), lora(r=4))


@pytest.mark.parametrize("kind", TAKERS)
def test_a_start_that_was_trained_before_it_is_seen_is_refused(kind: str, tmp_path: Path) -> None:
    model = taker(kind)
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    model(input_ids=IDS, labels=IDS).loss.backward()
    opt.step()  # one small step is enough to tell
    with pytest.raises(ModelError, match="which changes the base's weights"):
        measure_forgetting(model, TEXT)
    if kind in TRAINED_ALONE:
        return
    model.save_pretrained(tmp_path)  # what the error says
    assert abs(measure_forgetting(load_adapter(wide(), tmp_path), TEXT).kl) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [16, 256])
@pytest.mark.parametrize("kind", ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga"])
def test_such_a_start_on_a_base_in_half_precision(
    kind: str, size: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    if dtype == torch.float16 and kind == "lora_ga":
        pytest.skip("its gradients are 0 there")
    made = partial(taker, kind, r=8)
    model = made(wide(size=size).to(dtype))
    assert measure_forgetting(model, TEXT).kl == 0.0
    for autocast in (True, False):  # of a fresh one that was not seen, and of one in half precision
        model = made(wide(size=size).to(dtype), autocast)
        opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        for _ in range(10 if autocast else 2):
            model(input_ids=IDS, labels=IDS).loss.backward()
            opt.step()
            with pytest.raises(ModelError, match="which changes the base's weights"):
                measure_forgetting(model, TEXT)
    if kind in TRAINED_ALONE:
        return
    rounded = made(wide(size=size).to(dtype), False)
    opt = torch.optim.AdamW([p for p in rounded.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(40):
        rounded(input_ids=IDS, labels=IDS).loss.backward()
        opt.step()
    rounded.save_pretrained(tmp_path)  # on the grid, but no start any more
    again = peft.PeftModel.from_pretrained(wide(size=size).to(dtype), str(tmp_path))
    assert lora_sites(again)[0].a.dtype == torch.float32
    with pytest.raises(ModelError, match="which changes the base's weights"):
        measure_forgetting(again, TEXT)


TOKENS = {"trainable_token_indices": {"embed_tokens": [3, 7]}}


@pytest.mark.parametrize("kind", ["pissa", "olora", "corda"])
@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"use_dora": True}, "magnitude"), ({"use_dora": True}, ""), (TOKENS, "tokens"),
        (TOKENS, ""), ({"target_modules": ["q_proj", "embed_tokens"]}, ""),
        ({"modules_to_save": ["norm"]}, ""),
    ],
)  # fmt: skip
def test_what_is_trained_beside_such_a_start_is_off_too(
    options: dict[str, Any], part: str, kind: str
) -> None:
    model, want = taker(kind, **options), answer(wide())
    torch.testing.assert_close(answer(model), want, atol=1e-4, rtol=1e-3)
    assert measure_forgetting(model, TEXT).kl == pytest.approx(0.0, abs=1e-9)
    for name, p in model.named_parameters():
        p.requires_grad_(p.requires_grad and part in name)
    assert not torch.allclose(answer(moved(model)), want, atol=1e-2)
    off_is(model, want, near=True)


@pytest.mark.parametrize("deleted", [False, True])
@pytest.mark.parametrize("seen", [False, True])
def test_another_adapter_after_such_a_start_is_no_base(seen: bool, deleted: bool) -> None:
    model = taker("pissa")
    want = answer(model)
    if seen:
        assert measure_forgetting(model, TEXT).kl == 0.0
    model.add_adapter("second", lora(r=4))
    model.set_adapter("second")
    moved(model)
    if not deleted:
        with pytest.raises(ModelError, match="beside one that has changed the base's weights"):
            measure_forgetting(model, TEXT)
        model.set_adapter("default")
        if seen:
            off_is(moved(model), want, near=True)
    elif seen:  # otherwise nothing tells of it any more
        model.delete_adapter("default")
        with pytest.raises(ModelError, match=r"changed the base's weights.*as it is loaded"):
            measure_forgetting(model, TEXT)


def test_a_base_that_is_cut_is_refused(tmp_path: Path) -> None:
    model = get_peft_model(wide(), lora(kasa_config=peft.tuners.lora.config.KasaConfig()))
    with pytest.raises(ModelError, match="kasa_config, which cuts the base's weights"):
        measure_forgetting(model, TEXT)
    with pytest.raises(ModelError, match="in a way that no curvature knows; got: Kasa"):
        fit_curvature(model, TEXT, batch_size=4, progress=False)
    model.save_pretrained(tmp_path)
    base_model, want = wide(), answer(wide())
    with pytest.raises(ModelError, match="with kasa_config"):
        load_adapter(base_model, tmp_path)
    assert torch.equal(answer(base_model), want)


def trained(part: str, model: Any) -> Any:
    for name, p in model.named_parameters():
        if part in name:
            p.requires_grad_(True)
    return model


BESIDE: dict[str, tuple[Callable[[], Any], bool]] = {
    "embeddings": (lambda: trained("embed_tokens", wide_lora()), True),
    "norms": (lambda: trained("layernorm", wide_lora()), False),  # PEFT writes none of them
    "bias all": (lambda: get_peft_model(wide(), lora(r=4, bias="all")), True),
    "bias lora_only": (lambda: get_peft_model(wide(), lora(r=4, bias="lora_only")), True),
}


@pytest.mark.parametrize("how", BESIDE)
def test_weights_of_the_base_that_train_beside_it(how: str, tmp_path: Path) -> None:
    make, saved = BESIDE[how]
    model = moved(make())
    for call in (
        lambda: measure_forgetting(model, TEXT),
        lambda: base_to_sample(model).__enter__(),
        lambda: soften(model, fit_curvature(wide_lora(), TEXT, batch_size=4, progress=False)),
    ):
        with pytest.raises(ModelError, match=r"train beside it|biases \("):
            call()
    if not saved:
        return
    model.save_pretrained(tmp_path, save_embedding_layers=how == "embeddings")
    loaded = load_adapter(wide(), tmp_path)
    assert torch.equal(answer(loaded), answer(model))
    off_is(loaded, answer(wide()))
    with torch.no_grad():
        p, q = (answer(m).log_softmax(-1) for m in (wide(), model))
    want = float((p.exp() * (p - q)).sum(-1)[0, :-1].mean())  # each place predicts the next
    found = measure_forgetting(loaded, [{"input_ids": IDS[0].tolist()}]).kl
    assert found == pytest.approx(want, rel=1e-4)
    with pytest.raises(ModelError, match=r"came with it|biases \("):
        soften(loaded, fit_curvature(wide_lora(), TEXT, batch_size=4, progress=False))


def test_merged_or_switched_off_adapters_are_refused() -> None:
    model = moved(tiny("llama"))
    model.merge_adapter()
    with pytest.raises(ModelError, match=r"merged.*fix: model.unmerge_adapter\(\)"):
        measure_forgetting(model, TEXT)
    assert all(site.layer.merged for site in lora_sites(model))
    model.unmerge_adapter()
    assert measure_forgetting(model, TEXT).kl > 0
    model.base_model.disable_adapter_layers()
    for call in (measure_forgetting, lambda m, t: fit_curvature(m, t, batch_size=4)):
        with pytest.raises(ModelError, match="the adapter is switched off"):
            call(model, TEXT)
    model.base_model.enable_adapter_layers()
    assert measure_forgetting(model, TEXT).kl > 0
    with pytest.raises(ModelError, match="no adapter to switch off"):
        measure_forgetting(plain(), TEXT)


@pytest.mark.parametrize("tied", [False, True])
def test_a_resized_vocabulary_says_so_and_the_fix_works(tied: bool, tmp_path: Path) -> None:
    def fresh() -> Any:
        model = wide()
        if tied:
            model.config.tie_word_embeddings = True
            model.tie_weights()
        return model

    small = fresh()
    small.resize_token_embeddings(15, mean_resizing=False)
    model = moved(trained("embed_tokens", get_peft_model(small, lora(r=4))))
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    with pytest.raises(ModelError, match=r"vocabulary was resized.*15 tokens, a base with 13"):
        load_adapter(fresh(), tmp_path)
    again = fresh()
    again.resize_token_embeddings(15, mean_resizing=False)
    want = answer(again)
    loaded = load_adapter(again, tmp_path)
    torch.testing.assert_close(answer(loaded), answer(model))
    off_is(loaded, want)
    assert measure_forgetting(loaded, TEXT).kl > 0


@pytest.mark.parametrize("name", ["default", "model", "layers"])
def test_an_adapter_of_any_name_is_saved_as_plain_lora(name: str, tmp_path: Path) -> None:
    made = lora(r=4, init_lora_weights="pissa_niter_4")
    model = get_peft_model(wide(), made, adapter_name=name)
    assert measure_forgetting(model, TEXT).kl == 0.0
    model = moved(model)
    want = answer(model)
    loaded = load_adapter(wide(), save_adapter(model, tmp_path / "adapter", "base"))
    torch.testing.assert_close(answer(loaded), want, atol=1e-4, rtol=1e-3)


def test_an_adapter_after_one_that_began_in_the_bases_weights_is_not_saved_silently(
    tmp_path: Path,
) -> None:
    model = get_peft_model(wide(), lora(r=4, init_lora_weights="pissa"))
    assert measure_forgetting(model, TEXT).kl == 0.0
    model.add_adapter("other", lora(r=4))
    model.set_adapter("other")
    model.delete_adapter("default")
    with pytest.warns(RetainWarning, match="will not be this model when it is loaded"):
        save_adapter(model, tmp_path / "adapter", "base")
