"""The recipe a task at a time: the force of the source text and of the tasks before."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from sequences import begun, learn, source, tasks_of

from retain import Retention, fit_curvature
from retain.curvature.blocks.kronecker import rank_of
from retain.data.batches import batches
from retain.errors import ConfigError, RetainWarning
from retain.models.sites import lora_sites
from retain.retention.methods.auto import Auto
from retain.retention.recipe import Recipe
from retain.types import FactorRank


@pytest.mark.parametrize("rank", ["auto", 2])
def test_the_force_is_the_gradient_of_both_quadratics(rank: FactorRank) -> None:
    """Against differences, on every kind of entry of the rows that train, in the second task."""
    method = Auto(7.0, rows=8, factor_rank=rank)
    attached = begun(method, "lora", "llama", tasks=2)
    first, second = tasks_of("llama")
    learn(method, attached, first)
    rows = method.before_task(second)
    recipe = method.recipe
    assert recipe.curvature is not None and recipe.past is not None and recipe.force is not None
    for held in (recipe.curvature, recipe.past):
        assert rank_of(held.blocks.values()) == (None if rank == "auto" else rank)
    sites = lora_sites(attached.model)
    with torch.no_grad():
        for site in sites:
            site.b[:, 2:].normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    batch = next(iter(batches(rows, 4, 0)))
    attached.model(**batch.inputs).logits.pow(2).mean().backward()
    before = [(s.a.grad.clone(), s.b.grad.clone()) for s in sites]
    nats = method.before_step(attached.model)

    def whole() -> tuple[float, float]:
        """Predicted nats of the source, and with those of the task before, by the definition."""
        totals = []
        for held in (recipe.curvature, recipe.past):
            assert held is not None
            total = 0.0
            for site in sites:
                d = (site.scaling * (site.b @ site.a)).detach().double()
                if held.anchor:
                    b, a = held.anchor[site.name]
                    d = d - b.double() @ a.double()
                total += 0.5 * float((d * held.blocks[site.name].matvec(d)).sum())
            totals.append(total)
        return totals[0], sum(totals)

    assert nats == pytest.approx(whole()[0], rel=1e-9)
    assert nats is not None and nats > 0
    for site, (a, b) in zip(sites, before, strict=True):
        for weight, was in ((site.a, a), (site.b, b)):
            for row, moves in ((3, True), (0, False)):
                place = (row, 2) if weight is site.a else (2, row)
                ends = []
                for step in (1e-4, -1e-4):
                    with torch.no_grad():
                        weight[place] += step
                        ends.append(whole()[1])
                        weight[place] -= step
                slope = (ends[0] - ends[1]) / 2e-4 if moves else 0.0
                added = float((weight.grad - was)[place])
                assert added == pytest.approx(7.0 * slope, rel=1e-4, abs=1e-9)


def test_a_stronger_force_predicts_less_forgetting() -> None:
    nats = []
    for strength in (1e-6, 1e2):
        method = Auto(strength, rows=8)
        attached = begun(method, "lora", "llama", tasks=1)
        learn(method, attached, tasks_of("llama")[0])
        assert method.recipe.curvature is not None
        nats.append(method.recipe.curvature.quadratic(attached.model))
    assert nats[1] < 0.7 * nats[0]


def test_without_source_text_the_tasks_before_hold() -> None:
    method = Auto(5.0, rows=8)
    attached = begun(method, "lora", "bert", tasks=2, source=[])
    first, second = tasks_of("bert")
    method.before_task(first)
    assert method.recipe.force is None and method.recipe.filter is not None
    learn(method, attached, first)
    method.before_task(second)
    assert method.recipe.curvature is None and method.recipe.force is not None
    assert method.recipe.force.curvature is method.recipe.past


def test_an_adapter_that_would_be_too_large_is_cut() -> None:
    method = Auto(5.0, rows=8, max_rank=4)
    attached = begun(method, "lora", "llama", tasks=4)
    ranks = []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for task in [*tasks_of("llama"), *tasks_of("llama")]:
            learn(method, attached, task)
            ranks.append(lora_sites(attached.model)[0].rank)
    cut = [str(w.message) for w in said if issubclass(w.category, RetainWarning)]
    assert sum("cut from rank 4 to 2, and loses" in text for text in cut) == 2
    assert ranks == [2, 4, 4, 4]


@pytest.mark.parametrize("most", [3, 2, -3, 4.5])
def test_a_rank_without_room_for_what_was_learned_is_refused(most: Any) -> None:
    """Before the source is measured, and where an adapter would grow."""
    said = r"no room for what was learned before; got: max_rank .*, rank 2; .*fix: max_rank=8"
    with pytest.raises(ConfigError, match=said):
        begun(Auto(max_rank=most), "lora", "llama", tasks=2)
    attached = begun(Auto(), "lora", "llama", tasks=2)
    with pytest.raises(ConfigError, match=said):
        Recipe().grow(attached.model, 2, max_rank=most)


@pytest.mark.parametrize("model", ["llama", "bert"])
def test_a_budget_is_measured_on_the_source_where_a_model_writes(model: str) -> None:
    method = Auto(budget=0.05, rows=8)
    begun(method, "lora", model, tasks=1)
    method.before_task(tasks_of(model)[0])
    force = method.recipe.force
    assert force is not None and force.budget is not None
    assert (force.holds[0].probe is not None) is (model == "llama")


@pytest.mark.parametrize("held", [True, False])
def test_a_loop_without_rows_says_that_there_is_no_filter(held: bool) -> None:
    attached = begun(Auto(0.0), "lora", "llama", tasks=1)
    curvature = None
    if held:
        curvature = fit_curvature(attached.model, source("llama"), batch_size=2, progress=False)
    said = "the force alone" if held else "nothing"
    with pytest.warns(RetainWarning, match=f"held by {said}, without a filter: there are no rows"):
        Retention(attached.model, curvature)


def test_bad_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="strength is no strength"):
        Auto(-1.0)
    with pytest.raises(ConfigError, match="gain is out of range"):
        Auto(gain=0.0)
    with pytest.raises(ConfigError, match=r"unknown part.*got: 'fliter'"):
        Auto(parts=["rows", "fliter"])
    with pytest.raises(
        ConfigError, match=r"a list of names; got: 'rows,force'.*\['rows', 'force'\]"
    ):
        Auto(parts="rows,force")
    with pytest.warns(RetainWarning, match="nothing holds the model"):
        Auto(parts=[])
    odd: dict[str, tuple[Any, str]] = {
        "strength": (True, "the strength is no strength; got: True"),
        "budget": (True, "the budget is no budget; got: True"),
        "filter": (
            {"gain": 1},
            r"takes the options of a filter; got: \{'gain': 1\}.*filter=retain.Filter",
        ),
        "past": ("x", "past= takes a curvature; got: str 'x'"),
        "curvature": ("x", "curvature= takes a curvature; got: str 'x'"),
    }
    for name, (value, told) in odd.items():
        with pytest.raises(ConfigError, match=told):
            Recipe(**{name: value})
    for budget in (0.01, {"facts": 0.01}):
        with pytest.raises(ConfigError, match="nothing would keep the budget without the force"):
            Recipe(parts=["rows", "filter"], budget=budget)
    Recipe(parts=["force"], budget=0.01)
