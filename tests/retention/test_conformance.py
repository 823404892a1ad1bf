"""What every retention method must do, with each adapter that it composes with."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sequences import (
    CASES,
    CURVED,
    attach,
    begun,
    cases,
    context,
    learn,
    method_of,
    run,
    same,
    tasks_of,
)  # fmt: skip
from torch import Tensor

from retain.errors import ConfigError
from retain.models.adapters.registry import ADAPTERS
from retain.retention.registry import METHODS, make_method

STARTS = ("lora_null", "sc_lora", "corda")
EACH = pytest.mark.parametrize(("name", "adapter", "model"), CASES)
OFF: dict[str, dict[str, Any]] = {
    "replay": {"share": 0.0},
    "self_replay": {"share": 0.0},
    "soften": {"budget": 1e9},
}
"""What turns a method off that has no strength."""


@cache
def plain(adapter: str, model: str, dtype: torch.dtype, tasks: int = 2) -> dict[str, Tensor]:
    return run(make_method("none"), adapter, model, tasks=tasks, dtype=dtype).state()


@pytest.mark.parametrize(
    ("name", "adapter", "model"), cases(without=["none", "osf", "auto", "wiener", "joint", *STARTS])
)
def test_strength_zero_is_plain_training_bit_for_bit(name: str, adapter: str, model: str) -> None:
    options = OFF.get(name, {"strength": 0.0})
    tasks = 1 if name == "olora" else 2  # two tasks have twice the rank there
    method = method_of(name, **options)
    got = run(method, adapter, model, tasks=tasks, dtype=torch.float32).state()
    same(got, plain(adapter, model, torch.float32, tasks))
    start = attach(adapter, model, method, dtype=torch.float32).state()
    assert any(not torch.equal(got[n], start[n]) for n in got if n in start)


@EACH
@pytest.mark.shows("studies", "gradient accumulation", only="auto-lora-llama")
def test_accumulation_gives_one_trajectory(name: str, adapter: str, model: str) -> None:
    one, four = (run(method_of(name), adapter, model, accumulation=n).state() for n in (1, 4))
    for key, tensor in one.items():
        slack = 1e-9 if name != "osf" else 1e-5  # PEFT decomposes in float32
        assert float((tensor - four[key]).abs().max()) < slack, key


@pytest.mark.parametrize(("name", "adapter", "model"), cases(models=["llama"]))
@pytest.mark.shows("studies", "full fine-tuning", only="kfac-full-llama")
def test_types_stay_and_what_is_frozen_stays(name: str, adapter: str, model: str) -> None:
    method = method_of(name)
    attached = begun(method, adapter, model, dtype=torch.bfloat16)
    trained = set(attached.parameters())
    before = {
        n: p.detach().clone()
        for n, p in attached.model.named_parameters()
        if n not in trained and not (adapter == "osf" and n.endswith("base_layer.weight"))
    }
    types = {n: p.dtype for n, p in attached.model.named_parameters()}
    for task in tasks_of(model):
        learn(method, attached, task, max_steps=1)
    after = dict(attached.model.named_parameters())
    assert {n: p.dtype for n, p in after.items()} == types
    assert set(attached.parameters()) == trained
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor), key
    for parameter in after.values():
        assert bool(parameter.isfinite().all())


def states() -> tuple[Any, ...]:
    return (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist())


@EACH
def test_the_global_random_state_is_left_alone(name: str, adapter: str, model: str) -> None:
    method = method_of(name)
    attached = attach(adapter, model, method)
    first, second = tasks_of(model)
    start = states()
    method.begin(context(attached, model))
    for task in (first, second):
        method.before_task(task)
        method.after_task(task)
    assert states() == start


@EACH
def test_a_run_that_goes_on_from_a_file_is_the_uninterrupted_one(
    name: str, adapter: str, model: str, tmp_path: Path
) -> None:
    first, second = tasks_of(model)
    whole = method_of(name)
    attached = begun(whole, adapter, model, dtype=torch.float32)
    learn(whole, attached, first)
    kept = whole.state() | whole.constant()
    save_file(kept or {"none": torch.zeros(1)}, tmp_path / "method.safetensors")
    save_file(attached.state(), tmp_path / "adapter.safetensors")
    learn(whole, attached, second)

    again = method_of(name)
    other = attach(adapter, model, again, dtype=torch.float32)
    again.context, kept = context(other, model), load_file(tmp_path / "adapter.safetensors")
    again.fit_adapter(kept)
    other.restore(kept)
    again.restore(load_file(tmp_path / "method.safetensors"))
    learn(again, other, second)
    same(other.state(), attached.state())
    want = whole.state()
    if name in CURVED:  # the bytes of a file; the anchor's order in it does not matter
        assert again.memory() == whole.memory()
        assert again.curvature.quadratic(other.model) == whole.curvature.quadratic(other.model)
    else:
        same(again.state(), want)


@pytest.mark.parametrize(
    ("name", "adapter", "model"),
    [c for c in cases(without=["replay", "joint"]) if c[1] in ("lora", "osf")],
)
def test_memory_does_not_grow_with_the_tasks(name: str, adapter: str, model: str) -> None:
    method = method_of(name)
    attached = begun(method, adapter, model, tasks=4)
    sizes = []
    for index in range(4):
        task = tasks_of(model)[0]
        task.index, task.seed = index, 20 + index
        if index < 2:
            learn(method, attached, task, max_steps=1)
        else:
            method.before_task(task)
            method.after_task(task)
        sizes.append(method.memory())
    if name == "kl" and model == "bert":  # two numbers for each task
        assert sizes == [16, 32, 48, 64]
    elif name in ("auto", "wiener"):  # the anchor has the adapter's rank, which grows up to a bound
        assert sizes[2] == sizes[3] < 2 * sizes[0]
    else:
        assert len(set(sizes)) == 1
    assert (sizes[0] > 0) is (
        name in (*CURVED, *STARTS, "self_replay", "auto", "wiener", "soften")
        or (name == "kl" and model == "bert")
    )


@pytest.mark.parametrize("name", METHODS)
def test_other_adapters_are_refused_with_the_reason(name: str) -> None:
    method = method_of(name)
    for kind in ADAPTERS.keys() - METHODS[name].adapters:
        attached = attach(kind, "llama", make_method("none"))
        with pytest.raises(ConfigError, match=f"{name} does not compose") as caught:
            method.begin(context(attached, "llama"))
        text = str(caught.value)
        reason = METHODS[name].why_not.get(kind, "osf splits its weights anew")
        assert reason in text and f"got: {kind}" in text
        assert "\n" not in text and "derived" not in text
    if "classifier" in METHODS[name].why_not:
        attached = attach("lora", "bert", make_method("none"))
        with pytest.raises(ConfigError, match="needs a causal model: "):
            method.begin(context(attached, "bert"))


@pytest.mark.parametrize("name", ["none", "kfac", "kl", "replay", "self_replay", "osf"])
def test_one_seed_is_one_result(name: str) -> None:
    adapter = min(METHODS[name].adapters & {"lora", "osf"})
    one, other = (run(method_of(name), adapter, "llama", dtype=torch.float32) for _ in range(2))
    same(one.state(), other.state())
