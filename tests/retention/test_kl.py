"""KL of the outputs, with and without the target, against naive loops."""

from __future__ import annotations

import math

import pytest
import torch
from sequences import alone, attach, batch_of, begun, method_of, shaken, source, tasks_of

from retain.data.batches import Example
from retain.errors import SourceError
from retain.models.adapters.base import Adapter
from retain.models.forward import divergence, forward_logits, logit_divergence
from retain.retention.method import Method, Task
from retain.retention.methods.kl import _said, masked_divergence
from tiny import relative


def naive_kl(base: list[float], tuned: list[float], skip: int | None = None) -> float:
    keep = [v for v in range(len(base)) if v != skip]
    p, q = ([math.exp(x[v]) for v in keep] for x in (base, tuned))
    p, q = ([v / sum(x) for v in x] for x in (p, q))
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def kls(attached: Adapter, example: Example, *, masked: bool = False) -> list[float]:
    """Nats of each prediction of a row between the base model and the tuned one."""
    with attached.off() as base, torch.no_grad():
        p = alone(base, example)
    q = alone(attached.model, example).detach()
    targets = [t for t, on in zip(example.targets, example.predict, strict=True) if on]
    rows = zip(p.tolist(), q.tolist(), targets, strict=True)
    return [naive_kl(b, t, int(y) if masked else None) for b, t, y in rows]


def paired(task: Task, row: int, model: str) -> Example:
    """The row of the source that stands beside a row of the task."""
    order = torch.randperm(6, generator=torch.Generator().manual_seed(task.seed)).tolist()
    return source(model)[order[row % 6]]


def term(method: Method, attached: Adapter, task: Task, rows: list[int]) -> torch.Tensor | None:
    batch = batch_of(task, rows)
    return method.loss(attached.model, batch, forward_logits(attached.model, batch))


def test_divergences_are_those_of_a_naive_loop() -> None:
    random = torch.Generator().manual_seed(0)
    base, tuned = (3 * torch.randn(5, 7, generator=random, dtype=torch.float64) for _ in range(2))
    targets = torch.tensor([0, 6, 3, 3, 1])
    rows = list(zip(base.tolist(), tuned.tolist(), targets.tolist(), strict=True))
    for found, masked in (
        (logit_divergence(base, tuned), False), (masked_divergence(base, tuned, targets), True),
    ):  # fmt: skip
        want = [naive_kl(b, t, y if masked else None) for b, t, y in rows]
        assert relative(found, torch.tensor(want, dtype=torch.float64)) < 1e-12


@pytest.mark.parametrize("size", [1e-3, 1e-2, 1.0, 30.0])
def test_a_divergence_keeps_its_digits_in_float32(size: float) -> None:
    random = torch.Generator().manual_seed(0)
    base = torch.randn(300, 50, generator=random, dtype=torch.float64).log_softmax(-1)
    tuned = (base + size * torch.randn(base.shape, generator=random)).log_softmax(-1)
    want = divergence(base, tuned, False)
    found = divergence(base.float(), tuned.float(), False)
    assert float((found - want).abs().mean() / want.mean()) < max(3e-7 / size, 1e-6)
    assert torch.allclose(want, divergence(base, tuned.clone().requires_grad_(), False))


def test_a_class_that_is_ruled_out_adds_nothing_to_a_divergence() -> None:
    none = -torch.inf
    base = torch.tensor([[0.2, 0.8, 0.0, 0.0]]).log()
    tuned = torch.tensor([[0.4, 0.4, 0.2, 0.0]]).log()
    want = 0.2 * math.log(0.5) + 0.8 * math.log(2)
    assert float(divergence(base, tuned, False)) == pytest.approx(want, rel=1e-6)
    unlikely, likely = torch.tensor([[-0.01, -99.0]]), torch.tensor([[none, 0.0]])
    assert float(divergence(unlikely, unlikely.flip(1), False)) == pytest.approx(98.0, rel=1e-3)
    assert float(divergence(unlikely, likely, False)) == torch.inf


def test_masked_kl_says_nothing_about_the_target() -> None:
    random = torch.Generator().manual_seed(1)
    base = torch.randn(4, 6, generator=random, dtype=torch.float64)
    targets, tuned = torch.tensor([5, 0, 2, 2]), base.clone()
    tuned[torch.arange(4), targets] += torch.tensor([9.0, 3.0, -4.0, 0.5], dtype=torch.float64)
    assert float(masked_divergence(base, tuned, targets).abs().max()) < 1e-12
    assert float(logit_divergence(base, tuned).min()) > 1e-3
    tuned = (base + torch.randn(base.shape, generator=random, dtype=torch.float64)).requires_grad_()
    masked_divergence(base, tuned, targets).sum().backward()
    assert bool((tuned.grad[torch.arange(4), targets] == 0).all())
    assert bool((tuned.grad != 0).sum() == 4 * 5)


