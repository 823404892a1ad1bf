"""Curvatures of tasks, against sums written out."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from sequences import alone, attach, batch_of, begun, learn, method_of, shaken, tasks_of
from torch import Tensor, nn

from retain.data.batches import Example
from retain.errors import ConfigError
from retain.models.forward import forward_logits
from retain.models.sites import LinearSite, find_sites, lora_sites
from retain.retention.method import Task
from retain.retention.methods.kl import KL
from retain.retention.task_curvature import answering
from tiny import relative


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The weight of each layer with its update, a leaf that the layer's output depends on."""
    return {
        s.name: s.weight.detach().clone()
        if isinstance(s, LinearSite)
        else (s.scaling * s.b @ s.a).detach()
        for s in find_sites(model)
    }


def jacobians(model: nn.Module, example: Example, columns: slice | None) -> dict[str, Tensor]:
    """d logits / d update of each LoRA layer, [predictions * classes, d_out, d_in]."""
    sites = lora_sites(model)
    extra = {s.name: torch.zeros(s.shape, dtype=torch.float64, requires_grad=True) for s in sites}
    handles = [
        s.layer.register_forward_hook(lambda _m, x, y, e=extra[s.name]: y + x[0] @ e.T)
        for s in sites
    ]
    logits = alone(model, example)
    logits = logits if columns is None else logits[:, columns]
    found = [
        torch.autograd.grad(z, list(extra.values()), retain_graph=True) for z in logits.reshape(-1)
    ]
    for handle in handles:
        handle.remove()
    return {n: torch.stack([f[i] for f in found]) for i, n in enumerate(extra)}


def naive_fisher(model: nn.Module, task: Task) -> dict[str, Tensor]:
    """The diagonal of the exact Fisher of a task's own outputs, by Jacobians."""
    total: dict[str, Tensor] = {}
    count = 0
    for example in task.examples:
        logits = alone(model, example).detach()
        logits = logits if task.columns is None else logits[:, task.columns]
        p, classes = logits.softmax(-1), logits.shape[1]
        for name, jacobian in jacobians(model, example, task.columns).items():
            j = jacobian.view(len(logits), classes, *jacobian.shape[1:])
            if classes == 1:
                part = 2 * j[:, 0].square().sum(0)
            else:
                mean = (p[..., None, None] * j).sum(1, keepdim=True)
                part = (p[..., None, None] * (j - mean).square()).sum((0, 1))
            total[name] = total.get(name, 0) + part
        count += len(logits)
    return {n: t / count for n, t in total.items()}


@pytest.mark.parametrize(("model", "which"), [("llama", 0), ("bert", 0), ("bert", 1)])
def test_ewc_is_the_explicit_penalty(model: str, which: int) -> None:
    """After one task: the force of the second is autograd's of the written-out penalty."""
    method = method_of(
        "diagonal", strength=4.0, fisher="exact", rows=99, source_weight=0.0, task_weight=0.5
    )
    attached = begun(method, "lora", model)
    tasks = tasks_of(model, count=5)
    task, later = tasks[which], tasks[1 - which]
    assert method.curvature is None  # nothing holds before the first task
    method.before_task(task)
    assert method.before_step(attached.model) is None
    shaken(attached.model, size=0.4)
    anchor = weights_of(attached.model)
    fisher = naive_fisher(attached.model, task)
    method.after_task(task)
    for name, diagonal in fisher.items():
        assert relative(method.curvature.blocks[name].values, 0.5 * diagonal) < 1e-9
    shaken(attached.model, seed=9, size=0.3)
    method.before_task(later)
    sites = lora_sites(attached.model)
    penalty = sum(
        0.5 * 0.5 * (fisher[s.name] * (s.scaling * s.b @ s.a - anchor[s.name]).square()).sum()
        for s in sites
    )
    want = torch.autograd.grad(4.0 * penalty, [p for s in sites for p in (s.a, s.b)])
    for site in sites:
        site.a.grad, site.b.grad = torch.ones_like(site.a), torch.ones_like(site.b)
    nats = method.before_step(attached.model)
    slack = 1e-9
    for p, g in zip([p for s in sites for p in (s.a, s.b)], want, strict=True):
        assert relative(p.grad - 1, g) < slack
    assert nats == pytest.approx(float(penalty.detach()), rel=slack)


