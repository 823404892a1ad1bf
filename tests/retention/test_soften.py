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

from fits import dora, known, measure
from retain import Curvature, soften
from retain.curvature.blocks.base import Block
from retain.curvature.blocks.factor import SketchFactor
from retain.errors import ConfigError, CurvatureError, MismatchError, ModelError, SourceError
from retain.models.lora import attach_lora
from retain.models.saved import load_adapter, save_adapter
from retain.models.sites import lora_sites
from retain.retention.measure import Reference
from retain.retention.soften import curve
from retain.retention.soften.subspace import Subspace, sides
from retain.retention.state import choose
from tiny import KINDS, base, move, relative, tiny, weights

EPSILON = 1e-3
EVERY = ("kfac", "shampoo", "activation", "identity", "diagonal", "ekfac")
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


def made(structure: str = "kfac") -> tuple[PeftModel, Curvature]:
    return tuned(), fitted("llama", structure)


def near(structure: str | None, kind: str = "llama") -> Curvature | None:
    """The curvature of a task, around the base."""
    return None if structure is None else fitted(kind, structure, 2)


def updates(model: nn.Module) -> dict[str, Tensor]:
    return {s.name: (s.scaling * s.b @ s.a).detach().clone() for s in lora_sites(model)}


def square(tensors: dict[str, Tensor]) -> float:
    return sum(float(d.square().sum()) for d in tensors.values())


def same_weights(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(now, before[name]) for name, now in weights(model).items())


def damped(target: Curvature | None, name: str, block: Block) -> Tensor:
    """The target's block with what is added to it, as one matrix; else the identity."""
    if target is None:
        return torch.eye(block.shape[0] * block.shape[1], dtype=torch.float64)
    pair = sides(target.blocks[name])
    parts = [f.dense() for f in pair] if pair else [target.blocks[name].to_dense()]
    parts = [p + EPSILON * p.diagonal().mean() * torch.eye(len(p)).to(p) for p in parts]
    return torch.kron(*parts) if pair else parts[0]


def objective(space: Subspace, z: Tensor, mu: float) -> float:
    """What is minimised, in a subspace's coordinates."""
    return 0.5 * float((z - space.coordinates).square().sum() + mu * (space.ratios * z**2).sum())


