"""The whole curvature: what it belongs to, its anchor, ranks, sharing, rounding and refusals."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import peft
import pytest
import torch

from fits import FIT, dense_quadratic, fit, known, same, tensors
from retain import fit_curvature, load_curvature
from retain.curvature.blocks.factor import DenseFactor
from retain.curvature.stack import _Factors
from retain.data.sources import encode
from retain.errors import ConfigError, CurvatureError, MismatchError, ModelError
from retain.models.sites import lora_sites
from retain.types import SPACES
from tiny import KINDS, ROWS, STRUCTURES, base, move, relative, tiny

llama = partial(tiny, "llama")


def changed() -> torch.nn.Module:
    """One base weight is another."""
    model = llama()
    with torch.no_grad():
        lora_sites(model)[3].layer.base_layer.weight[0, 0] += 0.1
    return model


@pytest.mark.parametrize(
    ("space", "other", "said"),
    [
        *[(space, lambda: llama(seed=5), "another base model") for space in SPACES],
        *[(space, lambda: tiny("bert"), "another base model") for space in SPACES],
        *[(space, changed, "another base model") for space in SPACES],
        *[(s, lambda: llama(targets=["q_proj", "down_proj"]), "other layers") for s in SPACES],
        ("adapter", lambda: llama(rank=3), "one rank and scaling"),
        ("weight", lambda: base("llama"), "no weights to hold"),
    ],
)
def test_what_is_not_the_curvatures_model_is_refused(
    space: str, other: Any, said: str, tmp_path
) -> None:
    curvature = known("llama", space, moved=False)
    for each in (curvature, load_curvature(curvature.save(tmp_path / "c"))):
        with pytest.raises(MismatchError, match=said) as caught:
            each.quadratic(other())
        assert "\n" not in str(caught.value)


def test_adapter_space_does_see_how_the_update_is_split() -> None:
    model = llama(moved=True)
    with torch.no_grad():
        for site in lora_sites(model):
            site.b.mul_(2)
            site.a.div_(2)
    assert known("llama", "adapter").quadratic(model) > 0


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("moved", [False, True])
def test_weight_space_fits_any_rank(structure: str, moved: bool, tmp_path) -> None:
    curvature = known("llama", "weight", structure, moved)
    loaded = load_curvature(curvature.save(tmp_path / "c"))
    for rank in (1, 3):
        other = llama(rank=rank, moved=True)
        want = dense_quadratic(curvature, other).detach()
        assert want > 0
        for each in (curvature, loaded):
            assert relative(each.quadratic(other), want) < 1e-10


@pytest.mark.parametrize("structure", STRUCTURES)
def test_layers_of_several_ranks_and_anchors(structure: str) -> None:
    model = llama(targets=["q_proj", "v_proj", "down_proj"])
    sites = lora_sites(model)
    with torch.no_grad():
        for site in sites[:2]:
            site.b.add_(0.3)
    curvature = fit(model, "llama", structure)
    assert list(curvature.anchor) == [site.name for site in sites[:2]]
    move(model, seed=9)
    value = dense_quadratic(curvature, model)
    value.backward()
    nats, pulls = curvature.pulls(sites)
    assert relative(nats, value.detach()) < 1e-10
    assert all(relative(gradient, p.grad) < 1e-10 for p, gradient in pulls)


def test_load_anchor_brings_the_adapter_back() -> None:
    model, curvature = llama(moved=True), known("llama", "adapter")
    move(model, seed=9)
    assert not curvature.at_anchor(lora_sites(model))
    curvature.load_anchor(model)
    assert curvature.at_anchor(lora_sites(model))
    assert curvature.quadratic(model) == 0.0
    with pytest.raises(MismatchError, match="only an adapter-space curvature"):
        known("llama").load_anchor(model)


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "activation", "tridiagonal"])
def test_shared_inputs_are_kept_once(structure: str) -> None:
    curvature = known("llama", "weight", structure, moved=False)
    blocks = curvature.blocks
    for layer in range(2):
        at = f"model.layers.{layer}."
        attention = {id(blocks[f"{at}self_attn.{n}_proj"].inputs) for n in "qkv"}
        mlp = {id(blocks[f"{at}mlp.{n}_proj"].inputs) for n in ("gate", "up")}
        others = {id(blocks[f"{at}{n}"].inputs) for n in ("self_attn.o_proj", "mlp.down_proj")}
        assert (len(attention), len(mlp), len(attention | mlp | others)) == (1, 1, 4)
    every = sum(8 * t.numel() for block in blocks.values() for t in block.tensors().values())
    for (i, j), link in curvature.links.items():
        shared = blocks[i].inputs is blocks[j].inputs
        assert shared is (link.inputs is blocks[i].inputs.dense())
        every += 8 * (link.outputs.numel() + (0 if shared else link.inputs.numel()))
    assert curvature.memory() == every - 2 * 8 * (2 * 8 * 8 + 8 * 8)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_displacements_may_be_of_any_precision(structure: str, dtype: torch.dtype) -> None:
    curvature = fit(tiny("llama", dtype=torch.float32), "llama", structure)
    moves = {n: torch.ones(b.shape) for n, b in curvature.blocks.items()}
    found = curvature.quadratic({n: move.to(dtype) for n, move in moves.items()})
    assert found == pytest.approx(curvature.quadratic(moves), rel=1e-5)
    assert {t.dtype for t in curvature.matvec(moves).values()} == {torch.float32}


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"structure": "kfca"}, "did you mean 'kfac'"),
        ({"structure": "diag"}, "did you mean 'diagonal'"),
        ({"structure": "kfac-tri"}, "unknown structure"),
        ({"space": "weights"}, "did you mean 'weight'"),
        ({"fisher": "emprical"}, "did you mean 'empirical'"),
        ({"products": "bf16"}, "unknown products"),
        ({"rank": "all"}, "unknown rank"),
        *(
            ({name: 0}, f"{name} is too small")
            for name in ("samples", "rows", "batch_size", "rank")
        ),
        *(
            ({name: 2.0}, f"{name} is no whole number; got: 2.0")
            for name in ("samples", "rows", "rank")
        ),
        ({"share": "0.5"}, "the share is no share; got: '0.5'"),
        *(
            ({"structure": s, "rank": 2}, f"got: structure='{s}' with rank=2; allowed: a rank with")
            for s in ("identity", "diagonal", "ekfac", "tridiagonal")
        ),
        *(({"share": n}, "the share is no share; got") for n in (0, -0.5, 1.5, math.nan, math.inf)),
        *(
            ({"temperature": n}, "the temperature is no temperature")
            for n in (0, -1.0, math.nan, math.inf)
        ),
        ({"calibrate": False, "share": 0.5}, "got: calibrate=False with share=0.5"),
    ],
)
def test_settings_that_are_refused_before_any_work(options: dict, hint: str) -> None:
    def nothing(*_: object, **__: object) -> None:
        raise AssertionError("work was done")

    model = llama()
    model.forward = nothing
    with pytest.raises(ConfigError) as caught:
        fit_curvature(model, ROWS["llama"], **{**FIT, **options})
    assert hint in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("LoHa", {}),
        ("LoKr", {}),
        ("AdaLora", {"total_step": 10}),
        ("Vera", {"r": 4}),
        ("IA3", {"feedforward_modules": []}),
    ],
)
def test_an_adapter_of_another_kind_is_named(kind: str, options: dict[str, Any]) -> None:
    config = getattr(peft, f"{kind}Config")(target_modules=["q_proj"], **options)
    model = peft.get_peft_model(base("llama", dtype=torch.float32), config)
    with pytest.raises(ModelError, match=f"no LoRA adapter; got: .* {kind.upper()}; .*LoraConfig"):
        fit(model, "llama")


def certain() -> torch.nn.Module:
    """Its logits are so large that every probability is 0 or 1."""
    model = llama(targets=["o_proj", "down_proj"])
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e8)
    return model


@pytest.mark.parametrize(
    ("model", "options", "error", "said"),
    [
        (lambda: base("llama").requires_grad_(False), {}, ModelError, "no LoRA adapter"),
        (llama, {"structure": ["kfac"]}, ConfigError, r"unknown structure; got: \"\['kfac'\]\""),
        (lambda: base("llama"), {"space": "adapter"}, CurvatureError, "plain LoRA factors"),
        # With one position, attention does not depend on its query and key.
        (
            llama,
            {"source": [{"input_ids": [3, 7]}], "batch_size": 1},
            CurvatureError,
            "no gradient at all.*rows of several tokens",
        ),
        (certain, {}, CurvatureError, r"certain of each prediction.*0 at all 4 layers.*less sure"),
    ],
)
def test_fits_that_cannot_be(model: Any, options: dict, error: Any, said: str) -> None:
    with pytest.raises(error, match=said):
        fit(model(), "llama", **options)


def test_a_source_may_be_smaller_than_a_batch() -> None:
    whole, beyond = (tensors(fit(llama(), "llama", batch_size=size)) for size in (4, 50))
    assert all(map(torch.equal, whole, beyond))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("structure", ["kfac", "activation", "shampoo"])
def test_rounded_factors_pull_nearly_as_whole_ones(kind: str, structure: str) -> None:
    model = tiny(kind).float()
    curvature = fit(model, kind, structure)
    move(model, seed=9)
    sites = curvature.bind(model)
    nats, pulls = curvature.pulls(sites)
    rounded, near = curvature.pulls(sites, rounded=True)
    assert rounded == pytest.approx(nats, rel=1e-2)
    assert rounded != nats
    assert all(p.parameter is n.parameter for p, n in zip(pulls, near, strict=True))
    exact, other = (torch.cat([p.gradient.flatten() for p in found]) for found in (pulls, near))
    assert 0 < relative(other, exact) < 2e-2
    assert curvature.pulls(sites)[0] == nats  # the factors themselves are as they were


@pytest.mark.parametrize("size", [40, 1100])
def test_large_directions_do_not_round_away_what_is_small(size: int) -> None:
    random = torch.Generator().manual_seed(0)
    draw = torch.randn(2, size, size, generator=random) / size**0.5
    heavy = 30 * torch.randn(2, size, 4, generator=random)
    whole = [DenseFactor(d @ d.T + h @ h.T) for d, h in zip(draw, heavy, strict=True)]
    rows = torch.randn(2, 3, size, generator=random)
    away = torch.linalg.qr(heavy)[0]
    rows -= rows @ away @ away.mT  # as behind a filter
    exact = torch.stack([r.double() @ f.matrix.double() for r, f in zip(rows, whole, strict=True)])
    factors = _Factors(whole)
    light = factors.rounded()
    plain = (rows.bfloat16() @ factors.tensors[""].bfloat16()).double()
    assert relative(light.matmul(rows).double(), exact) < 0.05 < 1 < relative(plain, exact)
    assert light.tensors[""].dtype == torch.bfloat16
    assert factors.largest is None
    assert relative(factors.matmul(rows).double(), exact) < 0.02


@pytest.mark.parametrize("kind", KINDS)
def test_around_a_later_anchor_and_in_double_precision_nothing_is_rounded(kind: str) -> None:
    for model, moved in ((tiny(kind), False), (tiny(kind, moved=True).float(), True)):
        curvature = fit(model, kind)
        move(model, seed=9)
        sites = curvature.bind(model)
        assert bool(curvature.anchor) is moved
        assert curvature.pulls(sites, rounded=True)[0] == curvature.pulls(sites)[0]


@pytest.mark.parametrize("structure", STRUCTURES)
def test_tensors_move_together_and_what_is_shared_stays_so(structure: str) -> None:
    curvature = fit(llama(moved=True), "llama", structure)
    want, groups = known("llama", "weight", structure), curvature.groups()
    assert curvature.to(torch.device("meta")) is curvature
    assert {t.device.type for t in tensors(curvature)} == {"meta"}
    assert {t.device.type for kept in curvature.anchor.values() for t in kept} == {"meta"}
    assert curvature.groups() == groups
    assert len({id(t) for t in tensors(curvature)}) == len({id(t) for t in tensors(want)})


@pytest.mark.parametrize("kind", KINDS)
def test_tokenised_rows_are_taken_as_they_are(kind: str) -> None:
    ready = encode(ROWS[kind], None, max_length=16, causal=kind == "llama")
    same(fit(tiny(kind, moved=True), kind, source=ready), known(kind), 1e-15)
