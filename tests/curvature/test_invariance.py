"""What a curvature must not depend on, and what measuring it must leave alone."""

from __future__ import annotations

import random
from typing import Any

import numpy
import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

import fits
from families import FAMILIES, built
from retain import Curvature, attach_lora
from retain.data.batches import Example
from retain.errors import RetainWarning, SourceError
from retain.models.sites import lora_sites
from retain.types import FISHERS, SPACES
from tiny import KINDS, ROWS, STRUCTURES, tiny

SOME = [("llama", p, s) for p in SPACES for s in STRUCTURES] + [
    ("bert", "weight", "tridiagonal"),
    ("bert", "adapter", "kfac"),
]
EACH = pytest.mark.parametrize(("kind", "space", "structure"), SOME)


def fit(model: torch.nn.Module, kind: str, batch_size: int = 2, **options: Any) -> Curvature:
    return fits.fit(model, kind, batch_size=batch_size, **{"samples": 2, "seed": 4} | options)


def same(got: Curvature, want: Curvature, tolerance: float = 1e-9) -> None:
    fits.same(got, want, tolerance)
    assert set(got.anchor) == set(want.anchor)
    assert got.info.predictions == want.info.predictions
    assert got.info.error == pytest.approx(want.info.error, rel=1e-6, nan_ok=True)


@pytest.mark.parametrize(
    ("kind", "space", "structure", "fisher"),
    [(k, p, s, "mc") for k in KINDS for p in SPACES for s in STRUCTURES]
    + [(k, "weight", "kfac", f) for k in KINDS for f in FISHERS if f != "mc"],
)
def test_batch_size_and_padding(kind: str, space: str, structure: str, fisher: str) -> None:
    # One row a batch has no padding; two and four rows of different lengths have.
    model = tiny(kind, moved=True)
    options = {"space": space, "structure": structure, "fisher": fisher}
    alone = fit(model, kind, 1, **options)
    for size in (2, 4):
        same(fit(model, kind, size, **options), alone)


@pytest.mark.parametrize("structure", [s for s in STRUCTURES if s != "activation"])
def test_rows_of_one_token_beside_a_pooled_layer(structure: str) -> None:
    # BERT's pooler sees one position of each row, which is all of it here.
    rows = [*ROWS["bert"], {"input_ids": [5], "label": 1}, {"input_ids": [7], "label": 2}]
    model = tiny("bert", moved=True)
    options = {"structure": structure, "fisher": "empirical", "source": rows}
    same(fit(model, "bert", 1, **options), fit(model, "bert", 6, **options))


@pytest.mark.parametrize(
    ("structure", "fisher"),
    [("kfac", f) for f in FISHERS] + [(s, "mc") for s in STRUCTURES if s != "kfac"],
)
def test_rows_that_predict_nothing(structure: str, fisher: str) -> None:
    some = Example((3, 4, 5, 7), (4, 5, 6, 1), (True, False, True, False))
    none = [Example((3, 4, 5), (4, 5, 6), (False,) * 3), Example((3, 4), (4, 5), (False,) * 2)]
    model, options = tiny("llama", moved=True), {"structure": structure, "fisher": fisher}
    want = fit(model, "llama", 1, source=[some], **options)
    for size in (1, 3):
        with pytest.warns(RetainWarning, match="2 rows that ask for no prediction are left out"):
            same(fit(model, "llama", size, source=[none[0], some, none[1]], **options), want)
    with pytest.raises(SourceError, match="asks for no prediction; got: 2 rows"):
        fit(model, "llama", 1, source=none, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_order_of_the_rows(kind: str) -> None:
    # With the data's own labels there are no draws that belong to a row's number.
    model, back = tiny(kind), ROWS[kind][::-1]
    forward = fit(model, kind, fisher="empirical")
    same(fit(model, kind, fisher="empirical", source=back), forward)


@pytest.mark.parametrize("pad", [0, 5])
def test_the_padding_token(pad: int) -> None:
    model = tiny("llama", moved=True)
    want = fit(model, "llama", 4)
    model.config.pad_token_id = pad
    same(fit(model, "llama", 4), want)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("moved", [True, False])
@EACH
def test_gradient_checkpointing(
    kind: str, space: str, structure: str, moved: bool, reentrant: bool
) -> None:
    # Away from the start in evaluation mode, and at it in training mode.
    want = fit(tiny(kind, moved=moved), kind, space=space, structure=structure)
    model = tiny(kind, moved=moved)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.train(not moved)
    same(fit(model, kind, space=space, structure=structure), want)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_really_runs_each_layer_again(reentrant: bool) -> None:
    model = tiny("llama")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    runs = []
    handle = lora_sites(model)[0].layer.register_forward_pre_hook(lambda *_: runs.append(1))
    fit(model, "llama", 4, samples=1)
    handle.remove()
    assert len(runs) == 3  # the look for shared inputs, the pass, and the pass again


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("space", SPACES)
def test_dropout(kind: str, space: str) -> None:
    want = fit(tiny(kind, moved=True), kind, space=space)
    model = tiny(kind, moved=True, lora_dropout=0.5, dropout=0.5)
    same(fit(model, kind, space=space), want, 1e-12)
    model.train()
    same(fit(model, kind, space=space), want, 1e-12)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["OPT", "Falcon"])