def test_a_curvature_of_the_plain_model_softens_alike() -> None:
    """It has the base's weights as its anchor, and no adapter's."""
    found = []
    for fitted in (measure(tiny("llama"), 1, "kfac"), measure(base("llama"), 1, "kfac")):
        model = tuned()
        soft = soften(model, fitted, target=fitted)
        soft.apply(soft.within(0.2 * fitted.quadratic(model)))
        found.append(updates(model))
    for name, update in found[0].items():
        torch.testing.assert_close(found[1][name], update, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("structure", EVERY[:3])
@pytest.mark.parametrize("task", [None, "kfac"])
def test_the_whole_space_gives_the_dense_solution(
    kind: str, structure: str, task: str | None
) -> None:
    model, curvature, target = tuned(kind), fitted(kind, structure), near(task, kind)
    finished = updates(model)
    soft = soften(model, curvature, target=target, depth=WHOLE)
    for mu in MUS:
        nats = 0.0
        for name, d in finished.items():
            block, space = curvature.blocks[name], soft.spaces[name]
            far, close = block.to_dense(), damped(target, name, block)
            want = torch.linalg.solve(close + mu * far, close @ d.reshape(-1))
            left, right = space.thin(space.softened(mu), min(d.shape))
            assert relative((left @ right).reshape(-1), want) < 1e-6, (name, mu)
            moved, cost = want - d.reshape(-1), float(0.5 * want @ far @ want)
            least = float(0.5 * moved @ close @ moved) + mu * cost
            found = objective(space, space.softened(mu), mu)
            assert found == pytest.approx(least, rel=1e-6, abs=1e-9)
            nats += cost
        assert soft.predicted(mu) == pytest.approx(nats, rel=1e-6)


@pytest.mark.parametrize("task", [None, "shampoo"])
@pytest.mark.parametrize("mu", MUS[1:])
def test_a_cut_has_the_rank_and_is_a_minimum_among_such(
    task: str | None, mu: float, monkeypatch: Any
) -> None:
    soft = soften(*made(), target=near(task), depth=WHOLE)
    found = {name: space.cut(mu, 2) for name, space in soft.spaces.items()}
    monkeypatch.setattr("retain.retention.soften.subspace.SWEEPS", 300)
    gained = 0
    for name, space in soft.spaces.items():
        low, full = found[name], space.softened(mu)
        u, s, vh = torch.linalg.svd(full)
        least, value = objective(space, full, mu), objective(space, low, mu)
        nearest = objective(space, (u[:, :2] * s[:2]) @ vh[:2], mu)
        assert torch.linalg.matrix_rank(low, rtol=1e-10) <= 2
        assert least < value <= nearest * (1 + 1e-12)
        gained += value - least < 0.999 * (nearest - least)
        limit = space.cut(mu, 2)
        assert value < 1.02 * objective(space, limit, mu)
        # At a minimum the gradient has no part in the tangent space of the rank.
        p, q = (torch.linalg.svd(m).U[:, :2] for m in (limit, limit.T))
        pull = limit - space.coordinates + mu * space.ratios * limit
        assert float((p.T @ pull).norm() + (pull @ q).norm()) < 1e-4 * float(pull.norm())
    assert gained


@pytest.mark.parametrize("structure", ["diagonal", "ekfac"])
@pytest.mark.parametrize("task", [None, "kfac", "diagonal", "ekfac", "identity"])
def test_other_structures_are_solved_in_the_adapter_s_span(
    structure: str, task: str | None
) -> None:
    (model, curvature), target = made(structure), near(task)
    finished = updates(model)
    bases = {
        s.name: torch.kron(*(torch.linalg.qr(m.detach()).Q for m in (s.b, s.a.T)))
        for s in lora_sites(model)
    }  # of the core of p c q^T, row-major
    soft = soften(model, curvature, target=target)
    assert soft.depth == 0
    for mu in MUS:
        soft.apply(soft.at(mu))
        for name, got in updates(model).items():
            far, d, span = curvature.blocks[name].to_dense(), finished[name], bases[name]
            close = damped(target, name, curvature.blocks[name])
            right = span.T @ close @ d.reshape(-1)
            core = torch.linalg.solve(span.T @ (close + mu * far) @ span, right)
            assert relative(got.reshape(-1), span @ core) < 1e-6, (name, mu)


@pytest.mark.parametrize("structure", EVERY)
@pytest.mark.parametrize("task", [None, "kfac"])
def test_numbers_are_those_of_the_model_that_is_left(structure: str, task: str | None) -> None:
    model, curvature = made(structure)
    finished = updates(model)
    soft = soften(model, curvature, target=near(task))
    start = soft.at(0).point
    assert start.nats == pytest.approx(curvature.quadratic(model), rel=1e-9)
    assert (start.loss, start.learned, start.cut_nats, start.cut_norm) == (0, 1, 0, 0)
    for mu in MUS[1:]:
        update = soft.at(mu)
        soft.apply(update)
        left, point = updates(model), update.point
        assert point.nats == pytest.approx(curvature.quadratic(model), rel=1e-9)
        assert point.norm == pytest.approx((square(left) / square(finished)) ** 0.5, rel=1e-9)
        if task is None:
            lost = square({name: left[name] - d for name, d in finished.items()})
            assert point.loss == pytest.approx(0.5 * lost, rel=1e-9)
            assert point.learned == pytest.approx(1 - lost / square(finished), rel=1e-9)
        share = (point.nats / start.nats) ** 0.5  # all of it, times one number
        assert point.scaled == pytest.approx(1 - (1 - share) ** 2, rel=1e-9)


def test_mu_of_0_and_a_budget_that_holds_are_the_adapter_to_the_bit() -> None:
    model, curvature = made()
    before, most = weights(model), curvature.quadratic(model)
    soft = soften(model, curvature)
    for update in (
        soft.at(0.0), soft.within(1.01 * most), soft.within_measured(0.5, lambda: 0.4),
    ):  # fmt: skip
        assert update.point.mu == 0
        soft.apply(soft.at(5.0))
        assert not same_weights(model, before)
        soft.apply(update)
        assert same_weights(model, before)


@pytest.mark.parametrize("structure", ["kfac", "identity", "diagonal"])
def test_more_mu_is_less_forgetting_and_less_learning(structure: str) -> None:
    soft = soften(*made(structure))
    nats = [soft.predicted(mu) for mu in (0.0, *(10.0**k for k in range(-3, 7)))]
    assert all(b < a for a, b in itertools.pairwise(nats))
    assert nats[-1] < 1e-3 * nats[0]
    points = soft.curve(9)
    assert len(points) == 9
    assert points[0] == soft.at(0).point
    assert all(b.mu > a.mu and b.loss > a.loss for a, b in itertools.pairwise(points))
    assert soft.predicted(points[-1].mu) == pytest.approx(1e-3 * nats[0], rel=1e-9)
    for share in (0.9, 0.2, 1e-5):
        assert soft.predicted(soft.weight(share * nats[0])) == pytest.approx(share * nats[0])


@pytest.mark.parametrize("structure", EVERY)
@pytest.mark.parametrize("task", [None, "shampoo"])
@pytest.mark.parametrize("share", [0.97, 0.3, 0.01])
def test_a_budget_is_met_by_what_is_left(structure: str, task: str | None, share: float) -> None:
    model, curvature = made(structure)
    soft = soften(model, curvature, target=near(task))
    budget = share * soft.at(0).point.nats
    soft.apply(soft.within(budget))
    assert curvature.quadratic(model) == pytest.approx(budget, rel=1e-6)


def test_a_budget_that_tries_do_not_meet_is_met_by_scaling(monkeypatch: Any) -> None:
    monkeypatch.setattr(curve, "ROUNDS", 1)
    soft = soften(*made(), target=near("shampoo"), depth=2)
    most = soft.predicted(0)
    for share in (0.9, 0.5, 0.2, 0.05):
        assert soft.within(share * most).point.nats <= share * most * (1 + 1e-9)
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
    assert same_weights(model, before)
    assert len(seen) <= 14
    soft.apply(update)
    assert 0.98 * budget <= nats() <= budget
    low, high = 0.0, 1e12
    for _ in range(80):
        mu = (low * high) ** 0.5 if low else high / 2
        soft.apply(soft.at(mu))
        low, high = (mu, high) if nats() > budget else (low, mu)
    assert soft.at(high).point.nats == pytest.approx(update.point.nats, rel=0.06)


def test_a_measured_budget_out_of_reach() -> None:
    model, curvature = made()
    before = weights(model)
    with pytest.raises(ConfigError, match=r"measured within the budget; got: 0\.4 nats at"):
        soften(model, curvature).within_measured(0.3, lambda: 0.4)
    assert same_weights(model, before)


def test_one_mu_for_all_layers_and_it_is_the_least() -> None:
    """The budget's minimum of the loss: no other share of nats among the layers is better."""
    soft = soften(*made(), depth=WHOLE)
    mu = soft.weight(0.3 * soft.predicted(0))
    first, second = itertools.islice(soft.spaces.values(), 2)

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


@pytest.mark.parametrize("task", [None, "kfac"])
def test_deeper_is_never_worse(task: str | None) -> None:
    model, curvature = made()
    depths = (0, 1, 2, WHOLE)
    spaces = [soften(model, curvature, target=near(task), depth=d).spaces.values() for d in depths]
    for mu in MUS[1:]:
        values = [sum(objective(s, s.softened(mu), mu) for s in each) for each in spaces]
        assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(values)), (mu, values)
        assert values[1] < 0.99 * values[0]
        cut = [sum(objective(s, s.cut(mu, 2), mu) for s in each) for each in spaces]
        assert cut[2] < 1.001 * cut[1] < 1.001 * cut[0]


