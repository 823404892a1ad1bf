"""Each structure, space and Fisher against the brute-force twin of `oracles`."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from oracles import FACTORS, Oracle, calibrate, kfac
from retain import fit_curvature
from retain.models.adapter import lora_sites
from retain.types import FISHERS, SPACES, STRUCTURES
from tiny import KINDS, ROWS, move, relative, tiny

SAMPLES, SEED = 3, 5
FIT = {"samples": SAMPLES, "seed": SEED, "batch_size": 2, "progress": False}

MATRIX = pytest.mark.parametrize(
    ("kind", "moved", "space", "fisher"),
    [(k, m, s, f) for k in KINDS for m in (False, True) for s in SPACES for f in FISHERS],
)


@cache
def oracle(kind: str, moved: bool) -> Oracle:
    return Oracle(tiny(kind, moved=moved), ROWS[kind], causal=kind == "llama")


@cache
def dense(kind: str, moved: bool, space: str, fisher: str) -> dict[str, Tensor]:
    return oracle(kind, moved).dense(space, fisher, SAMPLES, SEED)


def expected(kind: str, moved: bool, space: str, fisher: str, structure: str) -> dict[str, Tensor]:
    full = dense(kind, moved, space, fisher)
    if structure == "diagonal":
        return {name: torch.diag(f.diagonal()) for name, f in full.items()}
    if structure == "identity":
        mean = sum(f.trace() for f in full.values()) / sum(len(f) for f in full.values())
        return {name: mean * torch.eye(len(f), dtype=f.dtype) for name, f in full.items()}
    factors = FACTORS[structure](oracle(kind, moved), space, fisher, SAMPLES, SEED)
    return {name: calibrate(factors[name], f) for name, f in full.items()}


def displacement(model: torch.nn.Module, space: str, seed: int) -> dict[str, Tensor]:
    """Moves the adapter, and tells by how much each weight has moved, by the block's name."""

    def here() -> dict[str, Tensor]:
        if space == "weight":
            return {s.name: (s.scaling * s.b @ s.a).detach() for s in lora_sites(model)}
        out = {}
        for s in lora_sites(model):
            out[f"{s.name}.lora_A"] = s.a.detach().clone()
            out[f"{s.name}.lora_B"] = s.b.detach().clone()
        return out

    before = here()
    move(model, seed)
    return {name: now - before[name] for name, now in here().items()}


@pytest.mark.parametrize("structure", STRUCTURES)
@MATRIX
def test_curvature_equals_its_oracle(
    kind: str, moved: bool, space: str, fisher: str, structure: str
) -> None:
    model = tiny(kind, moved=moved)
    curvature = fit_curvature(model, ROWS[kind], structure, space=space, fisher=fisher, **FIT)
    want = expected(kind, moved, space, fisher, structure)
    assert set(curvature.blocks) == set(want)
    for name, block in curvature.blocks.items():
        assert block.shape == oracle(kind, moved).shapes[name]
        assert relative(block.to_dense(), want[name]) < 1e-9, name
        assert block.trace() == pytest.approx(float(want[name].trace()), rel=1e-9, abs=1e-300)
    info = curvature.info
    assert (info.predictions, info.sequences) == (oracle(kind, moved).predictions, len(ROWS[kind]))

    # The quadratic is that of the same blocks at a displacement from the present adapter.
    assert abs(curvature.quadratic(model)) < 1e-25
    moves = displacement(model, space, seed=8)
    value = sum(0.5 * d.reshape(-1) @ want[name] @ d.reshape(-1) for name, d in moves.items())
    assert relative(curvature.quadratic(model), float(value)) < 1e-9


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("space", SPACES)
def test_trace_is_the_true_one_in_every_structure(kind: str, space: str) -> None:
    model = tiny(kind, moved=True)
    want = sum(float(f.trace()) for f in dense(kind, True, space, "mc").values())
    for structure in STRUCTURES:
        curvature = fit_curvature(model, ROWS[kind], structure, space=space, **FIT)
        total = sum(block.trace() for block in curvature.blocks.values())
        assert total == pytest.approx(want, rel=1e-9)


