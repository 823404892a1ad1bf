"""A method that is on holds: less is lost than by plain training on the same rows."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from sequences import begun, learn, method_of, source, tasks_of
from torch import Tensor

from retain.data.batches import collate
from retain.errors import ConfigError, ModelError
from retain.models.adapters.base import Adapter
from retain.models.adapters.osf import OSF
from retain.models.forward import forward_logits, logit_divergence
from retain.retention.methods.kl import masked_divergence
from retain.retention.registry import make_method
from tiny import base, relative

STEPS: dict[str, Any] = {"max_steps": 8, "learning_rate": 0.01}


def answers(adapter: Adapter, model: str) -> Tensor:
    with torch.no_grad():
        return forward_logits(adapter.model.eval(), collate(source(model), 0))


def drift(name: str, adapter: str, **options: Any) -> float:
    """Nats per prediction on the source between the base model and the trained one."""
    method = method_of(name, **options)
    attached = begun(method, adapter, "llama")
    with attached.off():
        before = answers(attached, "llama")
    for task in tasks_of("llama"):
        learn(method, attached, task, **STEPS)
    return float(logit_divergence(before, answers(attached, "llama")).mean())


@cache
def plain(adapter: str) -> float:
    return drift("none", adapter)


STRONG = {"strength": 1000.0}
KL = {"strength": 30.0, "on": "source"}
SELF = {"share": 8.0, "rows": 64}
HELD: list[tuple[str, str, dict[str, Any], float]] = [
    *(
        (name, adapter, {"strength": 30.0} if name == "l2" else STRONG, 0.5)
        for name in ("l2", "diagonal", "kfac", "tridiagonal", "activation")
        for adapter in ("lora", "full")
    ),
    *(("kfac", "lora", {**STRONG, "structure": s}, 0.5) for s in ("shampoo", "ekfac")),
    ("kfac", "lora", {**STRONG, "space": "adapter"}, 0.5),
    *((n, "lora", {**STRONG, "update": "proximal"}, 0.5) for n in ("diagonal", "tridiagonal")),
    ("l2", "lora", {"strength": 30.0, "update": "proximal"}, 0.5),
    *(("kl", adapter, KL, 0.5) for adapter in ("lora", "full")),
    ("kl", "bottleneck", KL, 0.8),
    *(("self_replay", adapter, SELF, 0.8) for adapter in ("lora", "full", "bottleneck")),
    ("kl", "prefix", KL, 1.0),  # which begins far from the base model
    ("self_replay", "prefix", SELF, 1.0),
]


@pytest.mark.parametrize(("name", "adapter", "options", "most"), HELD)
def test_the_base_model_is_held_over_two_tasks(
    name: str, adapter: str, options: dict[str, Any], most: float
) -> None:
    assert drift(name, adapter, **options) < most * plain(adapter)


def learned(name: str, strength: float) -> tuple[float, float]:
    """(nats between base and tuned without the target, nats gained on it), on a task's rows."""
    method = method_of(name, strength=strength)
    attached = begun(method, "lora", "llama")
    task = tasks_of("llama")[0]
    batch = collate(task.examples, 0)
    before = forward_logits(attached.model, batch).detach()
    learn(method, attached, task, **STEPS)
    with torch.no_grad():
        after = forward_logits(attached.model.eval(), batch)
    gained = after.log_softmax(-1) - before.log_softmax(-1)
    apart = masked_divergence(before, after, batch.targets)
    return float(apart.mean()), float(gained[torch.arange(len(gained)), batch.targets].mean())


def test_masked_kl_holds_as_kl_does_and_learns_more() -> None:
    free, kl, masked = (learned(*c) for c in (("kl", 0.0), ("kl", 10.0), ("masked_kl", 10.0)))
    assert max(kl[0], masked[0]) < 0.1 * free[0]
    assert kl[1] < 0.95 * masked[1] < 0.95 * free[1]


