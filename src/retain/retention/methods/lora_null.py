"""LoRA-Null: A and B begin where the activations that are to be kept are not (arXiv 2503.02659).

With U the r directions of the inputs in which S_old is smallest, B_0 and A_0 are the halves of the
singular value decomposition of ``W U U^T``, the part of the weight that the old inputs hardly read.
This is the version that trains both A and B.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from retain.retention.moments import Moments
from retain.retention.starts import Factors, Start, split

__all__ = ["LoRANull"]


class LoRANull(Start):
    """See the module, and `Start` for the argument and for sequences of tasks."""

    name: ClassVar[str] = "lora_null"

    def starts(
        self, weights: dict[str, Tensor], rank: int, old: Moments, new: Moments | None
    ) -> dict[str, Factors]:
        quiet = {
            name: torch.linalg.eigh(factor.dense().double()).eigenvectors[:, :rank]
            for name, factor in old.factors.items()
        }
        found = {}
        for name, weight in weights.items():
            u = quiet[old.readers[name]].to(weight)
            b, a = split(weight @ u, rank)
            found[name] = b, a @ u.T
        return found
