"""Softening: the dense solution, the budget, the rank, and what is refused."""

from __future__ import annotations

import itertools
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from sequences import begun, learn, method_of, run, source, tasks_of
from torch import Tensor, nn

from retain import Curvature, soften
from retain.curvature.blocks.base import Block
from retain.curvature.blocks.factor import Factor, SketchFactor
from retain.errors import ConfigError, CurvatureError, MismatchError, ModelError, SourceError
from retain.models.lora import attach_lora
from retain.models.saved import load_adapter, save_adapter
from retain.models.sites import lora_sites
from retain.retention.measure import Reference
from retain.retention.soften import curve as module
from retain.retention.soften.curve import Softening
from retain.retention.soften.subspace import Subspace, sides
from retain.retention.state import choose
from sums import dora, measure
from tiny import KINDS, base, move, relative, tiny, weights

EPSILON = 1e-3
KRONECKER = ("kfac", "shampoo", "activation", "identity")
OTHERS = ("diagonal", "ekfac")
WHOLE = 12  # depth at which the tiny layers' spaces are whole
MUS = (0.0, 0.3, 7.0, 400.0)


def tuned(kind: str = "llama", rank: int = 2, seed: int = 4) -> PeftModel:
    """A tiny model away from its base, as training would leave it."""
    model = tiny(kind, rank=rank)
    move(model, seed)
    return model


@cache
def fitted(kind: str, structure: str, seed: int = 1, **options: Any) -> Curvature:
    return measure(tiny(kind), seed, structure, **options)


def made(structure: str, seed: int = 1) -> tuple[PeftModel, Curvature]:
    return tuned(), fitted("llama", structure, seed)


def updates(model: nn.Module) -> dict[str, Tensor]:
    return {s.name: (s.scaling * s.b @ s.a).detach().clone() for s in lora_sites(model)}


def damped(block: Block) -> Tensor:
    """The target's block with what is added to it, as one matrix."""
    pair = sides(block)
    if pair is None:
        return block.to_dense() + EPSILON * block.to_dense().diagonal().mean() * eye(block)
    parts = [f.dense() + EPSILON * f.dense().diagonal().mean() * eye(f) for f in pair]
    return torch.kron(*parts)


def eye(of: Block | Factor) -> Tensor:
    size = of.size if isinstance(of, Factor) else of.shape[0] * of.shape[1]
    return torch.eye(size, dtype=torch.float64)


def solved(d: Tensor, far: Tensor, near: Tensor, mu: float) -> Tensor:
    """(F_t + mu F_s)^-1 F_t d*."""
    return torch.linalg.solve(near + mu * far, near @ d.reshape(-1)).reshape(d.shape)


def objective(span: Subspace, z: Tensor, mu: float) -> float:
    """What is minimised, in a span's coordinates."""
    return 0.5 * float((z - span.coordinates).square().sum() + mu * (span.ratios * z**2).sum())


def put(soft: Softening, mu: float) -> None:
    soft.apply(soft.at(mu))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("structure", ["kfac", "shampoo", "activation"])
@pytest.mark.parametrize("with_target", [False, True])
def test_the_whole_space_gives_the_dense_solution(
    kind: str, structure: str, with_target: bool
) -> None:
    model, curvature = tuned(kind), fitted(kind, structure)
    target = fitted(kind, "kfac", 2) if with_target else None
    finished = updates(model)
    soft = soften(model, curvature, target=target, depth=WHOLE)
    for mu in MUS:
        nats = 0.0
        for name, d in finished.items():
            far, span = curvature.blocks[name].to_dense(), soft.spaces[name]
            near = eye(curvature.blocks[name]) if target is None else damped(target.blocks[name])
            want = solved(d, far, near, mu)
            left, right = span.thin(span.softened(mu), min(d.shape))
            assert relative(left @ right, want) < 1e-6, (name, mu)
            moved = (want - d).reshape(-1)
            least = float(0.5 * moved @ near @ moved)
            cost = float(0.5 * want.reshape(-1) @ far @ want.reshape(-1))
            assert objective(span, span.softened(mu), mu) == pytest.approx(
                least + mu * cost, rel=1e-6, abs=1e-9
            )
            nats += cost
        assert soft.predicted(mu) == pytest.approx(nats, rel=1e-6)


