"""Each structure, space and Fisher against the brute-force twin of `oracles`."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from oracles import FACTORS, Oracle, calibrate, kfac
from oracles_more import activation, ekfac, places, tridiagonal
from quadratics import displacement, joined
from retain import Curvature, fit_curvature
from retain.models.sites import lora_sites
from retain.types import FISHERS, SPACES
from tiny import KINDS, ROWS, STRUCTURES, move, relative, tiny

SAMPLES, SEED = 3, 5
FIT = {"samples": SAMPLES, "seed": SEED, "batch_size": 2, "progress": False}
LABELLED = [s for s in STRUCTURES if s != "activation"]
"""Structures that a Fisher is in."""

MATRIX = pytest.mark.parametrize(
    ("kind", "moved", "space", "fisher"),
    [(k, True, s, f) for k in KINDS for s in SPACES for f in FISHERS]
    + [(k, False, s, "mc") for k in KINDS for s in SPACES],
)


@cache
def oracle(kind: str, moved: bool) -> Oracle:
    return Oracle(tiny(kind, moved=moved), ROWS[kind], causal=kind == "llama")


@cache
def dense(kind: str, moved: bool, space: str, fisher: str) -> dict[str, Tensor]:
    return oracle(kind, moved).dense(space, fisher, SAMPLES, SEED)


def expected(kind: str, moved: bool, space: str, fisher: str, structure: str) -> Tensor:
    """The whole curvature as one matrix, of the weights in the oracle's order."""
    if structure == "tridiagonal":
        return tridiagonal(oracle(kind, moved), space, fisher, SAMPLES, SEED)[1]
    full = dense(kind, moved, space, fisher)
    if structure == "diagonal":
        blocks = {name: torch.diag(f.diagonal()) for name, f in full.items()}
    elif structure == "identity":
        mean = sum(f.trace() for f in full.values()) / sum(len(f) for f in full.values())
        blocks = {name: mean * torch.eye(len(f), dtype=f.dtype) for name, f in full.items()}
    elif structure == "ekfac":
        blocks = ekfac(oracle(kind, moved), space, fisher, SAMPLES, SEED)
    else:
        factors = FACTORS[structure](oracle(kind, moved), space, fisher, SAMPLES, SEED)
        blocks = {name: calibrate(factors[name], f) for name, f in full.items()}
    return torch.block_diag(*(blocks[name] for name in full))


def check_moves(
    curvature: Curvature, model: torch.nn.Module, want: Tensor, tolerance: float = 1e-9
) -> None:
    """The quadratic and the product with F at a displacement from the present adapter."""
    assert abs(curvature.quadratic(model)) < 1e-25
    move(model, seed=8)
    moves = {name: d.detach() for name, d in displacement(curvature, model).items()}
    d = joined(curvature, moves)
    value = float(0.5 * d @ want @ d)
    assert relative(curvature.quadratic(model), value) < tolerance
    assert relative(curvature.quadratic(moves), value) < tolerance
    pulled = curvature.matvec(moves)
    assert {name: f.shape for name, f in pulled.items()} == {n: d.shape for n, d in moves.items()}
    assert relative(joined(curvature, pulled), want @ d) < tolerance


