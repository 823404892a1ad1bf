"""Target-masked KL (arXiv 2605.29498): what the base model thought of all tokens but the target.

At a prediction with target y, both distributions lose y and are normalised again,

    p'(v) = p(v) / (1 - p(y)),   q'(v) = q(v) / (1 - q(y))   for v != y,

and the term is ``strength * mean over predictions of sum_{v != y} p'(v) (log p'(v) - log q'(v))``,
with p the base model's (adapter off) and q the tuned model's. Raising q(y) alone changes no q', so
the term never speaks against learning the target. It is on the task's own inputs.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from retain.retention.kl import KL, divergence

__all__ = ["MaskedKL", "masked_divergence"]


class MaskedKL(KL):
    """KL without the target; see the module.

    Args:
        strength: nats of task loss that one nat weighs; 0 is plain training, bit for bit.
    """

    name: ClassVar[str] = "masked_kl"
    why_not: ClassVar[dict[str, str]] = {
        "classifier": "a new head has nothing to hold to among a task's own classes, and without "
        "the target it is the same as kl among those of earlier tasks",
    }

    def __init__(self, strength: float = 1.0) -> None:
        super().__init__(strength)

    def compare(self, base: Tensor, tuned: Tensor, targets: Tensor) -> Tensor:
        return masked_divergence(base, tuned, targets)


def masked_divergence(base: Tensor, tuned: Tensor, targets: Tensor) -> Tensor:
    """`divergence` over all classes but each row's target.

    Args:
        base: logits, [rows, classes].
        tuned: logits, [rows, classes].
        targets: [rows].
    """
    keep = torch.ones_like(base, dtype=torch.bool).scatter_(1, targets[:, None], False)
    shape = (len(base), base.shape[1] - 1)
    return divergence(base[keep].view(shape), tuned[keep].view(shape))