@pytest.mark.parametrize("with_target", [False, True])
@pytest.mark.parametrize("mu", MUS[1:])
def test_a_cut_has_the_rank_and_is_a_minimum_among_such(
    with_target: bool, mu: float, monkeypatch: Any
) -> None:
    model, curvature = made("kfac")
    target = fitted("llama", "shampoo", 2) if with_target else None
    soft = soften(model, curvature, target=target, depth=WHOLE)
    found = {name: span.cut(mu, 2) for name, span in soft.spaces.items()}
    monkeypatch.setattr("retain.retention.soften.subspace.SWEEPS", 300)
    gained = 0
    for name, span in soft.spaces.items():
        low, full = found[name], span.softened(mu)
        u, s, vh = torch.linalg.svd(full)
        least, value = objective(span, full, mu), objective(span, low, mu)
        nearest = objective(span, (u[:, :2] * s[:2]) @ vh[:2], mu)
        assert torch.linalg.matrix_rank(low, rtol=1e-10) <= 2
        assert least < value <= nearest * (1 + 1e-12)
        gained += value - least < 0.999 * (nearest - least)
        limit = span.cut(mu, 2)
        assert value < 1.02 * objective(span, limit, mu)
        # At a minimum the gradient has no part in the tangent space of the rank.
        p, q = (torch.linalg.svd(m).U[:, :2] for m in (limit, limit.T))
        pull = limit - span.coordinates + mu * span.ratios * limit
        assert float((p.T @ pull).norm() + (pull @ q).norm()) < 1e-4 * float(pull.norm())
    assert gained


@pytest.mark.parametrize("source", OTHERS)
@pytest.mark.parametrize("target", [None, "kfac", "diagonal", "ekfac", "identity"])
def test_other_structures_are_solved_in_the_adapter_s_span(source: str, target: str | None) -> None:
    model, curvature = made(source)
    near_by = target and fitted("llama", target, 2)
    finished = updates(model)
    factors = {s.name: (s.b.detach().clone(), s.a.detach().clone()) for s in lora_sites(model)}
    soft = soften(model, curvature, target=near_by)
    assert soft.depth == 0
    for mu in MUS:
        put(soft, mu)
        for name, got in updates(model).items():
            far, d = curvature.blocks[name].to_dense(), finished[name].reshape(-1)
            near = damped(near_by.blocks[name]) if near_by else eye(curvature.blocks[name])
            b, a = (torch.linalg.qr(m).Q for m in (factors[name][0], factors[name][1].T))
            span = torch.kron(b, a)  # the core of p c q^T, row-major
            core = torch.linalg.solve(span.T @ (near + mu * far) @ span, span.T @ near @ d)
            assert relative(got.reshape(-1), span @ core) < 1e-6, (name, mu)


@pytest.mark.parametrize("structure", [*KRONECKER, *OTHERS])
@pytest.mark.parametrize("target", [None, "kfac"])
def test_numbers_are_those_of_the_model_that_is_left(structure: str, target: str | None) -> None:
    model, curvature = made(structure)
    near = target and fitted("llama", target, 2)
    finished = updates(model)
    size = sum(float(d.square().sum()) for d in finished.values())
    soft = soften(model, curvature, target=near)
    start = soft.at(0).point
    assert start.nats == pytest.approx(curvature.quadratic(model), rel=1e-9)
    assert (start.loss, start.learned, start.cut_nats, start.cut_norm) == (0, 1, 0, 0)
    for mu in MUS[1:]:
        update = soft.at(mu)
        soft.apply(update)
        left, point = updates(model), update.point
        assert point.nats == pytest.approx(curvature.quadratic(model), rel=1e-9)
        kept = sum(float(d.square().sum()) for d in left.values())
        assert point.norm == pytest.approx((kept / size) ** 0.5, rel=1e-9)
        far = {name: left[name] - d for name, d in finished.items()}
        if target is None:
            loss = 0.5 * sum(float(d.square().sum()) for d in far.values())
            assert point.loss == pytest.approx(loss, rel=1e-9)
            assert point.learned == pytest.approx(1 - loss / (0.5 * size), rel=1e-9)
        share = (point.nats / start.nats) ** 0.5  # all of it, times one number
        assert point.scaled == pytest.approx(1 - (1 - share) ** 2, rel=1e-9)


