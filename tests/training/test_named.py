"""Named budgets: each source has its own bound and its own strength."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from test_callback import DATA, Backend, trainer
from torch import nn

from retain import Curvature, Retention, RetentionCallback, fit_curvature
from retain.data.batches import Example
from retain.data.sources import encode
from retain.errors import ConfigError, MismatchError, RetainWarning
from retain.retention.filter_rows import new_moments, old_moments
from retain.retention.force import Force
from retain.retention.loader import reader_of
from retain.retention.measure import Reference
from retain.retention.moments import moments_of
from retain.retention.recipe import Recipe
from tiny import exactly, move, tiny, weights

SOURCES = {
    "low": [{"input_ids": [3, 1, 2, 4, 1]}, {"input_ids": [2, 1, 4]}],
    "high": [{"input_ids": [12, 9, 11, 10]}, {"input_ids": [9, 10, 12, 11, 9]}],
}
NATS = {"low": 0.03, "high": 0.01}


def fit(model: nn.Module, rows: Any, **options: Any) -> Curvature:
    return fit_curvature(model, rows, fisher="exact", batch_size=2, progress=False, **options)


def both(model: nn.Module) -> dict[str, Curvature]:
    return {name: fit(model, rows) for name, rows in SOURCES.items()}


def encoded(rows: Any) -> list[Example]:
    return encode(rows, None, max_length=16, causal=True)


def probes() -> dict[str, list[Example]]:
    return {name: encoded(rows) for name, rows in SOURCES.items()}


def loop(model: nn.Module, held: Any, steps: int = 60, rate: float = 0.02) -> float:
    """Trains a plain loop, and returns the loss at its end."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
    ids, labels = (torch.tensor([r[key] for r in DATA]) for key in ("input_ids", "labels"))
    for _ in range(steps):
        model(input_ids=ids, labels=labels).loss.backward()
        held.step(optimizer)
        optimizer.zero_grad()
    held.finish()
    return float(model(input_ids=ids, labels=labels).loss.detach())


def spent(model: nn.Module) -> dict[str, float]:
    """The true divergence from the base, by name."""
    return {n: Reference(model, rows).measure(model).kl for n, rows in probes().items()}


