"""What is asked of an optimiser: whether a part can act beside its steps, and how far they go.

How far it moves a parameter a unit of gradient is what a proximal step has to match.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from retain.errors import ConfigError, ModelError
from retain.models.shards import whole
from retain.retention.watch import read

__all__ = [
    "check_descends", "check_lengths", "check_points", "check_steps", "keeps_two", "no_deepspeed",
    "step_lengths", "steps_in_backward",
]  # fmt: skip

IN_BACKWARD = ("LayerWiseDummyOptimizer", "Lomo", "AdaLomo")
"""Classes of optimisers that step inside the backward pass: what transformers has in place of one
for GaLore and APOLLO layer by layer, and those of lomo_optim."""

_OTHERS = torch.optim.RAdam, torch.optim.Adamax
"""Of Adam's kin in torch, those that divide by something else: RAdam at first by nothing, so that
for hundreds of steps Adam's length is several times its own, and Adamax by a largest gradient."""


def check_steps(part: object) -> None:
    """Refuses a model or an optimiser of DeepSpeed, and optimisers that take their own gradients.

    Those that step as gradients come, and those that compute them inside their step, as LBFGS does;
    those of accelerate's that are around them too. `check_backward` finds the hooks of others.

    Raises:
        ModelError: it is one.
    """
    for kind in (*type(part).__mro__, *type(getattr(part, "optimizer", None)).__mro__):
        if kind.__module__.startswith("deepspeed") or kind.__name__.startswith("DeepSpeed"):
            raise no_deepspeed()
        if kind.__name__ in IN_BACKWARD:
            raise steps_in_backward(kind.__name__, 'optim="adamw_torch", or another without it')
        if issubclass(kind, torch.optim.LBFGS):
            raise ModelError(
                "the optimiser computes gradients inside its step, where no force can act",
                got="LBFGS",
                allowed="an optimiser whose step takes no closure",
                fix="torch.optim.AdamW, or SGD",
            )


def no_deepspeed() -> ModelError:
    """What a run of DeepSpeed is refused with."""
    return ModelError(
        "DeepSpeed steps its optimiser behind the backward pass, where no force can act here",
        got="a DeepSpeed run",
        allowed="ZeRO stage 1 or 2 in a trainer with retain.RetentionCallback; FSDP2; DDP",
        fix="zero_optimization.stage: 2 in DeepSpeed's settings, or train without it",
    )


def steps_in_backward(got: str, fix: str) -> ModelError:
    """What an optimiser is refused with that steps while gradients come."""
    return ModelError(
        "the optimiser steps inside the backward pass, where no force can act",
        got=got,
        allowed="an optimiser that steps after it",
        fix=fix,
    )


def keeps_two(optimizer: Optimizer) -> bool:
    """Whether an optimiser is schedule-free, which its `train` and `eval` tell.

    Such a one keeps a second point z beside the weights y that are trained, and puts a mix of both
    in their place to evaluate and save (Defazio et al., arXiv 2405.15682). A gradient moves both; a
    weight that is moved by another hand leaves z behind, and comes out on the other side.
    """
    inner, _ = _inner(optimizer)
    return all(callable(getattr(inner, name, None)) for name in ("train", "eval"))


def check_points(optimizer: Optimizer, part: str) -> None:
    """Refuses a part that moves weights by itself beside a schedule-free optimiser.

    Raises:
        ConfigError: the optimiser is one; see `keeps_two`.
    """
    if keeps_two(optimizer):
        raise ConfigError(
            f"{part} does not act on a schedule-free optimiser's second point, which is mixed into "
            "what is evaluated and saved",
            got=_name(_inner(optimizer)[0]),
            allowed="what acts on gradients: a strength, update='gradient', no filter",
            fix="a strength and parts=['rows', 'force']; or another optimiser",
        )


def check_descends(optimizer: Optimizer) -> None:
    """Refuses an optimiser that climbs, so that what is added to gradients would push, not pull.

    Raises:
        ConfigError: it has ``maximize=True``.
    """
    if any(group.get("maximize") for group in _inner(optimizer)[0].param_groups):
        raise ConfigError(
            "an optimiser that maximises turns the force round, which is added to the gradients",
            got=f"{_name(_inner(optimizer)[0])} with maximize=True",
            allowed="an optimiser that minimises",
            fix="maximize=False, and the negative of what is maximised as the loss",
        )


def check_lengths(optimizer: Optimizer) -> None:
    """Refuses an optimiser whose step lengths are not known, as far as it shows before a step.

    Raises:
        ConfigError: it is neither torch's SGD nor one with betas and eps, as Adam's kin have, or is
            one of them that divides by something else (RAdam, Adamax, PEFT's LoRA-FA); SGD with a
            momentum of 1, whose steps never end; or gradients are changed inside its step, by a
            hook or around that of torch's, as PEFT's Riemannian one does: what Adam keeps is of
            those then, and tells nothing of a step of the force.
    """
    inner, sgd = _inner(optimizer)
    kind = getattr(inner, "stands_for", type(inner))
    known = all("betas" in group and "eps" in group for group in inner.param_groups)
    elsewhere = {"bitsandbytes", "peft"} & {_package(k) for k in kind.__mro__}  # by other names
    if not sgd and (not known or elsewhere or issubclass(kind, _OTHERS)):
        raise _unread(inner)
    endless = [g["momentum"] for g in inner.param_groups if sgd and g["momentum"] >= 1]
    if endless:
        raise ConfigError(
            "a proximal step has no length beside a momentum that never fades",
            got=f"momentum={endless[0]:g}",
            allowed="below 1",
            fix="momentum=0.9, or update='gradient'",
        )
    changed = _changed(inner)
    if changed is not None:
        raise ConfigError(
            "the proximal update cannot tell the lengths of steps whose gradients may be changed",
            got=changed,
            allowed="an optimiser with a step of its own, or torch's as it is",
            fix="update='gradient'",
        )