def test_dropout_of_a_checkpointed_layer_itself(family: str, reentrant: bool) -> None:
    # OPT's body skips layers at random, and Falcon's layers read the configuration.
    drops = {"OPT": {"dropout": 0.5, "layerdrop": 0.5}, "Falcon": {"hidden_dropout": 0.5}}[family]

    def model() -> PeftModel:
        plain = built(AutoModelForCausalLM, family, **FAMILIES[family], **drops)
        return attach_lora(plain.double(), rank=2)

    want, recomputed = fit(model(), "llama"), model().train()
    recomputed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    before = torch.get_rng_state()
    same(fit(recomputed, "llama"), want, 1e-12)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(m.training for m in recomputed.modules())


@pytest.mark.parametrize(
    ("kind", "space", "structure", "mode"),
    [(*each, "mixed") for each in SOME]
    + [(k, p, "shampoo", m) for k in KINDS for p in SPACES for m in ("train", "eval")],
)
def test_model_and_random_state_are_left_alone(
    kind: str, space: str, structure: str, mode: str
) -> None:
    model = tiny(kind, moved=True)
    model.train(mode != "eval")
    sites = lora_sites(model)
    if mode == "mixed":
        sites[2].layer.eval()
        sites[0].a.requires_grad_(False)
        sites[1].layer.base_layer.weight.requires_grad_(True)
    sites[1].b.grad = torch.ones_like(sites[1].b)

    def state() -> list:
        return [
            {n: m.training for n, m in model.named_modules()},
            {n: p.requires_grad for n, p in model.named_parameters()},
            {n: None if p.grad is None else p.grad.tolist() for n, p in model.named_parameters()},
            {n: p.tolist() for n, p in model.state_dict().items()},
            {
                n: (len(m._forward_hooks), len(m._forward_pre_hooks))
                for n, m in model.named_modules()
            },
            torch.get_rng_state().tolist(),
            random.getstate(),
            numpy.random.get_state()[1].tolist(),
            torch.is_grad_enabled(),
        ]

    before = state()
    fit(model, kind, space=space, structure=structure)
    for now, then in zip(state(), before, strict=True):
        assert now == then


@pytest.mark.parametrize("kind", KINDS)
def test_a_fit_that_fails_leaves_the_model_alone(kind: str) -> None:
    def stop(*_: object) -> None:
        if torch.is_grad_enabled():
            raise RuntimeError("stopped on the way")

    model = tiny(kind)
    model.train()
    last = lora_sites(model)[-1].layer
    handle = last.register_forward_pre_hook(stop)
    with pytest.raises(RuntimeError, match="stopped on the way"):
        fit(model, kind)
    handle.remove()
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad for s in lora_sites(model) for p in (s.a, s.b))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_fit_works_inside_no_grad() -> None:
    want = fit(tiny("llama"), "llama")
    with torch.no_grad():
        same(fit(tiny("llama"), "llama"), want, 1e-15)


def test_blocks_do_not_follow_the_model() -> None:
    model = tiny("llama", moved=True)
    curvature = fit(model, "llama", space="adapter")

    def copies() -> list[Tensor]:
        return [t.clone() for t in fits.tensors(curvature)] + [
            t.clone() for pair in curvature.anchor.values() for t in pair
        ]

    before = copies()
    with torch.no_grad():
        for site in lora_sites(model):
            site.a.add_(1)
            site.b.add_(1)
    assert all(torch.equal(x, y) for x, y in zip(copies(), before, strict=True))