def test_without_calibration_kfac_is_the_plain_product_of_its_factors() -> None:
    model = tiny("llama")
    curvature = fit_curvature(model, ROWS["llama"], "kfac", calibrate=False, **FIT)
    factors = kfac(oracle("llama", False), "weight", "mc", SAMPLES, SEED)
    for name, block in curvature.blocks.items():
        s, g = factors[name]
        assert relative(block.to_dense(), torch.kron(g, s)) < 1e-9


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("structure", FACTORS)
def test_factors_are_the_dense_fisher_where_there_is_one_position(
    space: str, fisher: str, structure: str
) -> None:
    # One prediction from one position: E[g g^T] (x) x x^T is no approximation. Attention over one
    # position does not depend on its query and key, so those two are left out.
    targets = ["v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    rows = [{"input_ids": [3, 7]}]
    model = tiny("llama", moved=True, targets=targets)
    options = {"samples": 4, "seed": 1, "batch_size": 1, "progress": False}
    curvature = fit_curvature(model, rows, structure, space=space, fisher=fisher, **options)
    full = Oracle(model, rows, causal=True).dense(space, fisher, samples=4, seed=1)
    for name, block in curvature.blocks.items():
        assert relative(block.to_dense(), full[name]) < 1e-9, name
    moves = displacement(model, space, seed=3)
    value = sum(0.5 * d.reshape(-1) @ full[name] @ d.reshape(-1) for name, d in moves.items())
    assert relative(curvature.quadratic(model), float(value)) < 1e-9


@pytest.mark.parametrize("structure", FACTORS)
def test_predicted_nats_are_the_kl_of_a_small_step(structure: str) -> None:
    # The unit: nats a prediction. One layer at one position, where a product of factors is
    # exact, so that the quadratic is the KL to second order.
    model = tiny("llama", targets=["down_proj"])
    options = {"fisher": "exact", "batch_size": 1, "progress": False}
    curvature = fit_curvature(model, [{"input_ids": [3, 7]}], structure, **options)
    for layer in (0, 1):
        model = tiny("llama", targets=["down_proj"])
        site = lora_sites(model)[layer]
        with torch.no_grad():
            before = model(torch.tensor([[3]])).logits[0].log_softmax(-1)
            site.b.add_(torch.randn(site.b.shape, generator=torch.Generator().manual_seed(1)) / 1e4)
            after = model(torch.tensor([[3]])).logits[0].log_softmax(-1)
        kl = float((before.exp() * (before - after)).sum())
        assert kl > 1e-12
        assert curvature.quadratic(model) == pytest.approx(kl, rel=1e-2)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("kind", KINDS)
def test_adapter_space_does_not_see_a_while_b_is_zero(kind: str, structure: str) -> None:
    model = tiny(kind)
    curvature = fit_curvature(model, ROWS[kind], structure, space="adapter", **FIT)
    traces = {n: b.trace() for n, b in curvature.blocks.items()}
    for name, trace in traces.items():
        if structure == "identity":  # one number for the whole model, so A is held with it
            assert trace > 0
        else:
            assert (trace == 0) is name.endswith("lora_A"), name


@cache
def rough(kind: str, dtype: torch.dtype) -> dict[str, Tensor]:
    model = tiny(kind, dtype=dtype)
    return Oracle(model, ROWS[kind], causal=kind == "llama").dense("weight", "exact")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_lower_precision_follows_the_model_and_is_kept_in_float32(
    kind: str, dtype: torch.dtype, structure: str
) -> None:
    # Against the gradients of the same model in the same precision. The exact Fisher, since
    # another rounding may draw another label.
    model = tiny(kind, dtype=dtype)
    options = {"fisher": "exact", "batch_size": 2, "progress": False}
    curvature = fit_curvature(model, ROWS[kind], structure, **options)
    full = rough(kind, dtype)
    bound = 1e-4 if dtype == torch.float32 else 0.1
    total = 0.0
    for name, block in curvature.blocks.items():
        assert {t.dtype for t in block.tensors().values()} == {torch.float32}
        if structure == "diagonal":
            assert relative(block.to_dense().diagonal(), full[name].diagonal()) < bound, name
        elif structure in FACTORS:
            assert block.trace() == pytest.approx(float(full[name].trace()), rel=bound)
        total += block.trace()
    assert total == pytest.approx(float(sum(f.trace() for f in full.values())), rel=bound)