def step_lengths(optimizer: Optimizer, active: Mapping[int, Any] | None = None) -> dict[int, float]:
    """The step length of each parameter: lr, over Adam's mean denominator where it has one.

    Of SGD with a momentum m it is lr / (1 - m): its buffer adds up gradients, so one of them, as
    the force would be, moves a parameter by lr, lr m, lr m^2 and so on. (Adam's are averaged.) A
    dampening d takes 1 - d of each. A parameter whose gradients have all been 0, as those of A are
    in the first step of a fresh LoRA, has a length of 0. The formula would give lr / eps, and Adam
    itself moves an entry by about lr at most.

    The host waits for a device once, for all parameters (steps are counted on the CPU, but by a
    fused or capturable optimiser).

    Args:
        optimizer: that has stepped.
        active: by the ``id`` of a parameter, the index of its entries that train; the mean is over
            these. All of them where it is left out.

    Returns:
        By the ``id`` of each parameter, its length.

    Raises:
        ConfigError: an optimiser that is neither torch's SGD nor has Adam's ``exp_avg_sq``, or has
            stepped a parameter and keeps its state elsewhere.
    """
    check_lengths(optimizer)
    inner, sgd = _inner(optimizer)
    rates: dict[int, float] = {}
    adapted: list[tuple[int, float, float]] = []
    roots: list[Tensor] = []
    for group in inner.param_groups:
        lr = float(group["lr"])
        if sgd:
            rates |= dict.fromkeys(map(id, group["params"]), lr * _summed(group))
            continue
        for parameter in group["params"]:
            state = inner.state.get(parameter, {})
            second = state.get("max_exp_avg_sq", state.get("exp_avg_sq"))  # with amsgrad the first
            count = state.get("step")
            if second is None or count is None:
                if state or parameter.grad is not None:  # with one, Adam would have a state
                    raise _unread(inner)
                rates[id(parameter)] = lr
                continue
            steps = count.double() if _lies_elsewhere(count) else float(count)
            correction = 1.0 - group["betas"][1] ** steps  # 0 where there was no step
            exact = torch.promote_types(second.dtype, torch.float32)
            adapted.append((id(parameter), lr, group["eps"]))
            second = whole(second.detach())[(active or {}).get(id(parameter), ...)]
            roots.append((second.to(exact) / correction).sqrt_().mean())
    for (key, lr, eps), root in zip(adapted, read(roots) if roots else [], strict=True):
        # It is not finite where a gradient scaler has skipped every step so far.
        rates[key] = lr / (root + eps) if math.isfinite(root) and root > 0 else 0.0
    return rates


def _inner(optimizer: Any) -> tuple[Any, bool]:
    """The optimiser without accelerate's wrapper, and whether it is torch's SGD."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return inner, issubclass(getattr(inner, "stands_for", type(inner)), torch.optim.SGD)


def _changed(optimizer: Any) -> str | None:
    """What may change the gradients inside an optimiser's step; None where nothing does."""
    hooks = getattr(optimizer, "_optimizer_step_pre_hooks", ())
    if hooks:
        return f"{len(hooks)} hooks of others before a step of {_name(optimizer)}"
    kind = getattr(optimizer, "stands_for", type(optimizer))
    near = next((k for k in kind.__mro__ if k.__module__.startswith("torch.optim.")), None)
    if near in (None, Optimizer) or kind.step.__module__.startswith("torch."):
        return None
    return f"{_name(optimizer)}, which steps in another way than torch.optim.{near.__name__}"


def _summed(group: dict[str, Any]) -> float:
    """How much of a gradient SGD's steps add up to, over the rate."""
    momentum = float(group["momentum"])
    return (1.0 - float(group["dampening"])) / (1.0 - momentum) if momentum else 1.0


def _unread(optimizer: Any) -> ConfigError:
    return ConfigError(
        "the proximal update cannot read this optimiser's state",
        got=_name(optimizer),
        allowed="torch.optim.SGD, Adam, AdamW, NAdam, and others with betas and exp_avg_sq",
        fix="update='gradient'",
    )


def _name(optimizer: Any) -> str:
    """For errors: its class, and of which package where it is not torch's, for names are alike."""
    kind: type = getattr(optimizer, "stands_for", type(optimizer))
    package = _package(kind)
    return kind.__name__ if package == "torch" else f"{kind.__name__} of {package}"


def _package(kind: type) -> str:
    return kind.__module__.partition(".")[0]


def _lies_elsewhere(count: float | Tensor) -> bool:
    """Whether the host would wait for it."""
    return isinstance(count, Tensor) and count.device.type != "cpu"
