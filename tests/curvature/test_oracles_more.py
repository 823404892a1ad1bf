"""The brute-force twins of `oracles_more` themselves, and the Fishers of other cotangents."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from oracles import Oracle, _passes, _total, calibrate, kfac, shampoo
from oracles_more import (
    activation,
    diagonalises,
    ekfac,
    ekfac_given,
    links,
    places,
    shares,
    tridiagonal,
)
from retain.curvature.fit.labels import _draw
from tiny import KINDS, ROWS, relative, tiny

SPACES = ("weight", "adapter")
ALL_FISHERS = ("mc", "empirical", "exact", "tempered", "reversed")
DRAWS = (3, 5)  # samples, seed

EACH = pytest.mark.parametrize(
    ("kind", "space", "fisher"), [(k, s, f) for k in KINDS for s in SPACES for f in ALL_FISHERS]
)


@cache
def oracle(kind: str, moved: bool = True) -> Oracle:
    return Oracle(tiny(kind, moved=moved), ROWS[kind], causal=kind == "llama")


@cache
def dense(kind: str, space: str, fisher: str) -> dict[str, Tensor]:
    return oracle(kind).dense(space, fisher, *DRAWS)


@cache
def one_position() -> Oracle:
    # As in `test_fit_oracle`: query and key do nothing at one position.
    targets = ["v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return Oracle(tiny("llama", moved=True, targets=targets), [{"input_ids": [3, 7]}], causal=True)


def smallest(matrix: Tensor) -> float:
    """Smallest eigenvalue, over the trace."""
    return float(torch.linalg.eigvalsh(matrix)[0] / matrix.trace())


# --- other cotangents ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("space", SPACES)
def test_tempered_at_one_is_mc(kind: str, space: str) -> None:
    o = oracle(kind)
    mc = o.dense(space, "mc", *DRAWS)
    for name, block in o.dense(space, "tempered", *DRAWS, temperature=1.0).items():
        assert relative(block, mc[name]) < 1e-12, name
    for structure in (kfac, shampoo):
        want = structure(o, space, "mc", *DRAWS)
        got = structure(o, space, "tempered", *DRAWS, temperature=1.0)
        for name in want:
            for a, b in zip(got[name], want[name], strict=True):
                assert relative(a, b) < 1e-12, name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fisher", ["tempered", "reversed"])
@pytest.mark.parametrize("temperature", [2.0, 0.5])
def test_other_cotangents_by_finite_differences(kind: str, fisher: str, temperature: float) -> None:
    # Each weight is moved along a random direction, and the function differentiated is written
    # out from the model's logits. At temperature 0.5 `reversed` must be as it was.
    model, number = tiny(kind, moved=True), 0
    row, sequence = ROWS[kind][number], oracle(kind).sequences[number]
    tokens = torch.tensor(row["input_ids"])
    tokens = tokens[:-1] if kind == "llama" else tokens

    def logits() -> Tensor:
        with torch.no_grad():
            found = model(
                input_ids=tokens[None], attention_mask=torch.ones_like(tokens[None])
            ).logits
        return found[0] if kind == "llama" else found

    if fisher == "tempered":
        labels = _draw((logits() / temperature).softmax(-1), "5:0:1")  # seed, row, sample
    elif kind == "llama":
        labels = torch.tensor(row["input_ids"][1:])
    else:
        labels = torch.tensor([row["label"]])

    def value() -> float:
        if fisher == "tempered":
            log = (logits() / temperature).log_softmax(-1)
        else:
            log = -(-logits()).log_softmax(-1)
        return float(sum(log[t, y] for t, y in enumerate(labels.tolist())))

    passes = list(_passes(sequence, fisher, *DRAWS, temperature))
    weight, terms = passes[1] if fisher == "tempered" else passes[0]
    assert weight == (1 / 3 if fisher == "tempered" else 1.0)
    random = torch.Generator().manual_seed(2)
    for path, module in model.named_modules():
        if not hasattr(module, "base_layer"):
            continue
        name = path.removeprefix("base_model.model.")
        for key, parameter in (
            (name, module.base_layer.weight),
            (f"{name}.lora_A", module.lora_A["default"].weight),
            (f"{name}.lora_B", module.lora_B["default"].weight),
        ):
            way = torch.randn(parameter.shape, generator=random, dtype=torch.float64)
            kept, step, values = parameter.detach().clone(), 1e-5, []
            for sign in (1, -1):
                with torch.no_grad():
                    parameter.copy_(kept + sign * step * way)
                values.append(value())
            with torch.no_grad():
                parameter.copy_(kept)
            j = _total(sequence.in_weights[key], terms)
            found = (values[0] - values[1]) / (2 * step)
            assert found == pytest.approx(float((j * way).sum()), rel=1e-5, abs=1e-7), key


def test_tempered_draws_from_the_tempered_distribution() -> None:
    # E over many draws is the Fisher of softmax(z / T), enumerated here label by label.
    o, name = one_position(), one_position().names["weight"][-1]
    s = o.sequences[0]
    q = (s.logits / 2.0).softmax(-1)[0]
    centred = s.in_weights[name][0] - (q[:, None, None] * s.in_weights[name][0]).sum(0)
    want = sum(float(q[y]) * float((centred[y] / 2.0).square().sum()) for y in range(len(q)))
    got = float(o.dense("weight", "tempered", 1500, 1)[name].trace())
    assert got == pytest.approx(want, rel=0.1)


# --- EK-FAC ---


@EACH
def test_ekfac_is_the_best_in_its_basis(kind: str, space: str, fisher: str) -> None:
    full = dense(kind, space, fisher)
    factors = kfac(oracle(kind), space, fisher, *DRAWS)
    nearer = 0
    for name, block in ekfac(oracle(kind), space, fisher, *DRAWS).items():
        f = full[name]
        assert float(block.trace()) == pytest.approx(float(f.trace()), rel=1e-10)
        assert smallest(block) > -1e-12
        product = calibrate(factors[name], f)
        ours, theirs = float((block - f).norm()), float((product - f).norm())
        assert ours <= theirs * (1 + 1e-12) + 1e-12 * float(f.norm()), name
        nearer += ours < 0.99 * theirs
    assert nearer > 0


@pytest.mark.parametrize("kind", KINDS)
def test_ekfac_of_a_product_is_that_product_and_does_not_see_signs_or_order(kind: str) -> None:
    name = oracle(kind).names["weight"][0]
    s, g = kfac(oracle(kind), "weight", "mc", *DRAWS)[name]
    u_s, u_g = torch.linalg.eigh(s)[1], torch.linalg.eigh(g)[1]
    assert relative(ekfac_given(torch.kron(g, s), u_g, u_s), torch.kron(g, s)) < 1e-12

    f = dense(kind, "weight", "mc")[name]
    u = torch.kron(u_g, u_s)
    want = u @ torch.diag((u.T @ f @ u).diagonal()) @ u.T
    assert relative(ekfac_given(f, u_g, u_s), want) < 1e-12
    assert relative(ekfac_given(f, -u_g.flip(1), u_s.flip(1)), want) < 1e-12
    assert relative(ekfac(oracle(kind), "weight", "mc", *DRAWS)[name], want) < 1e-12


def test_ekfac_does_not_depend_on_the_basis_of_a_null_space() -> None:
    # BERT's pooler reads one position of each of four sequences: S has rank 4 of 8.
    name = next(n for n in oracle("bert").names["weight"] if "pooler" in n)
    s, g = kfac(oracle("bert"), "weight", "mc", *DRAWS)[name]
    values, u_s = torch.linalg.eigh(s)
    assert int((values < 1e-12 * values[-1]).sum()) == 4
    turn = torch.linalg.qr(
        torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    )[0]
    turned = torch.cat([u_s[:, :4] @ turn, u_s[:, 4:]], 1)
    assert relative(turned, u_s) > 0.1 and diagonalises(turned, s)
    f = dense("bert", "weight", "mc")[name]
    u_g = torch.linalg.eigh(g)[1]
    assert relative(ekfac_given(f, u_g, turned), ekfac_given(f, u_g, u_s)) < 1e-12


def test_diagonalises_tells_a_good_basis_from_a_bad_one() -> None:
    random = torch.Generator().manual_seed(0)
    half = torch.randn(6, 6, generator=random, dtype=torch.float64)
    matrix = half @ half.T
    basis = torch.linalg.eigh(matrix)[1]
    assert diagonalises(basis, matrix)
    assert diagonalises(basis[:, [3, 0, 5, 1, 2, 4]], matrix)
    assert not diagonalises(2 * basis, matrix)
    assert not diagonalises(basis[:, :5], matrix)
    assert not diagonalises(basis.T, matrix)
    assert not diagonalises(torch.linalg.qr(half)[0], matrix)


# --- activations ---


@pytest.mark.parametrize("kind", KINDS)
def test_activation_is_the_mean_square_of_the_outputs_move(kind: str) -> None:
    model, o = tiny(kind, moved=True), oracle(kind)
    blocks = activation(o, model)
    assert set(blocks) == set(o.names["weight"]) | set(o.names["adapter"])
    random = torch.Generator().manual_seed(1)
    for path, module in model.named_modules():
        if not hasattr(module, "base_layer"):
            continue
        name = path.removeprefix("base_model.model.")
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        scaling = module.scaling["default"]
        da = torch.randn(a.shape, generator=random, dtype=torch.float64)
        db = torch.randn(b.shape, generator=random, dtype=torch.float64)
        d = torch.randn(module.base_layer.weight.shape, generator=random, dtype=torch.float64)
        x = torch.cat([s.inputs[name] for s in o.sequences])
        for key, move, update in (
            (name, d, d),
            (f"{name}.lora_A", da, scaling * b.detach() @ da),
            (f"{name}.lora_B", db, scaling * db @ a.detach()),
        ):
            want = float((x @ update.T).square().sum(1).mean())
            got = float(move.reshape(-1) @ blocks[key] @ move.reshape(-1))
            assert got == pytest.approx(want, rel=1e-10), key


# --- the chain ---


@EACH
def test_chain_is_semidefinite_with_kfac_on_its_diagonal(
    kind: str, space: str, fisher: str
) -> None:
    o = oracle(kind)
    names, chain = tridiagonal(o, space, fisher, *DRAWS)
    place = places(o, names)
    factors = kfac(o, space, fisher, *DRAWS)
    for name in names:
        want = calibrate(factors[name], dense(kind, space, fisher)[name])
        assert relative(chain[place[name], place[name]], want) < 1e-12, name
    assert torch.equal(chain, chain.T)
    assert smallest(chain) >= -1e-10
    linked = links(o, names)
    for i, one in enumerate(names):
        for j, two in enumerate(names):
            kept = i == j or (abs(i - j) == 1 and linked[min(i, j)])
            assert bool(chain[place[one], place[two]].any()) is kept, (one, two)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("kind", KINDS)
def test_chain_without_shares_is_not_semidefinite(kind: str, space: str) -> None:
    found = [
        smallest(tridiagonal(oracle(kind), space, f, *DRAWS, shared=False)[1]) for f in ALL_FISHERS
    ]
    assert min(found) < -1e-4


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("fisher", ALL_FISHERS)
def test_cross_blocks_are_the_fishers_where_there_is_one_position(space: str, fisher: str) -> None:
    o = one_position()
    names, chain = tridiagonal(o, space, fisher, *DRAWS, shared=False)
    _, with_shares = tridiagonal(o, space, fisher, *DRAWS)
    place = places(o, names)
    sequence = o.sequences[0]
    for i, (one, two) in enumerate(pairwise(names)):
        want = torch.zeros(chain[place[one], place[two]].shape, dtype=torch.float64)
        for weight, terms in _passes(sequence, fisher, *DRAWS, 2.0):
            j = _total(sequence.in_weights[one], terms).reshape(-1)
            k = _total(sequence.in_weights[two], terms).reshape(-1)
            want += weight * torch.outer(j, k)
        want /= o.predictions
        assert relative(chain[place[one], place[two]], want) < 1e-9
        w = 0.5**0.5 if i in (0, len(names) - 2) else 0.5
        assert relative(with_shares[place[one], place[two]], w * want) < 1e-9


def test_shares_of_chains() -> None:
    assert shares([]) == ([0.0], [0.0])
    assert shares([True]) == ([1.0, 0.0], [0.0, 1.0])
    assert shares([True] * 3) == ([1.0, 0.5, 0.5, 0.0], [0.0, 0.5, 0.5, 1.0])
    assert shares([True, False, True]) == ([1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0])


def test_a_chain_is_cut_where_the_positions_change() -> None:
    o = oracle("bert")
    names = o.names["weight"]
    assert "pooler" in names[-1]
    assert links(o, names) == [True] * (len(names) - 2) + [False]
    names = o.names["adapter"]
    assert "pooler" in names[-2]
    assert links(o, names) == [True] * (len(names) - 3) + [False, True]
    assert all(links(oracle("llama"), oracle("llama").names["adapter"]))


@pytest.mark.parametrize("kind", KINDS)
def test_chain_of_a_fresh_adapter_has_no_links(kind: str) -> None:
    # While B = 0 no gradient reaches A, and in adapter space every link has an A at one end.
    o = oracle(kind, moved=False)
    names, chain = tridiagonal(o, "adapter", "mc", *DRAWS)
    place = places(o, names)
    blocks = torch.block_diag(*(chain[place[n], place[n]] for n in names))
    assert torch.equal(chain, blocks)
    assert not any(chain[place[n], place[n]].any() for n in names if n.endswith("lora_A"))