def test_mu_of_0_is_the_adapter_to_the_bit_and_can_be_put_back() -> None:
    model, curvature = made("kfac")
    before = weights(model)
    soft = soften(model, curvature)
    put(soft, 5.0)
    assert any(not torch.equal(now, before[name]) for name, now in weights(model).items())
    put(soft, 0.0)
    assert all(torch.equal(now, before[name]) for name, now in weights(model).items())


@pytest.mark.parametrize("structure", ["kfac", "identity", "diagonal"])
def test_more_mu_is_less_forgetting_and_less_learning(structure: str) -> None:
    model, curvature = made(structure)
    soft = soften(model, curvature)
    grid = [0.0, *(10.0**k for k in range(-3, 7))]
    nats = [soft.predicted(mu) for mu in grid]
    assert all(b < a for a, b in itertools.pairwise(nats))
    assert nats[-1] < 1e-3 * nats[0]
    curve = soft.curve(9)
    assert len(curve) == 9
    assert curve[0] == soft.at(0).point
    assert all(b.mu > a.mu and b.loss > a.loss for a, b in itertools.pairwise(curve))
    assert soft.predicted(curve[-1].mu) == pytest.approx(1e-3 * nats[0], rel=1e-9)
    for share in (0.9, 0.2, 1e-5):
        assert soft.predicted(soft.weight(share * nats[0])) == pytest.approx(share * nats[0])


@pytest.mark.parametrize("structure", [*KRONECKER, *OTHERS])
@pytest.mark.parametrize("target", [None, "shampoo"])
@pytest.mark.parametrize("share", [0.97, 0.3, 0.01])
def test_a_budget_is_met_by_what_is_left(structure: str, target: str | None, share: float) -> None:
    model, curvature = made(structure)
    soft = soften(model, curvature, target=target and fitted("llama", target, 2))
    budget = share * soft.at(0).point.nats
    soft.apply(soft.within(budget))
    assert curvature.quadratic(model) == pytest.approx(budget, rel=1e-6)


def test_a_budget_that_tries_do_not_meet_is_met_by_scaling(monkeypatch: Any) -> None:
    model, curvature = made("kfac")
    monkeypatch.setattr(module, "ROUNDS", 1)
    soft = soften(model, curvature, target=fitted("llama", "shampoo", 2), depth=2)
    most = soft.predicted(0)
    for share in (0.9, 0.5, 0.2, 0.05):
        point = soft.within(share * most).point
        assert point.nats <= share * most * (1 + 1e-9)
    assert any(abs(soft.at(soft.weight(s * most)).point.cut_nats) > 1e-6 for s in (0.5, 0.05))


@pytest.mark.parametrize("structure", ["kfac", "diagonal"])
@pytest.mark.parametrize("share", [0.9, 0.3, 0.003])
def test_a_measured_budget_is_met_by_what_is_measured(structure: str, share: float) -> None:
    """Against a bisection over mu, with nats that grow unlike the predicted ones."""
    model, curvature = made(structure)
    soft, before = soften(model, curvature), weights(model)
    other = fitted("llama", "shampoo", 5)
    seen: list[float] = []

    def nats() -> float:
        seen.append(other.quadratic(model) ** 0.7 + 3 * curvature.quadratic(model))
        return seen[-1]

    budget = share * nats()
    update = soft.within_measured(budget, nats)
    assert all(torch.equal(now, before[name]) for name, now in weights(model).items())
    assert len(seen) <= 14
    soft.apply(update)
    assert 0.98 * budget <= nats() <= budget
    low, high = 0.0, 1e12
    for _ in range(80):
        mu = (low * high) ** 0.5 if low else high / 2
        put(soft, mu)
        low, high = (mu, high) if nats() > budget else (low, mu)
    assert soft.at(high).point.nats == pytest.approx(update.point.nats, rel=0.06)