@pytest.mark.parametrize("adapter", ["lora", "full", "bottleneck", "prefix"])
@pytest.mark.parametrize("name", ["kl", "masked_kl"])
def test_the_kl_term_is_that_to_the_base_model(name: str, adapter: str) -> None:
    method = method_of(name, strength=7.0)
    attached = begun(method, adapter, "llama")
    shaken(attached.model)
    task, rows = tasks_of("llama")[0], [3, 0, 6]
    method.before_task(task)
    found = term(method, attached, task, rows)
    masked = name == "masked_kl"
    each = [x for row in rows for x in kls(attached, task.examples[row], masked=masked)]
    assert len(each) == len(batch_of(task, rows).targets)
    assert float(found.detach()) == pytest.approx(7.0 * sum(each) / len(each), rel=1e-9)
    parameters = list(attached.parameters().values())
    want = torch.autograd.grad(found, parameters, retain_graph=True, allow_unused=True)
    assert any(g is not None and bool(g.any()) for g in want)
    assert all(p.requires_grad for p in parameters)


@pytest.mark.parametrize("adapter", ["lora", "full", "prefix"])
def test_the_teacher_has_no_dropout_and_draws_nothing(adapter: str) -> None:
    attached = attach(adapter, "llama", method_of("kl"), dtype=torch.float32)
    batch = batch_of(tasks_of("llama")[0], [3, 0, 6])
    attached.model.eval()
    with attached.off() as base, torch.no_grad():
        want = forward_logits(base, batch)
    attached.model.train()
    state = torch.get_rng_state()
    with attached.off() as base:
        assert torch.equal(_said(base, batch), want)
    assert torch.equal(torch.get_rng_state(), state)
    assert attached.model.training


def test_kl_on_the_source_pairs_each_row_with_one_of_the_source() -> None:
    method = method_of("kl", on="source", strength=2.0)
    attached = begun(method, "lora", "llama")
    shaken(attached.model)
    task = tasks_of("llama")[0]
    method.before_task(task)
    total, weights = 0.0, 0
    for row in (1, 8, 14, 15):
        each, weight = kls(attached, paired(task, row, "llama")), task.examples[row].predictions
        total, weights = total + weight * sum(each) / len(each), weights + weight
    found = term(method, attached, task, [1, 8, 14, 15])
    assert float(found.detach()) == pytest.approx(2.0 * total / weights, rel=1e-9)
    pieces = [  # any division gives one mean
        float(term(method, attached, task, rows).detach()) * len(batch_of(task, rows).targets)
        for rows in ([1, 8], [14, 15])
    ]
    assert sum(pieces) == pytest.approx(2.0 * total, rel=1e-9)
    with pytest.raises(SourceError, match="needs source text"):
        begun(method_of("kl", on="source"), "lora", "llama", source=[])


@pytest.mark.parametrize("on", ["task", "source"])
def test_a_classifiers_kl_is_to_the_model_before_the_task(on: str) -> None:
    method = method_of("kl", on=on, strength=3.0)
    attached = begun(method, "lora", "bert")
    tasks, rows = tasks_of("bert"), [2, 5, 1]
    tasks.append(Task("third", 2, tasks[0].examples, slice(0, 3), 40))
    for index, task in enumerate(tasks):
        shaken(attached.model, seed=index)
        method.before_task(task)
        before = attached.state()
        shaken(attached.model, seed=10 + index)
        found, now, total = term(method, attached, task, rows), attached.state(), 0.0
        for row in rows if index else ():
            example = task.examples[row] if on == "task" else paired(task, row, "bert")
            said = []
            for state in (before, now):
                attached.restore(state)
                said.append(alone(attached.model, example)[0].tolist())
            teacher, student = said
            total += naive_kl(teacher[0:2], student[0:2])
            if index == 2:
                total += (teacher[2] - student[2]) ** 2
        if index:
            assert float(found.detach()) == pytest.approx(3.0 * total / 3, rel=1e-9)
        else:
            assert found is None
        method.after_task(task)