def test_scaling_is_there_to_compare_with_and_softening_beats_it() -> None:
    model, curvature = made()
    soft = soften(model, curvature)
    finished, most = updates(model), soft.predicted(0)
    update = soft.scaled(0.3 * most)
    soft.apply(update)
    assert curvature.quadratic(model) == pytest.approx(0.3 * most, rel=1e-9)
    left = updates(model)
    assert all(relative(left[n], 0.3**0.5 * d) < 1e-12 for n, d in finished.items())
    lost = square({n: left[n] - d for n, d in finished.items()})
    assert update.point.loss == pytest.approx(0.5 * lost, rel=1e-9)
    assert update.point.learned == pytest.approx(soft.within(0.3 * most).point.scaled, rel=1e-9)
    assert soft.scaled(2 * most).point.norm == 1
    for point in soften(*made("shampoo"), depth=0).curve(6)[1:]:
        assert point.learned > point.scaled


@pytest.mark.parametrize("structure", EVERY)
def test_with_the_source_for_a_target_it_is_scaling(structure: str) -> None:
    """F_t = F_s: D(mu) = D* / (1 + mu)."""
    model, curvature = made(structure)
    finished = updates(model)
    soft = soften(model, curvature, target=curvature, epsilon=1e-13)
    soft.apply(soft.at(3.0))
    for name, got in updates(model).items():
        assert relative(got, finished[name] / 4) < 1e-6