def test_a_measured_budget_that_holds_changes_nothing() -> None:
    model, curvature = made("kfac")
    soft = soften(model, curvature)
    assert soft.within_measured(0.5, lambda: 0.4).point.mu == 0


def test_a_measured_budget_out_of_reach() -> None:
    model, curvature = made("kfac")
    before = weights(model)
    with pytest.raises(ConfigError, match=r"measured within the budget; got: 0\.4 nats at"):
        soften(model, curvature).within_measured(0.3, lambda: 0.4)
    assert all(torch.equal(now, before[name]) for name, now in weights(model).items())


def test_inside_the_budget_nothing_changes() -> None:
    model, curvature = made("kfac")
    before = weights(model)
    soft = soften(model, curvature)
    update = soft.within(1.01 * curvature.quadratic(model))
    assert update.point.mu == 0
    soft.apply(update)
    assert all(torch.equal(now, before[name]) for name, now in weights(model).items())


def test_one_mu_for_all_layers_and_it_is_the_least() -> None:
    """The budget's minimum of the loss: no other share of nats among the layers is better."""
    model, curvature = made("kfac")
    soft = soften(model, curvature, depth=WHOLE)
    budget = 0.3 * soft.predicted(0)
    mu = soft.weight(budget)
    (a, first), (b, second) = itertools.islice(soft.spaces.items(), 2)
    assert a != b

    def both(one: float, two: float) -> tuple[float, float]:
        pairs = [(s, s.softened(m)) for s, m in ((first, one), (second, two))]
        nats = sum(0.5 * float((s.ratios * z.square()).sum()) for s, z in pairs)
        return nats, sum(0.5 * float((z - s.coordinates).square().sum()) for s, z in pairs)

    nats, loss = both(mu, mu)
    tried = 0
    for one in (0.5 * mu, 0.9 * mu, 1.1 * mu, 2 * mu):
        low, high = 0.0, 1e3 * mu
        for _ in range(200):
            two = 0.5 * (low + high)
            low, high = (two, high) if both(one, two)[0] > nats else (low, two)
        found, other = both(one, high)
        if found == pytest.approx(nats, rel=1e-9):  # the other layer can make up for it
            assert other > loss
            tried += 1
    assert tried >= 2


@pytest.mark.parametrize("with_target", [False, True])
def test_deeper_is_never_worse(with_target: bool) -> None:
    model, curvature = made("kfac")
    target = fitted("llama", "kfac", 2) if with_target else None
    softs = [soften(model, curvature, target=target, depth=depth) for depth in (0, 1, 2, WHOLE)]
    for mu in MUS[1:]:
        values = [
            sum(objective(s, s.softened(mu), mu) for s in soft.spaces.values()) for soft in softs
        ]
        assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(values)), (mu, values)
        assert values[1] < 0.99 * values[0]
        cut = [sum(objective(s, s.cut(mu, 2), mu) for s in soft.spaces.values()) for soft in softs]
        assert cut[2] < 1.001 * cut[1] < 1.001 * cut[0]


def test_scaling_is_there_to_compare_with() -> None:
    model, curvature = made("kfac")
    soft = soften(model, curvature)
    finished, most = updates(model), soft.predicted(0)
    update = soft.scaled(0.3 * most)
    soft.apply(update)
    assert curvature.quadratic(model) == pytest.approx(0.3 * most, rel=1e-9)
    left = updates(model)
    assert all(relative(left[n], 0.3**0.5 * d) < 1e-12 for n, d in finished.items())
    loss = 0.5 * sum(float((left[n] - d).square().sum()) for n, d in finished.items())
    assert update.point.loss == pytest.approx(loss, rel=1e-9)
    assert update.point.learned == pytest.approx(soft.within(0.3 * most).point.scaled, rel=1e-9)
    assert soft.scaled(2 * most).point.norm == 1


