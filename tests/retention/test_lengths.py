"""How far an optimiser moves a parameter a unit of gradient."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from peft.optimizers.lorafa import LoraFAOptimizer
from torch import nn
from transformers.optimization import Adafactor

from counting import Calls
from retain.errors import ConfigError
from retain.retention.optimizers import check_lengths, step_lengths


def stepped(kind: type[torch.optim.Optimizer], **options: float) -> torch.optim.Optimizer:
    random = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(3, n, generator=random)) for n in (2, 5, 7)]
    optimizer = kind([{"params": weights[:2]}, {"params": weights[2:], "lr": 0.3}], **options)
    for _ in range(3):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=random)
        optimizer.step()
    return optimizer


def test_of_adam_it_is_the_rate_over_the_mean_denominator() -> None:
    optimizer = stepped(torch.optim.AdamW, lr=0.1, eps=1e-3)
    found = step_lengths(optimizer)
    for group in optimizer.param_groups:
        for weight in group["params"]:
            corrected = optimizer.state[weight]["exp_avg_sq"] / (1 - group["betas"][1] ** 3)
            wanted = group["lr"] / (float(corrected.sqrt().mean()) + 1e-3)
            assert found[id(weight)] == pytest.approx(wanted, rel=1e-6)
    assert len(found) == 3


def test_what_never_had_a_gradient_has_none_of_it() -> None:
    """Else its length would be the rate over eps, and a first step take A's rows away."""
    weight = nn.Parameter(torch.ones(2, 4))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert step_lengths(optimizer) == {id(weight): 0.0}
    weight.grad[:, 2:] = 1.0  # of the entries that train
    optimizer.step()
    columns = (slice(None), slice(2, None))
    alone = step_lengths(optimizer, {id(weight): columns})[id(weight)]
    root = float(optimizer.state[weight]["exp_avg_sq"][0, 2] / (1 - 0.999**2)) ** 0.5
    assert alone == pytest.approx(0.1 / root)
    assert step_lengths(optimizer)[id(weight)] == pytest.approx(2 * alone)


def test_amsgrad_divides_by_the_largest() -> None:
    weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.Adam([weight], lr=0.1, amsgrad=True)
    for size in (1.0, *[1e-3] * 2000):
        weight.grad = torch.full_like(weight, size)
        optimizer.step()
    state = optimizer.state[weight]
    root = float(state["max_exp_avg_sq"] / (1 - 0.999**2001)) ** 0.5
    assert root > 1.2 * float(state["exp_avg_sq"] / (1 - 0.999**2001)) ** 0.5
    assert step_lengths(optimizer)[id(weight)] == pytest.approx(0.1 / root)


def test_the_host_waits_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what devices have; of steps that are counted on the CPU it need not wait."""
    optimizer, reads, listed = stepped(torch.optim.AdamW, lr=0.1), [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: reads.append(len(t)) or listed(t))
    found = step_lengths(optimizer)
    assert reads == [3]
    # As of a fused optimiser, which counts on the device.
    monkeypatch.setattr("retain.retention.optimizers._lies_elsewhere", lambda count: True)
    with Calls(lambda name: name if name in ("_local_scalar_dense", "item") else None) as count:
        assert step_lengths(optimizer) == pytest.approx(found, rel=1e-6)
    assert (reads, dict(count.found)) == ([3, 3], {})


def test_of_others_it_is_the_rate() -> None:
    optimizer = stepped(torch.optim.SGD, lr=0.1)
    assert sorted(step_lengths(optimizer).values()) == [0.1, 0.1, 0.3]


@pytest.mark.parametrize(
    "options", [{"momentum": 0.9}, {"momentum": 0.5, "nesterov": True},
                {"momentum": 0.9, "dampening": 0.4}], ids=str,
)  # fmt: skip
def test_of_momentum_it_is_what_a_gradient_moves_in_the_end(options: dict[str, float]) -> None:
    weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.SGD([weight], lr=0.1, **options)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()  # the first gradient is not dampened
    weight.grad += 1.0
    for _ in range(200):
        optimizer.step()
        weight.grad.zero_()
    assert step_lengths(optimizer)[id(weight)] == pytest.approx(-float(weight.detach()))


def test_a_momentum_that_never_fades_is_refused() -> None:
    for ask in (step_lengths, check_lengths):
        with pytest.raises(ConfigError, match="a momentum that never fades; got: momentum=1"):
            ask(stepped(torch.optim.SGD, lr=0.1, momentum=1.0))


def test_steps_that_were_all_skipped_move_nothing() -> None:
    optimizer = stepped(torch.optim.Adam, lr=0.1)
    for state in optimizer.state.values():
        state["step"].zero_()
    assert set(step_lengths(optimizer).values()) == {0.0}
    for state in optimizer.state.values():
        state["exp_avg_sq"].zero_()
    assert set(step_lengths(optimizer).values()) == {0.0}


def test_a_state_that_says_nothing_of_it_is_refused() -> None:
    optimizer = stepped(torch.optim.AdamW, lr=0.1)
    del next(iter(optimizer.state.values()))["exp_avg_sq"]
    with pytest.raises(ConfigError, match="cannot read this optimiser's state"):
        step_lengths(optimizer)
    assert math.isfinite(sum(step_lengths(stepped(torch.optim.Adam, lr=0.1)).values()))


def test_a_state_that_is_kept_elsewhere_is_refused() -> None:
    """As PEFT's LoRA-FA keeps its own, by the names of layers; what has no gradient has none."""
    optimizer = stepped(torch.optim.AdamW, lr=0.1)
    weight = optimizer.param_groups[1]["params"][0]
    optimizer.state["layer"] = optimizer.state.pop(weight)  # type: ignore[index]
    with pytest.raises(ConfigError, match="cannot read this optimiser's state; got: AdamW"):
        step_lengths(optimizer)
    weight.grad = None
    assert step_lengths(optimizer)[id(weight)] == 0.3


