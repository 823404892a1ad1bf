"""How far an optimiser moves a parameter a unit of gradient, which a proximal step has to match."""

from __future__ import annotations

import torch
from torch.optim import Optimizer

from retain.errors import ConfigError
from retain.models.shards import whole

__all__ = ["step_lengths"]


def step_lengths(optimizer: Optimizer) -> dict[int, float]:
    """The step length of each parameter: lr, over Adam's mean denominator where it has one."""
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps the optimiser
    rates: dict[int, float] = {}
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
            if not float(count):  # a gradient scaler skipped every step so far
                rates[id(parameter)] = 0.0
                continue
            beta, eps = group["betas"][1], group["eps"]
            correction = 1.0 - beta ** float(count)
            exact = torch.promote_types(second.dtype, torch.float32)
            root = (whole(second.detach()).to(exact) / correction).sqrt_()
            rates[id(parameter)] = lr / (float(root.mean()) + eps)
    return rates