def test_softening_beats_scaling() -> None:
    model, curvature = made("shampoo")
    for point in soften(model, curvature, depth=0).curve(6)[1:]:
        assert point.learned > point.scaled


@pytest.mark.parametrize("structure", [*KRONECKER, *OTHERS])
def test_with_the_source_for_a_target_it_is_scaling(structure: str) -> None:
    """F_t = F_s: D(mu) = D* / (1 + mu)."""
    model, curvature = made(structure)
    finished = updates(model)
    soft = soften(model, curvature, target=curvature, epsilon=1e-13)
    put(soft, 3.0)
    for name, got in updates(model).items():
        assert relative(got, finished[name] / 4) < 1e-6


def test_a_target_moves_the_softening_to_where_the_task_is_flat() -> None:
    model, curvature = made("kfac")
    target = fitted("llama", "kfac", 2)
    budget = 0.2 * curvature.quadratic(model)
    finished, losses = updates(model), []
    for near in (None, target):
        soft = soften(model, curvature, target=near, depth=2)
        soft.apply(soft.within(budget))
        moved = {name: d - finished[name] for name, d in updates(model).items()}
        losses.append(target.quadratic(moved))
        put(soft, 0.0)
    assert losses[1] < 0.9 * losses[0]


def test_singular_sides_and_layers_without_an_update() -> None:
    model, curvature = made("kfac", 1)
    target = measure(tiny("llama"), 3, "kfac")
    one = lora_sites(model)[0]
    with torch.no_grad():
        one.b.zero_()
        lora_sites(model)[1].b[:, 1] = lora_sites(model)[1].b[:, 0]  # rank 1
    for block in target.blocks.values():
        block.inputs.dense()[0] = block.inputs.dense()[:, 0] = 0.0
        assert torch.linalg.matrix_rank(block.inputs.dense()) < block.inputs.size
    soft = soften(model, curvature, target=target, depth=3)
    budget = 0.1 * curvature.quadratic(model)
    soft.apply(soft.within(budget))
    assert all(bool(w.isfinite().all()) for w in weights(model).values())
    assert not one.b.any()
    assert curvature.quadratic(model) == pytest.approx(budget, rel=1e-6)


def test_an_adapter_at_its_start() -> None:
    model, curvature = tiny("llama"), fitted("llama", "kfac")
    soft = soften(model, curvature)
    assert soft.within(1e-9).point.mu == 0
    assert [p.nats for p in soft.curve(3)] == [0, 0, 0]


@pytest.mark.parametrize("rank", [1, 4])
def test_the_folder_is_plain_peft(rank: int, tmp_path: Path) -> None:
    model, curvature = tuned(rank=rank), fitted("llama", "kfac")
    soft = soften(model, curvature, depth=2)
    soft.apply(soft.within(0.1 * curvature.quadratic(model)))
    assert {s.rank for s in lora_sites(model)} == {rank}
    folder = save_adapter(model, tmp_path / "adapter", "tiny")
    again = load_adapter(base("llama"), folder)
    again.set_adapter("default")
    ids = torch.tensor([[3, 7, 1, 12, 5]])
    with torch.no_grad():
        want, got = model(ids).logits, again(ids).logits
        with again.disable_adapter():
            assert relative(again(ids).logits, want) > 1e-3
    assert relative(got, want) < 1e-12
    assert {s.rank for s in lora_sites(again)} == {rank}


def test_a_target_around_the_adapter_itself() -> None:
    model, curvature = made("kfac")
    around = measure(model, 2, "kfac")
    assert around.anchor
    assert soften(model, curvature, target=around).at(3.0).point.loss > 0
    with pytest.raises(MismatchError, match=r"stands around another adapter.*--adapter"):
        soften(tuned(seed=9), curvature, target=around)