def lost(name: str, model: str, **options: Any) -> float:
    """How much worse the first task's loss is after the second task than after the first."""
    method = method_of(name, **options)
    attached = begun(method, "lora", model)
    first, second = tasks_of(model)

    def loss() -> float:
        batch = collate(first.examples, 0)
        with torch.no_grad():
            logits = forward_logits(attached.model.eval(), batch)
        logits = logits if first.columns is None else logits[:, first.columns]
        return float(torch.nn.functional.cross_entropy(logits, batch.targets))

    learn(method, attached, first, max_steps=20, learning_rate=0.01)
    before = loss()
    learn(method, attached, second, max_steps=10, learning_rate=0.01)
    return loss() - before


@pytest.mark.parametrize(
    ("name", "model", "options"),
    [
        ("replay", "llama", {"share": 1.0}),
        ("replay", "bert", {"share": 1.0}),
        ("kl", "bert", {"strength": 300.0}),
        ("diagonal", "llama", {"strength": 300.0, "source_weight": 0.0, "rows": 16}),
        # The first task is learned so well that its own labels have hardly any Fisher left.
        ("kfac", "bert", {"strength": 300.0, "source_weight": 0.0, "fisher": "tempered"}),
    ],
)
def test_the_first_task_is_held_while_the_second_is_learned(
    name: str, model: str, options: dict[str, Any]
) -> None:
    assert lost(name, model, **options) < 0.7 * lost("none", model)


@pytest.mark.parametrize("model", ["llama", "bert"])
def test_osf_is_the_base_until_it_is_trained_and_when_off_and_is_saved(
    model: str, tmp_path: Any
) -> None:
    method = method_of("osf")
    attached = begun(method, "osf", model)
    with attached.off():
        untouched = answers(attached, model)
    assert relative(answers(attached, model), untouched) < 1e-12
    for task in tasks_of(model):
        learn(method, attached, task, **STEPS)
    with attached.off(), attached.off():
        assert torch.equal(answers(attached, model), untouched)
    found = answers(attached, model)
    assert float((found - untouched).abs().max()) > 1e-3
    attached.save(tmp_path, "tiny")
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".safetensors"}
    again = OSF.load(base(model), tmp_path)
    assert float((answers(again, model) - found).abs().max()) < 1e-5
    assert again.count() == attached.count()
    with pytest.raises(ModelError, match="another base model"):
        OSF.load(base(model, seed=3), tmp_path)
    with pytest.raises(ConfigError, match="cannot split"):
        OSF.attach(base(model), targets="nothing_here")


def test_osf_freezes_more_from_task_to_task_and_keeps_the_function() -> None:
    method = make_method("osf", preserve=0.25)
    attached = begun(method, "osf", "llama", tasks=4)
    task, ranks = tasks_of("llama")[0], []
    for index in range(4):
        task.index = index
        before = answers(attached, "llama")
        method.before_task(task)
        assert float((answers(attached, "llama") - before).abs().max()) < 1e-5
        layer = attached.layers()["base_model.model.model.layers.0.self_attn.q_proj"]
        ranks.append(layer.effective_rank["default"])
        learn(method, attached, task, **STEPS)
    assert ranks == [2, 3, 5, 6]  # of 8: 25 %, then 43.75 %, 62.5 %, 81.25 %
    assert attached.count()[0] == sum(p.numel() for p in attached.parameters().values())


def test_osf_gradients_are_orthogonal_to_what_is_frozen() -> None:
    method = method_of("osf")
    attached = begun(method, "osf", "llama")
    for task in tasks_of("llama"):  # in the second task the split is a new one
        learn(method, attached, task, **STEPS)
        method.before_task(task)
        whole = {n: attached._merged(m) for n, m in attached.layers().items()}
        forward_logits(attached.model, collate(task.examples, 0)).square().sum().backward()
        for name, layer in attached.layers().items():
            u, _, v = torch.linalg.svd(whole[name].float(), full_matrices=False)
            rank, parts = layer.effective_rank["default"], layer.osf_svd_params["default"]
            for frozen, grad in (
                (u[:, :rank].T.double(), parts["U_low"].grad),
                (v[:rank].double(), parts["V_low"].grad.T),
            ):
                assert float(grad.abs().max()) > 0
                assert float((frozen @ grad).abs().max()) < 1e-4 * float(grad.abs().max())