def test_a_target_moves_the_softening_to_where_the_task_is_flat() -> None:
    losses, target = [], fitted("llama", "kfac", 2)
    for given in (None, target):
        model, curvature = made()
        finished = updates(model)
        soft = soften(model, curvature, target=given, depth=2)
        soft.apply(soft.within(0.2 * curvature.quadratic(model)))
        moved = {name: d - finished[name] for name, d in updates(model).items()}
        losses.append(target.quadratic(moved))
    assert losses[1] < 0.9 * losses[0]


def test_singular_sides_and_layers_without_an_update() -> None:
    model, curvature = made()
    target = measure(tiny("llama"), 3, "kfac")
    one, two = lora_sites(model)[:2]
    with torch.no_grad():
        one.b.zero_()
        two.b[:, 1] = two.b[:, 0]  # rank 1
    for block in target.blocks.values():
        block.inputs.dense()[0] = block.inputs.dense()[:, 0] = 0.0
        assert torch.linalg.matrix_rank(block.inputs.dense()) < block.inputs.size
    soft = soften(model, curvature, target=target, depth=3)
    budget = 0.1 * curvature.quadratic(model)
    soft.apply(soft.within(budget))
    assert all(bool(w.isfinite().all()) for w in weights(model).values())
    assert not one.b.any()
    assert curvature.quadratic(model) == pytest.approx(budget, rel=1e-6)
    untouched = soften(tiny("llama"), curvature)
    assert untouched.within(1e-9).point.mu == 0
    assert untouched.within_measured(1e-9, lambda: 0.0).point.mu == 0
    assert [p.nats for p in untouched.curve(3)] == [0, 0, 0]


@pytest.mark.parametrize("rank", [1, 4])
def test_the_folder_is_plain_peft(rank: int, tmp_path: Path) -> None:
    model, curvature = tuned(rank=rank), fitted("llama", "kfac")
    soft = soften(model, curvature, depth=2)
    soft.apply(soft.within(0.1 * curvature.quadratic(model)))
    again = load_adapter(base("llama"), save_adapter(model, tmp_path / "adapter", "tiny"))
    again.set_adapter("default")
    ids = torch.tensor([[3, 7, 1, 12, 5]])
    with torch.no_grad():
        want, got = model(ids).logits, again(ids).logits
        with again.disable_adapter():
            assert relative(again(ids).logits, want) > 1e-3
    assert relative(got, want) < 1e-12
    assert {s.rank for each in (model, again) for s in lora_sites(each)} == {rank}