def test_of_bitsandbytes_it_is_refused_before_a_step() -> None:
    """Its AdamW has betas, and the name of torch's."""
    kind = type("AdamW", (torch.optim.Optimizer,), {"__module__": "bitsandbytes.optim.adamw"})
    optimizer = kind([nn.Parameter(torch.zeros(2))], {"lr": 0.1, "betas": (0.9, 0.999)})
    with pytest.raises(ConfigError, match="this optimiser's state; got: AdamW of bitsandbytes;"):
        check_lengths(optimizer)


def test_what_keeps_no_second_moment_is_refused_before_a_step() -> None:
    """PEFT's LoRA-FA keeps it by other names, and Lion, which has no eps, not at all."""
    weight = nn.Parameter(torch.zeros(2))
    lion = type("Lion", (torch.optim.Optimizer,), {})([weight], {"lr": 0.1, "betas": (0.9, 0.99)})
    named = [{"params": [weight], "names": ["lora_A.weight"], "scaling_factor": 1.0}]
    for optimizer, told in ((lion, "Lion of"), (LoraFAOptimizer(named), "LoraFAOptimizer of peft")):
        with pytest.raises(ConfigError, match=f"this optimiser's state; got: {told}"):
            check_lengths(optimizer)


class Halved(torch.optim.AdamW):
    """Changes gradients inside its step, as PEFT's Riemannian optimiser does."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                weight.grad.mul_(0.5)
        return super().step()


class Renamed(torch.optim.AdamW):
    """Steps as torch's does."""


def test_gradients_that_change_inside_a_step_are_refused() -> None:
    hooked = stepped(torch.optim.AdamW, lr=0.1)
    handle = hooked.register_step_pre_hook(lambda *_: None)
    for optimizer, told in (
        (
            stepped(Halved, lr=0.1),
            "Halved of test_lengths, which steps in another way than torch.optim.AdamW",
        ),
        (hooked, "1 hooks of others before a step of AdamW"),
    ):
        for ask in (step_lengths, check_lengths):
            with pytest.raises(ConfigError, match=f"gradients may be changed; got: {told}"):
                ask(optimizer)
    handle.remove()
    plain = stepped(Renamed, lr=0.1)
    torch.optim.lr_scheduler.ConstantLR(plain)  # which wraps its step
    for optimizer in (hooked, plain):
        check_lengths(optimizer)


@pytest.mark.parametrize(
    "kind",
    [torch.optim.RMSprop, torch.optim.Adagrad, Adafactor, torch.optim.RAdam, torch.optim.Adamax],
)
def test_those_that_adapt_in_another_way_are_refused(kind: type[torch.optim.Optimizer]) -> None:
    told = f"cannot read this optimiser's state; got: {kind.__name__}"
    for ask in (step_lengths, check_lengths):
        with pytest.raises(ConfigError, match=told):
            ask(stepped(kind))
    for fine in (torch.optim.SGD, torch.optim.AdamW):
        check_lengths(stepped(fine, lr=0.1))
