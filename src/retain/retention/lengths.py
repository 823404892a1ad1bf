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
    adapted: list[tuple[int, float, float]] = []
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
            steps = count.double() if _lies_elsewhere(count) else float(count)
            correction = 1.0 - group["betas"][1] ** steps  # 0 where there was no step
            exact = torch.promote_types(second.dtype, torch.float32)
            adapted.append((id(parameter), lr, group["eps"]))
            roots.append((whole(second.detach()).to(exact) / correction).sqrt_().mean())
    for (key, lr, eps), root in zip(adapted, read(roots) if roots else [], strict=True):
        # It is not where a gradient scaler has skipped every step so far.
        rates[key] = lr / (root + eps) if math.isfinite(root) else 0.0
    return rates


def _lies_elsewhere(count: float | Tensor) -> bool:
    """Whether the host would wait for it."""
    return isinstance(count, Tensor) and count.device.type != "cpu"