def test_the_force_is_the_gradient_of_the_weighed_sum() -> None:
    model = tiny("llama", moved=True)
    curvatures = both(tiny("llama"))
    past = fit(model, SOURCES["low"])
    move(model, seed=5)
    held = Force(model, curvatures, budget=NATS, past=past)
    strengths = {"low": 0.7, "high": 2.5}
    for hold in held.holds:
        assert hold.budget is not None
        hold.budget.nats, hold.budget.strength = 1e9, strengths[hold.name]
    held.add_force()
    pairs = {n: (s.a, s.b, s.scaling) for n, s in ((s.name, s) for s in held.sites)}  # type: ignore
    total = torch.zeros((), dtype=torch.float64)
    with torch.enable_grad():
        for weight, c in [(2.5, past), *((strengths[n], c) for n, c in curvatures.items())]:
            for name, (a, b, scaling) in pairs.items():
                moved = scaling * b @ a
                if name in c.anchor:
                    moved = moved - c.anchor[name][0] @ c.anchor[name][1]
                dense = c.blocks[name].to_dense()
                total = total + weight * 0.5 * moved.flatten() @ dense @ moved.flatten()
        wanted = torch.autograd.grad(total, held.parameters())
    for parameter, want in zip(held.parameters(), wanted, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("measured", [True, False])
def test_each_stays_within_its_own_budget(measured: bool) -> None:
    model = tiny("llama")
    curvatures = both(model)
    held = Force(model, curvatures, budget=NATS, probe=probes() if measured else ())
    loop(model, held)
    found = spent(model) if measured else {n: c.quadratic(model) for n, c in curvatures.items()}
    assert all(found[name] <= NATS[name] * (1 + 1e-9) for name in NATS)
    assert any(found[name] >= 0.8 * NATS[name] for name in NATS)


def test_with_a_confidence_each_bound_is_within_its_own_budget(tmp_path: Path) -> None:
    model, backend = tiny("llama"), Backend()
    keep = RetentionCallback(both(model), budget=NATS, confidence=0.75, source=SOURCES)
    run = trainer(model, tmp_path, [keep], max_steps=8, learning_rate=0.05)
    run.add_callback(backend)
    run.train()
    for name, rows in probes().items():
        found, last = Reference(model, rows).measure(model), run.state.log_history[-1]
        assert last[f"bound_nats/{name}"] == pytest.approx(found.bound(0.75), rel=1e-6)
        assert last[f"measured_nats/{name}"] == pytest.approx(found.kl, rel=1e-6)
        assert found.kl < found.bound(0.75) <= NATS[name]
    card = (tmp_path / "README.md").read_text()
    assert "- Budget of high: 0.01 nats per token of KL divergence to the base, with 0.75" in card
    assert f"nats per token (at most {last['bound_nats/high']:.3g}), on a few" in card


def test_a_budget_that_binds_pulls_and_one_that_does_not_lets_go() -> None:
    for tight, loose in (("low", "high"), ("high", "low")):
        model = tiny("llama")
        held = Force(model, both(model), budget={tight: 0.005, loose: 50.0}, probe=probes())
        begun = held.strengths
        loop(model, held)
        assert held.strengths[tight] > begun[tight] / 10
        assert held.strengths[loose] < begun[loose] / 100
        assert spent(model)[tight] <= 0.005


@pytest.mark.parametrize("parts", [None, ["force"]])
def test_one_name_is_the_same_as_none_bit_for_bit(parts: Any) -> None:
    ends = []
    for name in (None, "all"):
        model = tiny("llama")
        given: list[Any] = [fit(model, SOURCES["low"]), 0.02, probes()["low"]]
        if name is not None:
            given = [{name: value} for value in given]
        curvature, budget, probe = given
        held = Retention(
            model, curvature, budget=budget, probe=probe, rows=encoded(DATA[:4]), parts=parts
        )
        loop(model, held, steps=20, rate=0.05)
        ends.append(weights(model))
    exactly(*ends)


def test_a_trainer_logs_each_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    options = {"max_steps": 8, "learning_rate": 0.05, "save_strategy": "steps", "save_steps": 4}
    ends, backend = [], Backend()
    for resumed in (None, str(tmp_path / "checkpoint-4")):
        model = tiny("llama")
        keep = RetentionCallback(both(model), budget=NATS, source=SOURCES)
        run = trainer(model, tmp_path, [keep], **options)
        run.add_callback(backend)
        run.train(resume_from_checkpoint=resumed)
        ends.append(weights(model))
        assert all(spent(model)[name] <= NATS[name] for name in NATS)
    exactly(*ends)
    record = [r for r in backend.records if "loss" in r][-1]
    for name in NATS:
        assert record[f"predicted_nats/{name}"] > 0 and record[f"strength/{name}"] > 0
    assert record["predicted_nats"] == pytest.approx(
        sum(record[f"predicted_nats/{name}"] for name in NATS) / 2
    )
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["retain"]["budgets"].keys() == NATS.keys()


def test_the_filter_stops_what_any_source_reads() -> None:
    model = tiny("llama")
    recipe = Recipe(both(model), budget=NATS)
    recipe.begin(model, reader_of(encoded(DATA)))
    assert recipe.filter is not None
    assert isinstance(recipe.curvature, Mapping)
    rows, options = reader_of(encoded(DATA)), recipe.options
    new = new_moments(model, recipe.sites, rows, options, recipe.curvature, seed=0)
    old = old_moments(new, recipe.curvature, recipe.past)
    assert old is not None
    each = [moments_of(c).sized_as(new) for c in recipe.curvature.values()]
    for site in recipe.sites:
        wanted = sum(m.of(site.name) for m in each)
        torch.testing.assert_close(old.of(site.name), wanted)
    recipe.release()


def test_what_is_known_between_tasks_comes_back() -> None:
    model = tiny("llama")
    recipe = Recipe(both(model), budget=NATS)
    recipe.consolidate(model, encoded(DATA))
    again = Recipe(budget=NATS)
    again.restore(recipe.state())
    assert isinstance(again.curvature, Mapping) and list(again.curvature) == list(NATS)
    assert again.memory() == recipe.memory()
    move(model, seed=3)
    for name, curvature in both(tiny("llama")).items():
        assert again.curvature[name].quadratic(model) == curvature.quadratic(model)


@pytest.mark.parametrize(
    ("curvature", "budget", "source", "said"),
    [
        ("both", None, "auto", "needs a curvature and a budget for each.*budget: none"),
        ("both", 0.02, "auto", "needs a curvature and a budget for each.*budget: 0.02"),
        ("one", NATS, "auto", "needs a curvature and a budget for each.*curvature: one"),
        ("both", {}, "auto", "the budgets have no names"),
        ("both", {"low": 0.1, " ": 0.2}, "auto", "the budgets have no names"),
        ("both", {"low": 0.1}, "auto", "curvatures have other names.*got: high too many"),
        ("both", NATS | {"mid": 0.1}, "auto", "curvatures have other names.*mid missing"),
        ("both", NATS | {"low": -1}, "auto", "budget is no budget"),
        ("both", NATS, SOURCES["low"], "have each its own sources"),
        ("both", NATS, {"mid": SOURCES["low"]}, "sources have other names.*mid too many"),
        ("odd", NATS, "auto", "curvature= takes a curvature"),
    ],
)
def test_names_that_do_not_go_together_are_refused(
    curvature: str, budget: Any, source: Any, said: str
) -> None:
    known = both(tiny("llama"))
    given: Any = {"both": known, "one": known["low"], "odd": {"low": 1, "high": 2}}[curvature]
    with pytest.raises(ConfigError, match=said):
        RetentionCallback(given, budget=budget, source=source)


def test_around_two_points_there_is_no_way_back() -> None:
    model, other = tiny("llama"), tiny("llama", moved=True)
    curvatures = {"low": fit(model, SOURCES["low"]), "high": fit(other, SOURCES["high"])}
    with pytest.raises(MismatchError, match="around one point"):
        Force(model, curvatures, budget=NATS)
    with pytest.raises(ConfigError, match="a proximal step knows one source"):
        Force(model, both(model), budget=NATS, update="proximal")


def test_a_budget_without_text_is_said_to_be_of_predicted_nats(tmp_path: Path) -> None:
    model = tiny("llama")
    keep = RetentionCallback(both(model), budget=NATS, source={"low": SOURCES["low"]})
    with pytest.warns(RetainWarning, match="budget of high is of predicted nats"):
        trainer(model, tmp_path, [keep]).train()
    assert keep.force is not None
    assert [hold.probe is None for hold in keep.force.holds] == [False, True]
