"""Each structure, space and Fisher against its brute-force twin in `oracles`."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from fits import dense_quadratic, displacement, fit, joined, known, oracle, tensors
from oracles import FACTORS, How, Oracle, activation, calibrate, ekfac, kfac, places, tridiagonal
from retain import Curvature
from retain.models.sites import lora_sites
from retain.types import FISHERS, SPACES
from tiny import KINDS, ROWS, STRUCTURES, move, relative, tiny

SAMPLES, SEED = 3, 5
FIT: dict[str, Any] = {"samples": SAMPLES, "seed": SEED}
LABELLED = [s for s in STRUCTURES if s != "activation"]
"""Structures that a Fisher is in; that of activations is in `test_activation`."""

MATRIX = pytest.mark.parametrize(
    ("kind", "moved", "space", "fisher"),
    [(k, True, s, f) for k in KINDS for s in SPACES for f in FISHERS]
    + [(k, False, s, "mc") for k in KINDS for s in SPACES],
)


def how(fisher: str) -> How:
    return How(fisher, SAMPLES, SEED)


@cache
def full(kind: str, moved: bool, space: str, fisher: str) -> dict[str, Tensor]:
    return oracle(kind, moved).dense(space, how(fisher))


def expected(kind: str, moved: bool, space: str, fisher: str, structure: str) -> Tensor:
    """The whole curvature as one matrix, of the weights in the oracle's order."""
    options = (oracle(kind, moved), space, how(fisher))
    if structure == "tridiagonal":
        return tridiagonal(*options)[1]
    found = full(kind, moved, space, fisher)
    if structure == "diagonal":
        blocks = {name: torch.diag(f.diagonal()) for name, f in found.items()}
    elif structure == "identity":
        mean = sum(f.trace() for f in found.values()) / sum(len(f) for f in found.values())
        blocks = {name: mean * torch.eye(len(f), dtype=f.dtype) for name, f in found.items()}
    elif structure == "ekfac":
        blocks = ekfac(*options)
    else:
        factors = FACTORS[structure](*options)
        blocks = {name: calibrate(factors[name], f) for name, f in found.items()}
    return torch.block_diag(*(blocks[name] for name in found))


def check_moves(curvature: Curvature, model: torch.nn.Module, want: Tensor) -> None:
    """The quadratic and the product with F at a displacement from the present adapter."""
    assert abs(curvature.quadratic(model)) < 1e-25
    move(model, seed=8)
    moves = {name: d.detach() for name, d in displacement(curvature, model).items()}
    value = dense_quadratic(curvature, model, want).detach()
    assert relative(curvature.quadratic(model), value) < 1e-9
    assert relative(curvature.quadratic(moves), value) < 1e-9
    pulled = curvature.matvec(moves)
    assert relative(joined(curvature, pulled), want @ joined(curvature, moves)) < 1e-9


@pytest.mark.parametrize("structure", LABELLED)
@MATRIX
def test_curvature_equals_its_oracle(
    kind: str, moved: bool, space: str, fisher: str, structure: str
) -> None:
    model = tiny(kind, moved=moved)
    curvature = fit(model, kind, structure, space=space, fisher=fisher, **FIT)
    want, truth = expected(kind, moved, space, fisher, structure), oracle(kind, moved)
    place = places(truth, truth.names[space])
    assert list(curvature.blocks) == list(place)
    assert relative(curvature.to_dense(), want) < 1e-9
    for name, block in curvature.blocks.items():
        part = want[place[name], place[name]]
        assert block.shape == truth.shapes[name]
        assert relative(block.to_dense(), part) < 1e-9, name
        assert block.trace() == pytest.approx(float(part.trace()), rel=1e-9, abs=1e-300)
    total = sum(float(f.trace()) for f in full(kind, moved, space, fisher).values())
    assert sum(b.trace() for b in curvature.blocks.values()) == pytest.approx(total, rel=1e-9)
    assert bool(curvature.links) is (structure == "tridiagonal")
    info = curvature.info
    assert (info.predictions, info.sequences) == (truth.predictions, len(ROWS[kind]))
    assert info.temperature == (2.0 if fisher == "tempered" else 1.0)
    check_moves(curvature, model, want)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_other_temperatures(temperature: float) -> None:
    curvature = known("llama", fisher="tempered", temperature=temperature, **FIT)
    tempered = How("tempered", SAMPLES, SEED, temperature)
    factors = kfac(oracle("llama", True), "weight", tempered)
    want = oracle("llama", True).dense("weight", tempered)
    for name, block in curvature.blocks.items():
        assert relative(block.to_dense(), calibrate(factors[name], want[name])) < 1e-9, name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("space", SPACES)