def test_sketches_in_float32() -> None:
    """Sketched factors, wider than twice their rank, in the precision of real fits."""
    model = attach_lora(base("llama", dtype=torch.float32), rank=2)
    curvature = measure(model, 1, "kfac", rank=3)
    block = next(iter(curvature.blocks.values()))
    assert isinstance(block.inputs, SketchFactor) and isinstance(block.outputs, SketchFactor)
    move(model, 4)
    budget = 0.2 * curvature.quadratic(model)
    soft = soften(model, curvature, depth=2)
    soft.apply(soft.within(budget))
    assert curvature.quadratic(model) == pytest.approx(budget, rel=1e-4)


def test_a_path_in_place_of_a_curvature_is_refused() -> None:
    model, path = tiny("llama", moved=True), "c.safetensors"
    for given, more in ((path, {}), (known("llama", "weight", moved=False), {"target": path})):
        name = "target" if more else "curvature"
        with pytest.raises(ConfigError, match=rf"{name}= takes a curvature; got: str '{path}'"):
            soften(model, given, **more)


def test_curvatures_that_do_not_fit_are_refused() -> None:
    model, curvature = made()
    around = measure(model, 2, "kfac")  # the adapter itself, where a target may stand
    assert around.anchor
    assert soften(model, curvature, target=around).at(3.0).point.loss > 0
    space = measure(tiny("llama"), 1, "kfac", space="adapter")
    for tried, source_, target, what in (
        (model, space, None, "space='weight'"),
        (model, around, None, "--adapter"),
        (model, curvature, space, "--space weight"),
        (tuned(seed=9), curvature, around, "stands around another adapter.*--adapter"),
        (tiny("llama", seed=5), curvature, None, "another base model"),
        (tiny("llama", targets=["q_proj"]), curvature, None, "other layers"),
    ):
        with pytest.raises(MismatchError, match=what):
            soften(tried, source_, target=target)
    with pytest.raises(CurvatureError, match=r"tridiagonal.*--structure kfac"):
        soften(model, fitted("llama", "tridiagonal"))


def test_adapters_that_are_more_than_lora_are_refused() -> None:
    spoilt, extra, tokens, curvature = tuned(), tuned(), tuned(), fitted("llama", "kfac")
    with torch.no_grad():
        lora_sites(spoilt)[2].a[0, 0] = float("nan")
    extra.peft_config["default"].modules_to_save = ["embed_tokens"]
    tokens.peft_config["default"].trainable_token_indices = [3, 4]
    for model, what in (
        (dora("llama"), r"DoRA.*plain LoRA"),
        (spoilt, "not finite"),
        (base("llama"), "no LoRA adapter"),
        (extra, r"whole modules \(embed_tokens\)"),
        (tokens, r"rows of tokens.*trainable_token_indices"),
    ):
        with pytest.raises(ModelError, match=what):
            soften(model, curvature)
    extra.peft_config["default"].modules_to_save = ["classifier"]  # a new head is free
    assert soften(extra, curvature).depth == 2


def test_numbers_out_of_range_are_refused(monkeypatch: Any) -> None:
    model, curvature = made()
    soft = soften(model, curvature)
    for number in (-1.0, float("inf"), float("nan"), 0.0):
        with pytest.raises(ConfigError, match=r"budget.*above 0"):
            soft.within(number)
        if number != 0:
            with pytest.raises(ConfigError, match="mu is out of range"):
                soft.at(number)
    for structure, options, what in (
        ("kfac", {"depth": -1}, "depth is out of range; got: -1"),
        ("diagonal", {"depth": 1}, r"depth is out of range; got: 1.*--depth 0"),
        ("kfac", {"epsilon": 0.0}, "epsilon"),
    ):
        with pytest.raises(ConfigError, match=what):
            soften(*made(structure), **options)
    monkeypatch.setattr("retain.retention.soften.adapter.WIDEST", 1)
    with pytest.raises(ConfigError, match=r"rank is too large.*up to 1"):
        soften(*made("ekfac"))
    assert soften(*made()).depth == 2


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
    with pytest.raises(SourceError, match="softening holds to source text; got: none"):
        begun(method_of("soften"), "lora", "llama", source=[])
