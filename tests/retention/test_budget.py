"""A budget is kept at any learning rate, and spent where plain training would exceed it."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from sequences import begun, learn, tasks_of
from torch import nn

from fits import dora
from retain import fit_curvature
from retain.curvature.curvature import Curvature, reanchored
from retain.data.batches import Example
from retain.data.sources import encode
from retain.errors import ConfigError, MismatchError, RetainWarning, TrainingError
from retain.models.lora import attach_lora
from retain.models.sites import lora_sites
from retain.retention.budget import Budget
from retain.retention.displacement import anchored, back_within, largest_share, scale_back
from retain.retention.force import Force
from retain.retention.measure import Reference
from retain.retention.methods.penalty import KFAC
from retain.types import UPDATES
from tiny import KINDS, ROWS, base, exactly, move, tiny, weights

NATS = 0.05
TARGETS = {"llama": [[5, 5, 5, 5, 5, 5], [8, 8, 8, 8, 8]], "bert": [[3, 4, 5], [9, 9, 2]]}


def model_of(kind: str) -> nn.Module:
    model = tiny(kind)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)  # not the head
    return model


def probe(kind: str) -> list[Example]:
    return encode(ROWS[kind], None, max_length=16, causal=kind == "llama")


def fit(model: nn.Module, kind: str, **options: Any) -> Curvature:
    options = {"structure": "kfac", "fisher": "exact", **options}
    return fit_curvature(model, ROWS[kind], batch_size=4, progress=False, **options)


def loss_of(model: nn.Module, kind: str) -> torch.Tensor:
    losses = []
    for i, row in enumerate(TARGETS[kind]):
        ids = torch.tensor([row])
        labels = ids if kind == "llama" else torch.tensor([i])
        losses.append(model(input_ids=ids, labels=labels).loss)
    return torch.stack(losses).mean()


def trained(
    model: nn.Module, kind: str, retention: Force | None, rate: float, steps: int = 80
) -> float:
    """Trains, and returns the measured divergence from where it began."""
    reference = Reference(model, probe(kind), batch_size=4, base=torch.no_grad)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _ in range(steps):
        loss_of(model, kind).backward()
        if retention is None:
            optimizer.step()
        else:
            retention.step(optimizer)
        optimizer.zero_grad()
    if retention is not None:
        told = retention.finish()
        if retention.holds[0].probe is not None:
            assert told == pytest.approx(reference.measure(model).kl, rel=1e-6)
    return reference.measure(model).kl


@cache
def freely(kind: str, rate: float) -> float:
    return trained(model_of(kind), kind, None, rate)


@pytest.mark.parametrize("rate", [1e-3, 1e-2, 1e-1])
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_budget_is_spent_and_kept_at_any_learning_rate(
    kind: str, update: str, rate: float
) -> None:
    # What a proximal run has spent swings between two measurements of the divergence, so two ends.
    plain, spent = freely(kind, rate), []
    for steps in (80, 100) if update == "proximal" else (80,):
        model = model_of(kind)
        retention = Force(model, fit(model, kind), budget=NATS, probe=probe(kind), update=update)
        spent.append(trained(model, kind, retention, rate, steps=steps))
    assert max(spent) <= NATS
    if plain > 2 * NATS:
        assert max(spent) >= 0.85 * NATS
    if rate > 1e-3:
        assert plain > 2 * NATS


@pytest.mark.parametrize("kind", KINDS)
def test_around_a_later_anchor_too(kind: str) -> None:
    model = model_of(kind)
    curvature = fit(model, kind)
    move(model, seed=4)
    curvature = reanchored(curvature, model)
    retention = Force(model, curvature, budget=NATS, probe=probe(kind), resuming=True)
    spent = trained(model, kind, retention, 1e-2, steps=150)
    assert 0.85 * NATS <= spent <= NATS


def test_more_is_learned_along_the_force_than_by_scaling_back_alone() -> None:
    """The multiplier turns the update; the guard alone could only shorten it."""
    losses = []
    for free in (True, False):
        model = tiny("llama")
        retention = Force(model, fit(model, "llama"), budget=NATS, probe=probe("llama"))
        if not free:
            assert retention.budget is not None
            retention.budget.ascend = lambda predicted: None  # type: ignore[method-assign]
            retention.budget.strength = 1e-9
        trained(model, "llama", retention, 1e-2)
        losses.append(float(loss_of(model, "llama").detach()))
    assert losses[0] < losses[1]


@pytest.mark.parametrize("space", ["weight", "adapter"])
@pytest.mark.parametrize("moved", [False, True])
def test_scaling_back_leaves_what_is_allowed(space: str, moved: bool) -> None:
    model = tiny("llama", moved=moved)
    curvature = fit(model, "llama", space=space, structure="diagonal")
    move(model, seed=9)
    sites = curvature.bind(model)
    before = curvature.quadratic(model)
    share = scale_back(curvature, sites, before / 3)
    bent = moved and space == "weight"
    assert curvature.quadratic(model) == pytest.approx(before / 3, rel=0.011 if bent else 1e-9)
    assert curvature.quadratic(model) <= before / 3 * (1 + 1e-9)
    if not bent:
        assert share == pytest.approx(math.sqrt(1 / 3))
    weights = [p.detach().clone() for p in model.parameters()]
    assert scale_back(curvature, sites, before) == 1.0
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))


def test_a_fully_trained_model_is_scaled_back_to_its_own_weights() -> None:
    model = base("llama")
    curvature = fit(model, "llama")
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    sites = curvature.bind(model)
    before = curvature.quadratic(model)
    scale_back(curvature, sites, before / 4)
    assert curvature.quadratic(model) == pytest.approx(before / 4, rel=1e-9)
    with anchored(curvature, sites):
        assert curvature.quadratic(model) == 0
        assert all(torch.equal(s.weight, start[s.name + ".weight"]) for s in sites)
    assert curvature.quadratic(model) == pytest.approx(before / 4, rel=1e-9)


@pytest.mark.parametrize("share", [0.3, 0.9, 0.99])
@pytest.mark.parametrize(
    "divergence",
    [
        lambda t: t**2,
        lambda t: t**4,
        lambda t: 0.1 * t**2 + 0.2 * t**3 + 0.7 * t**4,
        lambda t: t**3 if t < 0.5 else 4 * t**5,
        lambda t: 1e-6 * t if t < 0.25 else t**2,  # a step in it
    ],
)
def test_the_largest_share_of_a_budget_is_found(divergence: Any, share: float) -> None:
    asked: list[float] = []

    def measure(t: float) -> float:
        asked.append(t)
        return float(divergence(t))

    budget = measure(share)
    found, left = largest_share(budget, measure(1.0), measure)
    assert left == divergence(found)
    assert 0.98 * budget <= left <= budget
    smooth = divergence(0.2) > 1e-6
    assert len(asked) - 2 <= (4 if smooth else 12)


def test_a_budget_that_no_share_keeps_leaves_nothing() -> None:
    assert largest_share(0.1, 1.0, lambda t: 0.5 + t) == (0.0, 0.0)


@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_a_divergence_that_is_not_finite_is_above_the_budget(odd: float) -> None:
    found, left = largest_share(0.01, odd, lambda t: t**2 if t < 0.3 else odd)
    assert 0.0098 <= left == found**2 <= 0.01
    assert largest_share(0.01, odd, lambda _: odd) == (0.0, 0.0)
    assert 0 < largest_share(0.1, odd, lambda t: 0.05 + t)[0] < 0.05  # noise at the anchor

    model = tiny("llama")
    curvature = fit(model, "llama")
    move(model, seed=9)
    sites, b = curvature.bind(model), lora_sites(model)[0].b
    whole = float(b.detach().norm())

    def measure() -> float:
        share = float(b.detach().norm()) / whole
        return share**2 if share < 0.3 else odd

    with pytest.warns(RetainWarning, match="predictions on the probe were not finite"):
        assert back_within(curvature, sites, 0.01, measure) == pytest.approx(measure())
    assert float(b.detach().norm()) == pytest.approx(0.1 * whole, rel=0.02)

    budget = Budget(0.05)
    with pytest.raises(TrainingError, match="probe are no longer finite"):
        budget.correct(odd, 1.0)
    assert budget == Budget(0.05)


def test_weights_that_are_not_finite_have_no_way_back() -> None:
    model = tiny("llama")
    retention = Force(model, fit(model, "llama"), budget=NATS, probe=probe("llama"))
    move(model, seed=9)
    site = lora_sites(model)[0]
    site.b.data[0, 0] = math.nan
    before = site.b.detach().clone()
    with pytest.raises(TrainingError, match="weights are no longer finite"):
        retention.finish()
    torch.testing.assert_close(site.b.detach(), before, rtol=0, atol=0, equal_nan=True)


def test_settling_on_a_divergence_that_is_no_quadratic() -> None:
    model = tiny("llama")
    curvature = fit(model, "llama")
    move(model, seed=9)
    sites = curvature.bind(model)
    size = math.sqrt(sum(float(s.b.square().sum()) for s in lora_sites(model)))

    def measure() -> float:
        now = math.sqrt(sum(float(s.b.detach().square().sum()) for s in lora_sites(model)))
        return math.exp(3 * now / size) - 1 - 0.5 * now / size

    assert back_within(curvature, sites, 0.3, measure) == pytest.approx(measure())
    assert 0.3 * 0.98 <= measure() <= 0.3


def test_the_strength_climbs_above_the_budget_and_falls_below_it() -> None:
    budget = Budget(0.05)
    first = budget.strength
    budget.ascend(0.01)
    assert budget.strength == first  # nothing is known before the budget has been reached
    budget.ascend(0.06)
    higher = budget.strength
    assert higher > first
    budget.ascend(0.05)
    assert budget.strength == higher
    budget.ascend(0.01)
    assert budget.strength < higher
    budget.correct(measured=0.001, predicted=0.01)
    assert budget.correction == 1.0  # noise
    budget.correct(measured=0.04, predicted=0.02)
    assert budget.correction == 2.0 and budget.allowed() == 0.025
    other = Budget(0.05)
    budget.weigh(2.0, 8.0)
    other.restore(budget.state())
    assert other == budget
    for _ in range(1000):
        budget.ascend(1e6)
    assert math.isfinite(budget.strength)


@pytest.mark.shows("studies", "budget")
def test_a_method_with_a_budget_spends_it_on_each_task() -> None:
    method = KFAC(budget=0.02, rows=8)
    attached = begun(method, "lora", "llama")
    for task in tasks_of("llama"):
        method.before_task(task)
        retention = method.force
        assert retention is not None and retention.holds[0].probe is not None
        learn_from = retention.holds[0].probe.measure(attached.model).kl
        assert learn_from == pytest.approx(0.0, abs=1e-12)
        result = learn(method, attached, task, learning_rate=0.02)
        assert result.history
        last = retention.holds[0].probe.measure(attached.model).kl
        assert last <= 0.02 * 1.15


@pytest.mark.parametrize("nats", [0.0, -1.0, math.inf, math.nan, "much"])
def test_what_is_no_budget_is_refused(nats: Any) -> None:
    model = tiny("llama")
    with pytest.raises(ConfigError, match="budget is no budget"):
        Force(model, fit(model, "llama"), budget=nats)


@pytest.mark.parametrize("update", UPDATES)
def test_with_a_confidence_the_bound_is_what_is_kept_and_spent(update: str) -> None:
    """The bound is what a budget without a confidence does with the mean."""
    model = model_of("llama")
    ids = [[(i * k) % 13 for k in range(1, 7)] for i in range(1, 9)]
    rows = encode([{"input_ids": some} for some in ids], None, max_length=16, causal=True)
    held = Force(
        model, fit_curvature(model, rows, fisher="exact", progress=False), budget=0.004,
        confidence=0.9, probe=rows, update=update,
    )  # fmt: skip
    optimizer = torch.optim.Adam(held.parameters(), lr=1e-2)
    for _ in range(80):
        loss_of(model, "llama").backward()
        held.step(optimizer)
        optimizer.zero_grad()
    held.finish()
    found = Reference(model, rows).measure(model)
    mean = found.kl
    spent = held.spent()[""]
    assert spent.bound == pytest.approx(found.bound(0.9), rel=1e-6)
    assert spent.measured == held.holds[0].probe.measure(model).kl
    assert spent.measured == pytest.approx(mean, rel=1e-6)
    assert 0.85 * 0.004 <= found.bound(0.9) <= 0.004
    assert mean < 0.85 * 0.004


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"confidence": 0.95}, "a confidence without one.*budget=0.05, confidence=0.95"),
        ({"confidence": 0.4, "budget": NATS}, "confidence is out of range"),
        ({"confidence": 1.0, "budget": NATS}, "confidence is out of range"),
        ({"confidence": "sure", "budget": NATS}, "confidence is out of range"),
        ({"confidence": 0.95, "budget": NATS}, "spread over measured rows.*0 of them"),
        ({"confidence": 0.95, "budget": NATS, "probe": 1}, "spread over measured rows.*1 of them"),
    ],
)
def test_a_confidence_wants_a_budget_and_measured_rows(given: Any, said: str) -> None:
    model = tiny("llama")
    given = given | {"probe": probe("llama")[: given.get("probe", 0)]}
    with pytest.raises(ConfigError, match=said):
        Force(model, fit(model, "llama"), **given)


def test_an_anchor_of_another_rank_has_no_budget() -> None:
    model = tiny("llama", moved=True)
    curvature = fit(model, "llama")
    other = attach_lora(base("llama"), rank=5).double()
    retention = Force(other, curvature, budget=NATS)
    move(other, seed=3)
    with pytest.raises(MismatchError, match="belongs to one rank"):
        retention.finish()


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("start", ["mica", "orthogonal", "learned"])
def test_a_b_that_is_not_0_and_does_not_train_keeps_its_budget(start: str, measured: bool) -> None:
    options = {"init_lora_weights": start} if start != "learned" else {}
    config = LoraConfig(r=2, target_modules="all-linear", **options)
    model = get_peft_model(base("llama", dtype=torch.float32), config).double().eval()
    curvature, text = fit(tiny("llama"), "llama"), probe("llama")
    reference = Reference(model, text, batch_size=4)
    if start == "learned":
        move(model, seed=4, size=0.2)
    for site in lora_sites(model):
        site.b.requires_grad_(False)
    held = Force(model, curvature, budget=NATS, probe=text if measured else ())
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-1)
    for _ in range(20):
        loss_of(model, "llama").backward()
        held.step(optimizer)
        optimizer.zero_grad()
    told, spent = held.finish(), held.spent()[""]
    assert told is not None and 0.5 * NATS < told <= NATS * (1 + 1e-9)
    assert told == pytest.approx(reference.measure(model).kl if measured else spent.predicted)
    assert spent.measured == (told if measured else None)


def test_a_budget_that_what_stays_has_spent_is_refused() -> None:
    model = tiny("llama", moved=True)
    for site in lora_sites(model)[:7]:
        site.a.requires_grad_(False)
        site.b.requires_grad_(False)
    curvature, before = fit(tiny("llama"), "llama"), weights(model)
    with pytest.raises(ConfigError, match="that do not train have spent the budget"):
        Force(model, curvature, budget=1e-4)
    exactly(weights(model), before)
    sites, nats = curvature.bind(model), curvature.quadratic(model)
    with anchored(curvature, sites[7:]):
        stays = curvature.quadratic(model)
    budget = stays + 0.2 * (nats - stays)
    Force(model, curvature, budget=budget)
    exactly(weights(model), before)
    scale_back(curvature, sites, budget)
    assert stays < curvature.quadratic(model) <= budget
    with pytest.warns(RetainWarning, match="is not kept: 7 measured nats are left"):
        assert back_within(curvature, sites, 1.0, lambda: 7.0) == 7.0


@pytest.mark.parametrize("measured", [False, True])
def test_magnitudes_that_train_keep_no_budget(measured: bool) -> None:
    text = probe("llama") if measured else ()
    model = dora("llama")
    curvature = fit(model, "llama")
    Force(model, curvature, 3.0)
    with pytest.raises(ConfigError, match=r"DoRA's magnitudes.*use_dora=False, or a strength"):
        Force(model, curvature, budget=NATS, probe=text)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and "magnitude" not in name)
    Force(model, curvature, budget=NATS, probe=text)


def test_a_head_that_trains_cannot_be_measured() -> None:
    model = tiny("bert")
    with pytest.raises(ConfigError, match=r"while other weights train.*source=None"):
        Force(model, fit(model, "bert"), budget=NATS, probe=probe("bert"))


@pytest.mark.parametrize("odd", [math.inf, math.nan])
def test_a_step_that_a_gradient_scaler_skips_teaches_nothing(odd: float) -> None:
    model = tiny("llama", moved=True)
    held = Force(model, fit(tiny("llama"), "llama"), budget=NATS)
    assert held.budget is not None
    before = held.budget.state()
    for parameter in held.parameters():
        parameter.grad = torch.full_like(parameter, odd)
    held.add_force()
    assert held.budget.state() == before
    for parameter in held.parameters():
        parameter.grad = torch.ones_like(parameter)
    held.add_force()
    assert held.budget.pull[0] > 0 and held.budget.steps == before["steps"] + 1


def test_a_correction_is_of_what_trains() -> None:
    budget = Budget(0.3, spent=(0.2, 0.01))
    budget.correct(0.26, 0.02)
    assert budget.correction == pytest.approx(6.0)
    assert budget.allowed() == pytest.approx(0.01 + 0.1 / 6)
    again = Budget(0.3)
    again.restore(budget.state())
    assert again.allowed() == budget.allowed()


def test_a_budget_below_what_is_spent_is_refused() -> None:
    spent = Budget(0.3, spent=(0.2, 0.01)).state()
    less = Budget(0.2)
    with pytest.raises(ConfigError, match=r"a budget of 0.2, and 0.2 nats that are spent.*of 0.3"):
        less.restore(spent)
    more = Budget(0.21)
    more.restore(spent)
    assert more.allowed() == pytest.approx(0.02)