def test_without_calibration(kind: str, space: str) -> None:
    # kfac is the plain product of its factors; a chain the same congruence of itself: each block,
    # and each link by the geometric mean of its ends, is off by its own factor.
    names, factors = oracle(kind, True).names[space], kfac(oracle(kind, True), space, how("mc"))
    plain, chain = (known(kind, space, s, calibrate=False, **FIT) for s in ("kfac", "tridiagonal"))
    want, true = expected(kind, True, space, "mc", "tridiagonal"), full(kind, True, space, "mc")
    place, root = places(oracle(kind, True), names), torch.zeros(len(want), dtype=torch.float64)
    for name in names:
        s, g = factors[name]
        assert relative(plain.blocks[name].to_dense(), torch.kron(g, s)) < 1e-9
        root[place[name]] = (s.trace() * g.trace() / true[name].trace()) ** 0.5
    assert relative(chain.to_dense(), root * want * root[:, None]) < 1e-9


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
    options = {"samples": 4, "seed": 1, "batch_size": 1, "source": rows}
    curvature = fit(model, "llama", structure, space=space, fisher=fisher, **options)
    want = Oracle(model, rows, causal=True).dense(space, How(fisher, 4, 1))
    for name, block in curvature.blocks.items():
        assert relative(block.to_dense(), want[name]) < 1e-9, name
    check_moves(curvature, model, torch.block_diag(*want.values()))


@pytest.mark.parametrize("structure", [*FACTORS, "ekfac"])
@pytest.mark.parametrize("layer", [0, 1])
def test_predicted_nats_are_the_kl_of_a_small_step(structure: str, layer: int) -> None:
    # The unit: nats a prediction. One layer at one position, where a product of factors is
    # exact, so that the quadratic is the KL to second order.
    model = tiny("llama", targets=["down_proj"])
    options = {"fisher": "exact", "batch_size": 1, "source": [{"input_ids": [3, 7]}]}
    curvature, site = fit(model, "llama", structure, **options), lora_sites(model)[layer]
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
    curvature = known(kind, "adapter", structure, moved=False)
    for name, block in curvature.blocks.items():
        if structure == "identity":  # one number for the whole model, so A is held with it
            assert block.trace() > 0
        else:
            assert (block.trace() == 0) is name.endswith("lora_A"), name
    assert not any(link.to_dense().any() for link in curvature.links.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_lower_precision_follows_the_model_and_is_kept_in_float32(
    kind: str, dtype: torch.dtype, structure: str
) -> None:
    # Against the gradients of the same model in the same precision. The exact Fisher, since
    # another rounding may draw another label.
    model = tiny(kind, dtype=dtype)
    curvature = fit(model, kind, structure, fisher="exact")
    assert {t.dtype for t in tensors(curvature)} == {torch.float32}
    bound = 1e-4 if dtype == torch.float32 else 0.1
    if structure == "activation":  # up to each layer's scale, which is measured elsewhere
        twin = activation(oracle(kind, False, dtype), model)
        for name, block in curvature.blocks.items():
            found = block.to_dense() / block.trace()
            assert relative(found, twin[name] / twin[name].trace()) < bound, name
        return
    want = oracle(kind, False, dtype).dense("weight", How("exact"))
    total = 0.0
    for name, block in curvature.blocks.items():
        if structure == "diagonal":
            assert relative(block.to_dense().diagonal(), want[name].diagonal()) < bound, name
        elif structure != "identity":
            assert block.trace() == pytest.approx(float(want[name].trace()), rel=bound)
        total += block.trace()
    assert total == pytest.approx(float(sum(f.trace() for f in want.values())), rel=bound)