class TestRefusals:
    def test_curvatures(self) -> None:
        model, curvature = made("kfac")
        space = measure(tiny("llama"), 1, "kfac", space="adapter")
        for given, what in ((space, "space='weight'"), (measure(model, 1, "kfac"), "--adapter")):
            with pytest.raises(MismatchError, match=what):
                soften(model, given)
        with pytest.raises(MismatchError, match="--space weight"):
            soften(model, curvature, target=space)
        with pytest.raises(CurvatureError, match=r"tridiagonal.*--structure kfac"):
            soften(model, fitted("llama", "tridiagonal"))
        other = tiny("llama", seed=5)
        with pytest.raises(MismatchError, match="another base model"):
            soften(other, curvature)
        with pytest.raises(MismatchError, match="other layers"):
            soften(tiny("llama", targets=["q_proj"]), curvature)

    def test_adapters(self) -> None:
        model = dora("llama")
        curvature = fitted("llama", "kfac")
        with pytest.raises(ModelError, match=r"DoRA.*plain LoRA"):
            soften(model, curvature)
        spoilt = tuned()
        with torch.no_grad():
            lora_sites(spoilt)[2].a[0, 0] = float("nan")
        with pytest.raises(ModelError, match="not finite"):
            soften(spoilt, curvature)
        with pytest.raises(ModelError, match="no LoRA adapter"):
            soften(base("llama"), curvature)
        extra = tuned()
        extra.peft_config["default"].modules_to_save = ["embed_tokens"]
        with pytest.raises(ModelError, match=r"whole modules \(embed_tokens\)"):
            soften(extra, curvature)
        extra.peft_config["default"].modules_to_save = ["classifier"]  # a new head is free
        assert soften(extra, curvature).depth == 2

    @pytest.mark.parametrize("budget", [0.0, -1.0, float("nan"), float("inf")])
    def test_budgets(self, budget: float) -> None:
        with pytest.raises(ConfigError, match=r"budget.*above 0"):
            soften(*made("kfac")).within(budget)

    def test_numbers(self) -> None:
        model, curvature = made("kfac")
        for mu in (-1.0, float("inf"), float("nan")):
            with pytest.raises(ConfigError, match="mu is out of range"):
                soften(model, curvature).at(mu)
        with pytest.raises(ConfigError, match="depth is out of range; got: -1"):
            soften(model, curvature, depth=-1)
        with pytest.raises(ConfigError, match=r"depth is out of range; got: 1.*--depth 0"):
            soften(*made("diagonal"), depth=1)
        with pytest.raises(ConfigError, match="epsilon"):
            soften(model, curvature, epsilon=0.0)

    def test_a_wide_rank_without_a_product(self, monkeypatch: Any) -> None:
        monkeypatch.setattr("retain.retention.soften.adapter.WIDEST", 1)
        with pytest.raises(ConfigError, match=r"rank is too large.*up to 1"):
            soften(*made("ekfac"))
        assert soften(*made("kfac")).depth == 2


def test_sketches_in_float32() -> None:
    """Sketched factors, wider than twice their rank, in the precision of real fits."""
    model = base("llama", dtype=torch.float32)
    peft = attach_lora(model, rank=2)
    curvature = measure(peft, 1, "kfac", rank=3)
    block = next(iter(curvature.blocks.values()))
    assert isinstance(block.inputs, SketchFactor) and isinstance(block.outputs, SketchFactor)
    move(peft, 4)
    budget = 0.2 * curvature.quadratic(peft)
    soft = soften(peft, curvature, depth=2)
    soft.apply(soft.within(budget))
    assert curvature.quadratic(peft) == pytest.approx(budget, rel=1e-4)


def test_as_a_method_each_task_ends_within_the_measured_budget() -> None:
    method = method_of("soften", budget=2e-4)
    attached = begun(method, "lora", "llama")
    held = choose(source("llama"), 4, method.context.seed + 1)
    kept = Reference(attached.model, held, batch_size=4)
    for task in tasks_of("llama"):
        learn(method, attached, task)
        assert 0.98 * 2e-4 <= kept.measure(attached.model).kl <= 2e-4
    free = run(method_of("none"), "lora", "llama").model
    assert Reference(free, held, batch_size=4).measure(free).kl > 4e-4


def test_as_a_method_it_wants_source_text() -> None:
    with pytest.raises(SourceError, match="softening holds to source text; got: none"):
        begun(method_of("soften"), "lora", "llama", source=[])