@pytest.mark.parametrize("structure", LABELLED)
@MATRIX
def test_curvature_equals_its_oracle(
    kind: str, moved: bool, space: str, fisher: str, structure: str
) -> None:
    model = tiny(kind, moved=moved)
    curvature = fit_curvature(model, ROWS[kind], structure, space=space, fisher=fisher, **FIT)
    want, truth = expected(kind, moved, space, fisher, structure), oracle(kind, moved)
    place = places(truth, truth.names[space])
    assert list(curvature.blocks) == list(place)
    assert relative(curvature.to_dense(), want) < 1e-9
    for name, block in curvature.blocks.items():
        part = want[place[name], place[name]]
        assert block.shape == truth.shapes[name]
        assert relative(block.to_dense(), part) < 1e-9, name
        assert block.trace() == pytest.approx(float(part.trace()), rel=1e-9, abs=1e-300)
    assert bool(curvature.links) is (structure == "tridiagonal")
    info = curvature.info
    assert (info.predictions, info.sequences) == (truth.predictions, len(ROWS[kind]))
    assert info.temperature == (2.0 if fisher == "tempered" else 1.0)
    check_moves(curvature, model, want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("fisher", ["mc", "reversed"])
def test_trace_is_the_true_one_in_every_structure(kind: str, space: str, fisher: str) -> None:
    model = tiny(kind, moved=True)
    want = sum(float(f.trace()) for f in dense(kind, True, space, fisher).values())
    for structure in LABELLED:
        curvature = fit_curvature(model, ROWS[kind], structure, space=space, fisher=fisher, **FIT)
        total = sum(block.trace() for block in curvature.blocks.values())
        assert total == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_other_temperatures(temperature: float) -> None:
    options = {"fisher": "tempered", "temperature": temperature, **FIT}
    curvature = fit_curvature(tiny("llama", moved=True), ROWS["llama"], "kfac", **options)
    options = ("weight", "tempered", SAMPLES, SEED, temperature)
    factors = kfac(oracle("llama", True), *options)
    full = oracle("llama", True).dense(*options)
    for name, block in curvature.blocks.items():
        assert relative(block.to_dense(), calibrate(factors[name], full[name])) < 1e-9, name


def test_without_calibration_kfac_is_the_plain_product_of_its_factors() -> None:
    model = tiny("llama")
    curvature = fit_curvature(model, ROWS["llama"], "kfac", calibrate=False, **FIT)
    factors = kfac(oracle("llama", False), "weight", "mc", SAMPLES, SEED)
    for name, block in curvature.blocks.items():
        s, g = factors[name]
        assert relative(block.to_dense(), torch.kron(g, s)) < 1e-9


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("space", SPACES)
def test_without_calibration_a_chain_is_the_same_congruence_of_it(kind: str, space: str) -> None:
    # Each block, and each link by the geometric mean of its ends, is off by its own factor.
    model, names = tiny(kind, moved=True), oracle(kind, True).names[space]
    plain = fit_curvature(model, ROWS[kind], "tridiagonal", space=space, calibrate=False, **FIT)
    factors = kfac(oracle(kind, True), space, "mc", SAMPLES, SEED)
    want, full = expected(kind, True, space, "mc", "tridiagonal"), dense(kind, True, space, "mc")
    place = places(oracle(kind, True), names)
    root = torch.zeros(len(want), dtype=torch.float64)
    for name in names:
        s, g = factors[name]
        root[place[name]] = (s.trace() * g.trace() / full[name].trace()) ** 0.5
    assert relative(plain.to_dense(), root * want * root[:, None]) < 1e-9


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("structure", [*FACTORS, "ekfac"])
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
    check_moves(curvature, model, torch.block_diag(*full.values()))


@pytest.mark.parametrize("structure", [*FACTORS, "ekfac"])
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
    for name, block in curvature.blocks.items():
        if structure == "identity":  # one number for the whole model, so A is held with it
            assert block.trace() > 0
        else:
            assert (block.trace() == 0) is name.endswith("lora_A"), name
    assert not any(link.to_dense().any() for link in curvature.links.values())


@cache
def rough(kind: str, dtype: torch.dtype) -> Oracle:
    return Oracle(tiny(kind, dtype=dtype), ROWS[kind], causal=kind == "llama")


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
    tensors = [t for b in curvature.blocks.values() for t in b.tensors().values()]
    tensors += [t for link in curvature.links.values() for t in (link.inputs, link.outputs)]
    assert {t.dtype for t in tensors} == {torch.float32}
    bound = 1e-4 if dtype == torch.float32 else 0.1
    if structure == "activation":  # up to each layer's scale, which is measured elsewhere
        twin = activation(rough(kind, dtype), model)
        for name, block in curvature.blocks.items():
            found = block.to_dense() / block.trace()
            assert relative(found, twin[name] / twin[name].trace()) < bound, name
        return
    full = rough(kind, dtype).dense("weight", "exact")
    total = 0.0
    for name, block in curvature.blocks.items():
        if structure == "diagonal":
            assert relative(block.to_dense().diagonal(), full[name].diagonal()) < bound, name
        elif structure != "identity":
            assert block.trace() == pytest.approx(float(full[name].trace()), rel=bound)
        total += block.trace()
    assert total == pytest.approx(float(sum(f.trace() for f in full.values())), rel=bound)
