"""How far an optimiser moves a parameter a unit of gradient, which a proximal step has to match."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.optim import Optimizer

from retain.errors import ConfigError
from retain.models.shards import whole
from retain.retention.watch import read

__all__ = ["step_lengths"]


def step_lengths(optimizer: Optimizer) -> dict[int, float]:
    """The step length of each parameter: lr, over Adam's mean denominator where it has one.

    The host waits for a device once, for all parameters (steps are counted on the CPU, but by a
    fused or capturable optimiser).
    """
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps the optimiser
    rates: dict[int, float] = {}
    adapted: list[tuple[int, float, float, float, float | Tensor]] = []
    roots: list[Tensor] = []
    for group in inner.param_groups:
        lr = float(group["lr"])
        for parameter in group["params"]:
            state = inner.state.get(parameter, {})
            second, count = state.get("exp_avg_sq"), state.get("step")
            if second is None or count is None or "betas" not in group:
                if "betas" in group and state:
                    raise ConfigError(
                        "the proximal update cannot read this optimiser's state",
                        got=type(inner).__name__,
                        allowed="SGD, Adam, AdamW and others with exp_avg_sq",
                        fix="update='gradient'",
                    )
                rates[id(parameter)] = lr
                continue
            exact = torch.promote_types(second.dtype, torch.float32)
            taken = count if _lies_elsewhere(count) else float(count)
            adapted.append((id(parameter), lr, group["betas"][1], group["eps"], taken))
            roots.append(whole(second.detach()).to(exact).sqrt().mean())
    counts = [taken for *_, taken in adapted if isinstance(taken, Tensor)]
    numbers = read([*roots, *counts]) if adapted else []
    late = iter(numbers[len(roots) :])
    for (key, lr, beta, eps, taken), root in zip(adapted, numbers[: len(roots)], strict=True):
        count = next(late) if isinstance(taken, Tensor) else taken
        if not count:  # a gradient scaler skipped every step so far
            rates[key] = 0.0
            continue
        rates[key] = lr / (root / math.sqrt(1.0 - beta**count) + eps)
    return rates


def _lies_elsewhere(count: float | Tensor) -> bool:
    """Whether the host would wait for it."""
    return isinstance(count, Tensor) and count.device.type != "cpu"
