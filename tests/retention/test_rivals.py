"""Where the rivals' A and B begin, from the papers' formulas; and the rates of FINCH."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from sequences import attach, begun, context, learn, method_of, source, tasks_of
from torch import Tensor
from torch.nn import functional

from retain.config import TrainConfig
from retain.models.sites import lora_sites
from retain.retention.method import Method
from retain.retention.moments import input_moments
from retain.retention.starts import Start
from retain.training.loop import train


def started(name: str, model: str = "llama") -> tuple[Method, dict[str, Any], Any]:
    """A method that has learned a task and prepared the second; what it was prepared from."""
    method = method_of(name, rows=99)
    adapter = begun(method, "lora", model)
    first, second = tasks_of(model)
    if isinstance(method, Start):
        sites = lora_sites(adapter.model)
        kept = input_moments(adapter.model, sites, source(model), answers=0.0)
        learn(method, adapter, first)
        sites = lora_sites(adapter.model)
        own = input_moments(adapter.model, sites, first.examples, answers=0.0)
        new = input_moments(adapter.model, sites, second.examples, answers=0.0)
        found = {
            s.name: {
                "w": s.layer.get_base_layer().weight.detach() + s.scaling * s.b @ s.a,
                "old": (kept.of(s.name) + own.of(s.name)) / 2,
                "new": new.of(s.name),
            }
            for s in sites
        }
        before = adapter.model(input_ids=torch.tensor([[3, 5, 7]])).logits
        method.before_task(second)
        after = adapter.model(input_ids=torch.tensor([[3, 5, 7]])).logits
        assert torch.allclose(before, after, atol=1e-10)  # it begins as what was learned before
    return method, found, adapter


def starts_of(adapter: Any, r: int = 2) -> dict[str, Tensor]:
    """``s B_0 A_0`` of each layer: what trains."""
    return {s.name: s.scaling * s.b[:, -r:] @ s.a[-r:] for s in lora_sites(adapter.model)}


def test_lora_null_begins_where_the_old_is_not() -> None:
    _, known, adapter = started("lora_null")
    for name, start in starts_of(adapter).items():
        w, old = known[name]["w"], known[name]["old"]
        u, _, _ = torch.linalg.svd(old)  # the authors' way: the last r left singular vectors
        quiet = u[:, -2:]
        assert torch.allclose(start, w @ quiet @ quiet.T, atol=1e-6), name
        site = next(s for s in lora_sites(adapter.model) if s.name == name)
        b, a = site.b[:, -2:], site.a[-2:]  # alike in size
        assert torch.allclose(b.norm(dim=0) * site.scaling, a.norm(dim=1), rtol=1e-6), name


def test_sc_lora_begins_where_the_new_is_and_the_old_is_not() -> None:
    _, known, adapter = started("sc_lora")
    for name, start in starts_of(adapter).items():
        w, old, new = (known[name][part] for part in ("w", "old", "new"))
        gain = 0.5 * w @ new @ w.T - 0.5 * w @ old @ w.T
        q = torch.linalg.eigh(gain).eigenvectors[:, -2:]
        assert torch.allclose(start, q @ q.T @ w, atol=1e-6), name


def test_corda_is_its_own_formula() -> None:
    _, known, adapter = started("corda")
    for name, start in starts_of(adapter).items():
        w, old = known[name]["w"], known[name]["old"]
        damped = old + 0.01 * old.diagonal().mean() * torch.eye(len(old))
        u, s, v = torch.linalg.svd(w @ damped, full_matrices=False)
        want = u[:, -2:] * s[-2:] @ v[-2:] @ torch.linalg.inv(damped)
        assert torch.allclose(start, want, atol=1e-3 * float(want.abs().max())), name


@pytest.mark.parametrize("name", ["lora_null", "sc_lora", "corda"])
def test_only_the_start_trains(name: str) -> None:
    method, _, adapter = started(name)
    before = {
        s.name: (s.a.detach().clone(), s.b.detach().clone()) for s in lora_sites(adapter.model)
    }
    rows = tasks_of("llama")[1].examples
    config = TrainConfig(batch_size=8, learning_rate=0.02, max_steps=2, weight_decay=0.1)
    train(adapter.model, rows, config, method=method, progress=False)
    for site in lora_sites(adapter.model):
        a, b = before[site.name]
        assert torch.equal(site.a[:-2], a[:-2]) and torch.equal(site.b[:, :-2], b[:, :-2])
        assert not torch.equal(site.a[-2:], a[-2:]) and not torch.equal(site.b[:, -2:], b[:, -2:])


@pytest.mark.parametrize("model", ["llama", "bert"])
def test_finch_takes_the_step_of_a_lower_rate(model: str) -> None:
    """Its twin is plain training of one step at the rate that the loss allows."""
    task, rate, strength = tasks_of(model)[0], 0.01, 40.0
    method = method_of("finch", strength=strength)
    adapter = begun(method, "lora", model)
    rows = task.examples[:8]
    task.examples = rows
    total, count = 0.0, 0
    adapter.model.eval()
    for row in rows:
        kinds = {"token_type_ids": torch.tensor([row.segments])} if row.segments else {}
        logits = adapter.model(input_ids=torch.tensor([row.tokens]), **kinds).logits.detach()
        if row.predict:
            logits = logits[0, torch.tensor(row.predict)]
            goal = torch.tensor([t for t, p in zip(row.targets, row.predict, strict=True) if p])
        else:
            logits, goal = logits[:, task.columns], torch.tensor(row.targets)
        total += float(functional.cross_entropy(logits, goal, reduction="sum"))
        count += len(goal)
    lower = rate / math.sqrt(strength * total / count)
    assert lower < rate / 2
    learn(method, adapter, task, learning_rate=rate, max_steps=1)
    plain = method_of("none")
    twin = attach("lora", model, plain)
    plain.begin(context(twin, model))
    learn(plain, twin, task, learning_rate=lower, max_steps=1)
    for name, tensor in twin.state().items():
        assert torch.allclose(adapter.state()[name], tensor, atol=1e-9), name


def test_joint_is_training_on_all_rows_from_the_start() -> None:
    first, second = tasks_of("llama")
    method = method_of("joint")
    adapter = begun(method, "lora", "llama")
    for task in (first, second):
        learn(method, adapter, task)
    plain = method_of("none")
    twin = attach("lora", "llama", plain)
    plain.begin(context(twin, "llama"))
    second.examples = [*second.examples, *first.examples]
    learn(plain, twin, second)
    for name, tensor in twin.state().items():
        assert torch.equal(adapter.state()[name], tensor), name
