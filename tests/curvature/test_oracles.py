"""The brute-force twins themselves: each is tried against something that is simpler still."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fits import oracle
from oracles import (
    How,
    Oracle,
    activation,
    calibrate,
    diagonalises,
    ekfac,
    ekfac_given,
    kfac,
    links,
    passes,
    places,
    shampoo,
    shares,
    total,
    tridiagonal,
)
from retain.curvature.fit.labels import _draw, _levels
from retain.models.sites import lora_sites
from retain.types import FISHERS, SPACES
from tiny import KINDS, ROWS, relative, tiny

MC = How("mc", 3, 5)
EACH = pytest.mark.parametrize(
    ("kind", "space", "how"),
    [(k, s, MC._replace(fisher=f)) for k, s in zip(KINDS, SPACES, strict=True) for f in FISHERS],
)


@cache
def one_position() -> Oracle:
    # Query and key do nothing at one position.
    targets = ["v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return Oracle(tiny("llama", moved=True, targets=targets), [{"input_ids": [3, 7]}], causal=True)


def smallest(matrix: Tensor) -> float:
    """Smallest eigenvalue, over the trace."""
    return float(torch.linalg.eigvalsh(matrix)[0] / matrix.trace())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("space", SPACES)
def test_tempered_at_one_is_mc(kind: str, space: str) -> None:
    tempered = MC._replace(fisher="tempered", temperature=1.0)
    mc = oracle(kind).dense(space, MC)
    for name, block in oracle(kind).dense(space, tempered).items():
        assert relative(block, mc[name]) < 1e-12, name
    for structure in (kfac, shampoo):
        want = structure(oracle(kind), space, MC)
        for name, got in structure(oracle(kind), space, tempered).items():
            assert all(relative(a, b) < 1e-12 for a, b in zip(got, want[name], strict=True)), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", [MC._replace(fisher=f, temperature=2.0) for f in FISHERS[2:]])
def test_gradients_by_finite_differences(kind: str, how: How) -> None:
    # Each weight is moved along a random direction, and the function differentiated is written
    # out from the model's logits.
    model, row, sequence = tiny(kind, moved=True), ROWS[kind][0], oracle(kind).sequences[0]
    tokens = torch.tensor(row["input_ids"])
    tokens = tokens[:-1] if kind == "llama" else tokens
    heat = how.temperature if how.fisher == "tempered" else 1.0

    @torch.no_grad()
    def logits() -> Tensor:
        found = model(input_ids=tokens[None], attention_mask=torch.ones_like(tokens[None])).logits
        return (found[0] if kind == "llama" else found) / heat

    if how.fisher == "tempered":
        p = logits().softmax(-1)
        labels = _draw(p, _levels(len(p), "5:0:1"))  # seed, row, sample
    elif how.fisher == "exact":
        labels = torch.zeros(1, dtype=torch.long)
    else:
        labels = torch.tensor(row["input_ids"][1:] if kind == "llama" else [row["label"]])

    def value() -> float:
        sign = -1 if how.fisher == "reversed" else 1
        log = sign * (sign * logits()).log_softmax(-1)
        return float(sum(log[t, y] for t, y in enumerate(labels.tolist())))

    weight, k = list(passes(sequence, how))[1 if how.fisher == "tempered" else 0]
    if how.fisher == "tempered":
        assert weight == 1 / 3
    random = torch.Generator().manual_seed(2)
    for site in lora_sites(model):
        for key, parameter in (
            (site.name, site.layer.base_layer.weight),
            (f"{site.name}.lora_A", site.a),
            (f"{site.name}.lora_B", site.b),
        ):
            way = torch.randn(parameter.shape, generator=random, dtype=torch.float64)
            kept, step, values = parameter.detach().clone(), 1e-5, []
            for sign in (1, -1, 0):
                with torch.no_grad():
                    parameter.copy_(kept + sign * step * way)
                values.append(value())
            found = (values[0] - values[1]) / (2 * step)
            want = float((total(sequence.in_weights[key], k) * way).sum())
            assert found == pytest.approx(want, rel=1e-5, abs=1e-7), key


def test_tempered_draws_from_the_tempered_distribution() -> None:
    # E over many draws is the Fisher of softmax(z / T), enumerated here label by label.
    o, name = one_position(), one_position().names["weight"][-1]
    s = o.sequences[0]
    q = (s.logits / 2.0).softmax(-1)[0]
    centred = s.in_weights[name][0] - (q[:, None, None] * s.in_weights[name][0]).sum(0)
    want = sum(float(q[y]) * float((centred[y] / 2.0).square().sum()) for y in range(len(q)))
    got = float(o.dense("weight", How("tempered", 1500, 1))[name].trace())
    assert got == pytest.approx(want, rel=0.1)


@EACH
def test_ekfac_is_the_best_in_its_basis(kind: str, space: str, how: How) -> None:
    full, factors = oracle(kind).dense(space, how), kfac(oracle(kind), space, how)
    nearer = 0
    for name, block in ekfac(oracle(kind), space, how).items():
        f = full[name]
        assert float(block.trace()) == pytest.approx(float(f.trace()), rel=1e-10)
        assert smallest(block) > -1e-12
        ours, theirs = (float((b - f).norm()) for b in (block, calibrate(factors[name], f)))
        assert ours <= theirs * (1 + 1e-12) + 1e-12 * float(f.norm()), name
        nearer += ours < 0.99 * theirs
    assert nearer > 0


def test_ekfac_does_not_see_signs_order_or_the_basis_of_a_null_space() -> None:
    # BERT's pooler reads one position of each of four sequences: S has rank 4 of 8.
    name = next(n for n in oracle("bert").names["weight"] if "pooler" in n)
    s, g = kfac(oracle("bert"), "weight", MC)[name]
    f = oracle("bert").dense("weight", MC)[name]
    values, u_s = torch.linalg.eigh(s)
    u_g = torch.linalg.eigh(g)[1]
    u = torch.kron(u_g, u_s)
    want = u @ torch.diag((u.T @ f @ u).diagonal()) @ u.T
    assert relative(ekfac(oracle("bert"), "weight", MC)[name], want) < 1e-12
    assert relative(ekfac_given(f, -u_g.flip(1), u_s.flip(1)), want) < 1e-12
    assert relative(ekfac_given(torch.kron(g, s), u_g, u_s), torch.kron(g, s)) < 1e-12
    assert int((values < 1e-12 * values[-1]).sum()) == 4
    random = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(4, 4, generator=random, dtype=torch.float64))[0]
    turned = torch.cat([u_s[:, :4] @ turn, u_s[:, 4:]], 1)
    assert relative(turned, u_s) > 0.1 and diagonalises(turned, s)
    assert relative(ekfac_given(f, u_g, turned), want) < 1e-12
    for odd in (2 * u_s, u_s[:, :5], u_s.T, turn):
        assert not diagonalises(odd, s)


@pytest.mark.parametrize("kind", KINDS)
def test_activation_is_the_mean_square_of_the_outputs_move(kind: str) -> None:
    model, o = tiny(kind, moved=True), oracle(kind)
    blocks = activation(o, model)
    assert set(blocks) == set(o.names["weight"]) | set(o.names["adapter"])
    random = torch.Generator().manual_seed(1)
    for site in lora_sites(model):
        name, a, b = site.name, site.a.detach(), site.b.detach()
        d, da, db = (
            torch.randn(shape, generator=random, dtype=torch.float64)
            for shape in (site.shape, a.shape, b.shape)
        )
        x = torch.cat([s.inputs[name] for s in o.sequences])
        for key, step, update in (
            (name, d, d),
            (f"{name}.lora_A", da, site.scaling * b @ da),
            (f"{name}.lora_B", db, site.scaling * db @ a),
        ):
            want = float((x @ update.T).square().sum(1).mean())
            got = float(step.reshape(-1) @ blocks[key] @ step.reshape(-1))
            assert got == pytest.approx(want, rel=1e-10), key


@EACH
def test_chain_is_semidefinite_with_kfac_on_its_diagonal(kind: str, space: str, how: How) -> None:
    o = oracle(kind)
    names, chain = tridiagonal(o, space, how)
    place, factors, full = places(o, names), kfac(o, space, how), o.dense(space, how)
    for name in names:
        want = calibrate(factors[name], full[name])
        assert relative(chain[place[name], place[name]], want) < 1e-12, name
    assert relative(chain, chain.T) < 1e-14
    assert smallest(chain) >= -1e-10
    linked = links(o, names)
    for i, one in enumerate(names):
        for j, two in enumerate(names):
            kept = i == j or (abs(i - j) == 1 and linked[min(i, j)])
            assert bool(chain[place[one], place[two]].any()) is kept, (one, two)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("kind", KINDS)
def test_chain_without_shares_is_not_semidefinite(kind: str, space: str) -> None:
    hows = [MC._replace(fisher=f) for f in FISHERS]
    found = [smallest(tridiagonal(oracle(kind), space, h, shared=False)[1]) for h in hows]
    assert min(found) < -1e-4


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("fisher", FISHERS)
def test_cross_blocks_are_the_fishers_where_there_is_one_position(space: str, fisher: str) -> None:
    o, how = one_position(), MC._replace(fisher=fisher)
    names, chain = tridiagonal(o, space, how, shared=False)
    _, with_shares = tridiagonal(o, space, how)
    place = places(o, names)
    for i, (one, two) in enumerate(pairwise(names)):
        pairs = zip(o.gradients(one, how), o.gradients(two, how), strict=True)
        want = sum(w * torch.outer(j.reshape(-1), k.reshape(-1)) for (w, j), (_, k) in pairs)
        want /= o.predictions
        assert relative(chain[place[one], place[two]], want) < 1e-9
        w = 0.5**0.5 if i in (0, len(names) - 2) else 0.5
        assert relative(with_shares[place[one], place[two]], w * want) < 1e-9


def test_shares_of_chains_that_are_cut_where_the_positions_change() -> None:
    assert shares([]) == ([0.0], [0.0])
    assert shares([True]) == ([1.0, 0.0], [0.0, 1.0])
    assert shares([True] * 3) == ([1.0, 0.5, 0.5, 0.0], [0.0, 0.5, 0.5, 1.0])
    assert shares([True, False, True]) == ([1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0])
    names = oracle("bert").names
    assert "pooler" in names["weight"][-1] and "pooler" in names["adapter"][-2]
    count = len(names["weight"])
    assert links(oracle("bert"), names["weight"]) == [True] * (count - 2) + [False]
    assert links(oracle("bert"), names["adapter"]) == [True] * (2 * count - 3) + [False, True]
    assert all(links(oracle("llama"), oracle("llama").names["adapter"]))


@pytest.mark.parametrize("kind", KINDS)
def test_chain_of_a_fresh_adapter_has_no_links(kind: str) -> None:
    # While B = 0 no gradient reaches A, and in adapter space every link has an A at one end.
    o = oracle(kind, moved=False)
    names, chain = tridiagonal(o, "adapter", MC)
    place = places(o, names)
    assert torch.equal(chain, torch.block_diag(*(chain[place[n], place[n]] for n in names)))
    assert not any(chain[place[n], place[n]].any() for n in names if n.endswith("lora_A"))
