"""Methods by name."""

from __future__ import annotations

from typing import Any

import pytest

from retain.errors import ConfigError
from retain.retention import registry
from retain.retention.registry import METHODS, make_method, method_options


def test_each_method_is_there_under_its_own_name() -> None:
    assert list(METHODS) == [
        "none", "l2", "diagonal", "kfac", "tridiagonal", "activation", "kl", "masked_kl",
        "replay", "self_replay", "auto", "wiener", "soften", "olora",
        "osf", "lora_null", "sc_lora", "corda", "finch", "joint",
    ]  # fmt: skip
    for name, method in METHODS.items():
        options = method_options(name)
        made = make_method(name, **options)
        assert type(make_method(name)) is type(made) is method
        assert (method.name, made.stores_data) == (name, name in ("replay", "joint"))
        assert (method.__doc__ or "").strip() and "strength" not in options


def test_a_taken_name_is_refused_and_a_free_one_registered(monkeypatch: Any) -> None:
    monkeypatch.setattr(registry, "METHODS", dict(METHODS))

    class Own(METHODS["none"]):
        name = "own"

    assert registry.register(Own) is Own and registry.register(Own) is Own  # twice is no harm
    assert type(make_method("own")) is Own
    for taken in ("own", "kfac"):
        other = type("Other", (METHODS["none"],), {"name": taken})
        with pytest.raises(ConfigError, match=f"is there already; got: {taken}"):
            registry.register(other)


def test_options_are_those_of_the_whole_family() -> None:
    assert method_options("none") == method_options("olora") == method_options("masked_kl") == {}
    assert method_options("kl") == {"on": "task"}
    assert method_options("l2") == {"update": "gradient", "consolidate": True, "budget": None}
    assert method_options("kfac")["structure"] == "kfac"
    assert set(method_options("kfac")) - set(method_options("diagonal")) == {"structure"}
    assert {"space", "fisher", "source_weight", "task_weight"} < set(method_options("diagonal"))
    assert make_method("kfac", 3.0, structure="ekfac", space="adapter").strength == 3.0


@pytest.mark.parametrize(
    ("name", "options", "what"),
    [
        ("kfca", {}, "unknown method.*did you mean 'kfac'"),
        ("kfac", {"structur": "kfac"}, "option of the method kfac.*did you mean 'structure'"),
        ("kfac", {"structure": "kfack"}, "unknown structure.*did you mean 'kfac'"),
        ("l2", {"space": "weight"}, "unknown option of the method l2.*allowed: budget, conso"),
        ("l2", {"update": "proximale"}, "did you mean 'proximal'"),
        ("diagonal", {"strength": -1.0}, "strength is no strength"),
        ("diagonal", {"source_weight": -1.0}, "source_weight is out of range"),
        ("diagonal", {"task_weight": float("inf")}, "task_weight is out of range"),
        ("auto", {"budget": {"facts": 0.02}}, "a study has one source.*got: budgets of .'facts'"),
        ("kl", {"on": "tasks"}, "did you mean 'task'"),
        ("kl", {"strength": float("nan")}, "strength is no strength"),
        ("masked_kl", {"on": "task"}, "unknown option"),
        ("olora", {"strength": -0.5}, "strength is no strength"),
        ("none", {"strength": 1.0}, "the method none has no strength"),
        ("replay", {"strength": 1.0}, "has no strength.*share, per_task"),
        ("replay", {"share": 1.5}, "the share is out of range.*0 to 1"),
        ("replay", {"per_task": -1}, "per_task is negative"),
        ("replay", {"per_task": 2.5}, "per_task .*no whole number; got: 2.5; allowed: a whole"),
        ("self_replay", {"rows": 1.5}, "rows is too small.*a whole number, 1 or above"),
        ("soften", {"rows": 1.5}, "rows is too small.*a whole number, 1 or above"),
        ("auto", {"rows": 1.5}, "too few rows to read.*a whole number, 1 or above"),
        ("corda", {"rows": 1.5}, "too few rows to read.*a whole number, 1 or above"),
        ("self_replay", {"share": -1.0}, "the share is out of range"),
        ("self_replay", {"rows": 0}, "rows is too small"),
        ("soften", {"budget": 0.0}, "budget is no budget"),
        ("soften", {"probe": 0}, "probe is too small"),
        ("sc_lora", {"beta": 1.5}, "beta is out of range"),
        ("corda", {"rows": 0}, "too few rows"),
        ("finch", {"strength": -1.0}, "strength is no strength"),
        ("osf", {"preserve": 1.0}, "preserve is no share"),
    ],
)
def test_what_is_not_known_or_out_of_range_is_one_line(
    name: str, options: dict[str, Any], what: str
) -> None:
    with pytest.raises(ConfigError, match=what) as caught:
        make_method(name, **options)
    assert "\n" not in str(caught.value)
