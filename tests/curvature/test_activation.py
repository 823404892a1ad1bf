"""The activation curvature: shapes from `oracles_more`, and its scale from the nats of noise."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from fits import displacement, fit, joined, known, oracle
from oracles import How, activation, kfac
from retain.curvature.blocks.activation import nats_of_noise, noisy_rows
from retain.data.batches import Batch, Example, collate
from retain.data.sources import encode
from retain.errors import CurvatureError
from retain.models.sites import lora_sites
from retain.types import FISHERS, SPACES
from tiny import KINDS, ROWS, move, relative, tiny

EACH = pytest.mark.parametrize(
    ("kind", "moved", "space"), [(k, m, s) for k in KINDS for m in (False, True) for s in SPACES]
)


@cache
def energies(kind: str, moved: bool) -> dict[str, tuple[float, int]]:
    """Layer -> (E ||y||^2 over positions, d_out), each row being run alone."""
    model = tiny(kind, moved=moved)
    seen: dict[str, list[float]] = {site.name: [] for site in lora_sites(model)}

    def hook(name: str):
        return lambda _m, _a, y: seen[name].extend(
            float(row @ row) for row in y.reshape(-1, y.shape[-1])
        )

    for site in lora_sites(model):
        site.layer.register_forward_hook(hook(site.name))
    for row in ROWS[kind]:
        ids = row["input_ids"][:-1] if kind == "llama" else row["input_ids"]
        with torch.no_grad():
            model(torch.tensor([ids]))
    sites = {site.name: site.shape[0] for site in lora_sites(model)}
    return {name: (sum(e) / len(e), sites[name]) for name, e in seen.items()}


def whole(kind: str) -> Batch:
    """All rows at once, as the noise is measured on them."""
    examples = encode(ROWS[kind], None, max_length=16, causal=kind == "llama")
    assert noisy_rows(examples, 5) == list(range(len(examples)))
    return collate(examples, 0)


@pytest.mark.parametrize(
    ("rows", "length", "want"), [(3, 10, 3), (16, 125, 2), (128, 127, 16), (100, 2, 100)]
)
def test_gamma_is_measured_on_an_eighth_and_250_tokens_at_least(
    rows: int, length: int, want: int
) -> None:
    found = noisy_rows([Example((0,) * length, (0,) * length)] * rows, 0)
    assert len(set(found)) == want and found == sorted(found)


def test_the_rows_of_gamma_are_a_draw() -> None:
    examples = [Example((0,) * 127, (0,) * 127)] * 128
    first, other = noisy_rows(examples, 0), noisy_rows(examples, 1)
    assert first == noisy_rows(examples, 0) != other
    assert max(first) > 64 < max(other)  # not the first rows of a file that may be sorted


@EACH
def test_blocks_are_the_twins_times_one_number(kind: str, moved: bool, space: str) -> None:
    model = tiny(kind, moved=moved)
    curvature = fit(model, kind, "activation", space=space, seed=5)
    twin, energy = activation(oracle(kind, moved), model), energies(kind, moved)
    layers = {site.name: site.layer for site in lora_sites(model)}
    gamma = nats_of_noise(model, layers, whole(kind), seed=5)
    assert gamma > 0
    assert list(curvature.blocks) == oracle(kind, moved).names[space]
    want = {}
    for name, block in curvature.blocks.items():
        layer = name.removesuffix(".lora_A").removesuffix(".lora_B")
        want[name] = gamma / energy[layer][0] * twin[name]
        assert block.shape == oracle(kind, moved).shapes[name]
        assert relative(block.to_dense(), want[name]) < 1e-9, name
        if float(twin[name].trace()):
            scale = block.trace() / float(twin[name].trace()) * energy[layer][0]
            assert scale == pytest.approx(gamma, rel=1e-9), name
        else:
            assert not moved and name.endswith("lora_A")
    dense = torch.block_diag(*want.values())
    move(model, seed=8)
    moves = {name: d.detach() for name, d in displacement(curvature, model).items()}
    d = joined(curvature, moves)
    for at in (model, moves):
        assert relative(curvature.quadratic(at), 0.5 * d @ dense @ d) < 1e-9
    assert relative(joined(curvature, curvature.matvec(moves)), dense @ d) < 1e-9


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gamma_is_the_nats_of_noise_that_gradients_predict(kind: str, moved: bool) -> None:
    # Noise of variance eta^2 ms_l at each entry of each output: to second order its KL a
    # prediction is 0.5 eta^2 sum of ms_l tr G_l, with G_l = E[g g^T] of the exact Fisher.
    model, eta, seeds = tiny(kind, moved=moved), 1e-4, 400
    factors = kfac(oracle(kind, moved), "weight", How("exact"))
    kl = sum(
        0.5 * eta**2 * energy / width * float(factors[name][1].trace())
        for name, (energy, width) in energies(kind, moved).items()
    )
    want = 2 * kl / (eta**2 * len(factors))
    layers, batch = {site.name: site.layer for site in lora_sites(model)}, whole(kind)
    found = [nats_of_noise(model, layers, batch, seed, eta) for seed in range(seeds)]
    values = torch.tensor(found, dtype=torch.float64)
    error = float(values.std()) / seeds**0.5
    assert error < 0.1 * want
    assert abs(float(values.mean()) - want) < 4 * error


@pytest.mark.parametrize("moved", [False, True])
def test_gamma_hardly_depends_on_the_size_of_the_noise(moved: bool) -> None:
    model, batch = tiny("bert", moved=moved), whole("bert")
    layers = {site.name: site.layer for site in lora_sites(model)}

    def mean(*eta: float) -> float:
        return sum(nats_of_noise(model, layers, batch, seed, *eta) for seed in range(100)) / 100

    assert mean() == pytest.approx(mean(1e-4), rel=0.1)


def test_the_seed_alone_fixes_the_noise_and_no_hook_is_left() -> None:
    model = tiny("llama")
    layers, state = {s.name: s.layer for s in lora_sites(model)}, torch.get_rng_state()
    found = [nats_of_noise(model, layers, whole("llama"), seed) for seed in (1, 1, 2)]
    assert found[0] == found[1] != found[2]
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("fisher", FISHERS)
def test_labels_do_not_matter(fisher: str) -> None:
    model = tiny("bert", moved=True)
    rows = [{**row, "label": (row["label"] + 1) % 3} for row in ROWS["bert"]]
    found = fit(model, "bert", "activation", source=rows, fisher=fisher, samples=2)
    assert torch.equal(found.to_dense(), known("bert", structure="activation").to_dense())


def test_no_gradient_is_asked_for() -> None:
    model = tiny("llama", moved=True).requires_grad_(False)
    with torch.no_grad():
        found = fit(model, "llama", "activation")
    assert relative(found.to_dense(), known("llama", structure="activation").to_dense()) < 1e-15


def test_a_token_that_the_model_rules_out_costs_nothing() -> None:
    model = tiny("llama", dtype=torch.float32)
    head = model.get_base_model().lm_head
    head.bias = torch.nn.Parameter(torch.zeros(len(head.weight)))
    gammas = {}
    for low in (-50.0, -torch.inf):
        with torch.no_grad():
            head.bias[4] = low
        blocks = fit(model, "llama", "activation").blocks
        gammas[low] = sum(block.trace() for block in blocks.values())
    assert gammas[-torch.inf] == pytest.approx(gammas[-50.0], rel=1e-5)


@pytest.mark.parametrize(
    ("part", "size", "said"), [("lm_head", torch.inf, "predictions"), ("k_proj", 1e25, "k_proj")]
)
def test_outputs_that_are_not_finite_are_refused(part: str, size: float, said: str) -> None:
    model = tiny("llama", dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part in name and "lora" not in name:
                parameter.mul_(size)  # of the keys the squares alone are too large
    with pytest.raises(CurvatureError, match=f"outputs are not finite.*{said}"):
        fit(model, "llama", "activation")