@pytest.mark.parametrize("adapter", ["lora", "full", "bottleneck"])
def test_l2_is_half_the_squared_update(adapter: str) -> None:
    method = method_of("l2", strength=3.0)
    attached = begun(method, adapter, "llama")
    first, second = tasks_of("llama")
    start = weights_of(attached.model)
    for task in (first, second):
        method.before_task(task)
        shaken(attached.model, seed=task.index)
        now = weights_of(attached.model)
        want = 0.5 * sum(float((now[n] - start[n]).square().sum()) for n in now)
        assert method.before_step(attached.model) == pytest.approx(want, rel=1e-9)
        for site in find_sites(attached.model):
            if isinstance(site, LinearSite):
                assert relative(site.weight.grad, 3.0 * (now[site.name] - start[site.name])) < 1e-9
        attached.model.zero_grad()
        method.after_task(task)
        assert method.curvature.quadratic(attached.model) == pytest.approx(0, abs=1e-9)
        start = now


def test_the_curvatures_of_all_tasks_join() -> None:
    for consolidate in (True, False):
        method = method_of("kfac", rows=8, consolidate=consolidate)
        attached = begun(method, "lora", "llama")
        traces = [sum(b.trace() for b in method.curvature.blocks.values())]
        for task in tasks_of("llama"):
            learn(method, attached, task)
            traces.append(sum(b.trace() for b in method.curvature.blocks.values()))
            assert (method.curvature.quadratic(attached.model) < 1e-12) is consolidate
        if consolidate:
            assert all(b > a for a, b in pairwise(traces))
            assert method.curvature.info.merged == 3
        else:
            assert len(set(traces)) == 1


def test_the_source_and_the_tasks_have_weights() -> None:
    ends = []
    for weight in (1.0, 3.0):
        method = method_of("kfac", rows=8, source_weight=weight, task_weight=0.0)
        attached = begun(method, "lora", "llama")
        learn(method, attached, tasks_of("llama")[0], learning_rate=1e-9)
        ends.append(sum(b.trace() for b in method.curvature.blocks.values()))
    assert ends[1] == pytest.approx(3 * ends[0], rel=1e-6)


@pytest.mark.parametrize("structure", ["kfac", "activation", "tridiagonal"])
def test_a_regression_has_a_curvature_of_the_right_size(structure: str) -> None:
    """The trace, or what small noise costs, is that of (z - y)^2 in nats: a Fisher of 2."""
    method = method_of(structure, fisher="mc", rows=99)
    attached = begun(method, "lora", "bert", source=[])
    task = tasks_of("bert", count=8)[1]
    shaken(attached.model, size=0.4)
    fisher = naive_fisher(attached.model, task)
    curvature = method.fit(task.examples, task.columns, 0)
    ratio = sum(b.trace() for b in curvature.blocks.values()) / sum(
        float(f.sum()) for f in fisher.values()
    )
    if structure == "activation":
        assert 0.05 < ratio < 20
    else:  # random signs have one squared gradient
        assert ratio == pytest.approx(1.0, rel=0.35)
    method.options["fisher"] = "empirical"
    with pytest.raises(ConfigError, match="no labels of this kind"):
        method.fit(task.examples, task.columns, 0)


def test_the_narrowed_answers_end_with_the_fit() -> None:
    attached = attach("lora", "bert", KL(0.0))
    batch = batch_of(tasks_of("bert")[0], [0, 1])
    whole = forward_logits(attached.model, batch)
    with answering(attached.model, slice(0, 2)):
        assert torch.equal(forward_logits(attached.model, batch), whole[:, :2])
    with answering(attached.model, slice(2, 3)):
        assert torch.equal(forward_logits(attached.model, batch), whole[:, 2:3])
    assert torch.equal(forward_logits(attached.model, batch), whole)
